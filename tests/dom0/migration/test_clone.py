"""Clones go on from where their parent was, share its memory, and meet nobody else's."""

from __future__ import annotations

from dataclasses import replace
from uuid import uuid4

import pytest

from machines import Machine
from relocating import check, counting, follow
from xenolith.dom0 import copies
from xenolith.dom0.migration.clone import FrozenDomain, freeze
from xenolith.dom0.services import Dom0, DomainSpec, GuestDomain
from xenolith.hypervisor.control import DomainCreateError
from xenolith.machine.memory import COPY_RESERVE

pytestmark = pytest.mark.slow


def clone(dom0: Dom0, spec: DomainSpec, frozen: FrozenDomain, number: int) -> GuestDomain:
    spec = replace(spec, name=f"clone-{number}", uuid=uuid4(), image=None, ramdisk=b"")
    return dom0.clone(spec, frozen, number)


def last(printed: str) -> int:
    return max(int(line.split()[1]) for line in printed.splitlines() if line.startswith("a ") and line[2:].isdigit())


@pytest.mark.parametrize("vcpus", [1, 2])
def test_parent_and_clones_go_on_each_for_itself(engine_name: str, vcpus: int) -> None:
    spec, names = counting(vcpus, memory_mib=96), "ab"[:vcpus]
    machine = Machine(600, engine_name)
    with machine.dom0 as dom0:
        free = dom0.control.machine().free_pages
        parent = dom0.create(spec)
        dom0.start(parent)
        follow(parent.console, "a 20")
        frozen = freeze(dom0, parent, {})
        clones = [clone(dom0, spec, frozen, number) for number in (1, 2)]
        frozen.close()
        machine.check_invariants()  # which pauses them all
        for domain in (*clones, parent):
            if domain is not parent:
                dom0.start(domain)
            dom0.control.unpause(domain.domid)
        goal = last(parent.console.scrollback.decode()) + 100
        for domain in (parent, *clones):
            check(follow(domain.console, f"a {goal}"), names)
        machine.check_invariants()
        assert dom0.xenstore.read(f"/local/domain/{clones[1].domid}/clone/number") == "2"
        # The second generation: what a clone is by now.
        young = freeze(dom0, clones[0], {})
        grandchild = clone(dom0, spec, young, 1)
        young.close()
        dom0.destroy(clones[0])
        dom0.destroy(parent)
        dom0.start(grandchild)
        goal = last(grandchild.console.scrollback.decode()) + 60
        check(follow(grandchild.console, f"a {goal}"), names)
        machine.check_invariants()
        dom0.destroy(grandchild)
        dom0.destroy(clones[1])
        assert dom0.control.machine().free_pages == free


def test_a_clone_that_was_not_let_run_has_few_pages_of_its_own(engine_name: str) -> None:
    spec = counting(1, memory_mib=96)
    machine = Machine(400, engine_name)
    with machine.dom0 as dom0:
        parent = dom0.create(spec)
        dom0.start(parent)
        follow(parent.console, "a 20")
        frozen = freeze(dom0, parent, {})
        one, two = (clone(dom0, spec, frozen, number) for number in (1, 2))
        frozen.close()
        own = dom0.control.private_frames(one.domid)
        assert own < 1024, f"{own} frames of 24576"
        dom0.control.write_frames(one.domid, one.built.console_mfn, 3000, b"written here")
        assert b"written here" not in dom0.control.read_frames(two.domid, two.built.console_mfn, 1)
        assert b"written here" not in dom0.control.read_frames(parent.domid, parent.built.console_mfn, 1)


def test_clones_are_charged_for_what_is_their_own_and_what_they_may_write_next(
    engine_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = counting(1, memory_mib=96)
    machine = Machine(170, engine_name)
    with machine.dom0 as dom0:

        def free() -> int:
            return dom0.control.machine().free_pages

        at_first = free()
        parent = dom0.create(spec)
        dom0.start(parent)
        follow(parent.console, "a 20")
        frozen = freeze(dom0, parent, {})
        dom0.control.pause(parent.domid)
        before = free()
        clones = [clone(dom0, spec, frozen, number) for number in range(1, 13)]  # 1,152 MiB
        frozen.close()
        each = (before - free()) / 12
        assert COPY_RESERVE <= each < COPY_RESERVE + 512
        dom0.destroy(parent)  # what they share is charged as long as one of them is there
        assert free() < at_first - 4096
        started = []
        with pytest.raises(DomainCreateError, match="frames for what a clone may write"):
            for domain in clones:
                dom0.start(domain)
                started.append(domain)
        assert started

        def paused(domain: GuestDomain) -> bool:
            return dom0.control.info(domain.domid).paused

        monkeypatch.setattr(copies, "RESERVE", 1 << 20)  # as if all of them had written to all of it
        dom0.copies.look()
        assert paused(started[-1])
        assert "paused, as the machine has no memory for what it may write" in dom0.control.log_text()
        monkeypatch.undo()
        for domain in [*clones[1:], clones[0]]:
            dom0.destroy(domain)
        assert free() == at_first
