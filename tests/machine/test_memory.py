"""Machine memory: no frame is ever handed out twice, none is lost, and what comes back is clean."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from xenolith.machine.memory import FEWEST_REMAPPED, MachineMemory, OutOfMemory

FRAMES = 256


class Allocation(RuleBasedStateMachine):
    """Any sequence of allocations and releases, against a set of the frames that are out."""

    single = Bundle("single")
    extents = Bundle("extents")

    def __init__(self) -> None:
        super().__init__()
        self.memory = MachineMemory(FRAMES)
        self.out: set[int] = set()

    def hand_out(self, mfns: list[int]) -> None:
        assert 0 not in mfns
        assert all(0 < mfn < FRAMES for mfn in mfns)
        assert len(set(mfns)) == len(mfns)
        assert not self.out & set(mfns)
        for mfn in mfns:
            assert not any(self.memory.page(mfn)), "a frame must come clean"
            self.memory.page(mfn)[:] = bytes([mfn & 0xFF or 1]) * 4096
        self.out |= set(mfns)

    @rule(target=single, count=st.integers(0, 60))
    def allocate(self, count: int) -> object:
        if count > FRAMES - 1 - len(self.out):
            with pytest.raises(OutOfMemory):
                self.memory.allocate(count)
            return multiple()
        mfns = [int(mfn) for mfn in self.memory.allocate(count)]
        assert mfns == sorted(mfns)
        assert mfns == sorted(set(range(1, FRAMES)) - self.out)[:count], "the lowest frames first"
        self.hand_out(mfns)
        return multiple(*mfns)

    @rule(target=extents, order=st.integers(0, 6), limit=st.none() | st.integers(1, FRAMES))
    def allocate_extent(self, order: int, limit: int | None) -> object:
        size = 1 << order
        end = FRAMES if limit is None else limit
        places = [
            first
            for first in range(0, end - size + 1, size)
            if first and not self.out & set(range(first, first + size))
        ]
        if not places:
            with pytest.raises(OutOfMemory):
                self.memory.allocate_extent(order, limit)
            return multiple()
        first = self.memory.allocate_extent(order, limit)
        assert first == places[0]
        self.hand_out(list(range(first, first + size)))
        return (first, size)

    @rule(extent=consumes(extents))
    def free_extent(self, extent: tuple[int, int]) -> None:
        first, size = extent
        self.memory.free(first, size)
        self.out -= set(range(first, first + size))

    @rule(mfns=st.lists(consumes(single), max_size=20))
    def free_many(self, mfns: list[int]) -> None:
        self.memory.free_many(np.array(mfns, dtype=np.uint64))
        self.out -= set(mfns)

    @invariant()
    def nothing_is_lost(self) -> None:
        assert self.memory.free_frames == FRAMES - 1 - len(self.out)

    @invariant()
    def what_is_out_keeps_its_contents(self) -> None:
        for mfn in self.out:
            assert self.memory.page(mfn)[0] == (mfn & 0xFF or 1)

    def teardown(self) -> None:
        everything = np.array(sorted(self.out), dtype=np.uint64)
        self.memory.free_many(everything)
        assert self.memory.allocate_extent(7) == 128, "all extents have grown together again"
        self.memory.close()


TestAllocation = Allocation.TestCase
TestAllocation.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_all_views_show_the_same_memory() -> None:
    memory = MachineMemory(8)
    memory.q[3 << 9] = 0x1122_3344_5566_7788
    assert memory.b[3 << 12] == 0x88
    assert memory.h[(3 << 11) + 1] == 0x5566
    assert memory.d[(3 << 10) + 1] == 0x1122_3344
    assert memory.table(3)[0] == memory.words[3 << 9] == 0x1122_3344_5566_7788
    memory.table(3)[1] = 5
    memory.page(3)[16] = 6
    assert (memory.q[(3 << 9) + 1], memory.q[(3 << 9) + 2]) == (5, 6)


def test_a_large_machine_costs_only_what_is_used_and_released_frames_go_back_to_the_host() -> None:
    memory = MachineMemory(1 << 20)  # 4 GiB
    allocated = memory.allocate_extent(8)

    def host_frames() -> int:
        return os.fstat(memory.fd).st_blocks * 512 >> 12

    assert host_frames() == 0
    for mfn in range(allocated, allocated + 256):
        memory.q[mfn << 9] = 1
    assert host_frames() == 256
    memory.free(allocated, 256)
    assert host_frames() == 0
    memory.close()


def test_threads_never_get_the_same_frame() -> None:
    memory = MachineMemory(4096)
    taken: list[list[int]] = [[], []]

    def take(mine: list[int]) -> None:
        for _ in range(300):
            mine += [int(mfn) for mfn in memory.allocate(4)]
            memory.free(mine.pop())
            mine.append(memory.allocate_extent(0))

    threads = [threading.Thread(target=take, args=(mine,)) for mine in taken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    both = taken[0] + taken[1]
    assert len(set(both)) == len(both) == 2 * 300 * 4
    assert memory.free_frames == 4095 - len(both)


def test_a_host_without_a_mapping_to_spare_has_private_frames_cleared_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = MachineMemory(256)
    mfns = memory.allocate(FEWEST_REMAPPED)
    memory.b[int(mfns[0]) << 12] = 1
    image = memory.image(mfns)
    memory.b[int(mfns[-1]) << 12] = 2

    def refuse(*_: object) -> None:
        raise OSError(12, "no mapping is left")

    with monkeypatch.context() as patch:
        patch.setattr(memory, "_map_at", refuse)
        memory.free(int(mfns[0]), len(mfns))
    assert not memory.words.any()
    image.close()
    memory.close()
