"""Whatever somebody writes into a saved domain is refused with a sentence, or makes a domain that the audit accepts."""

from __future__ import annotations

import io
import json
import os
import random
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from struct import pack, pack_into, unpack_from
from typing import TYPE_CHECKING

import pytest

from machines import Machine, missing
from xenolith.dom0.image import load_image
from xenolith.dom0.migration import live
from xenolith.dom0.migration.checkpoint import Checkpointer
from xenolith.dom0.migration.protect import Protection, Standby
from xenolith.dom0.migration.restore import Receiver
from xenolith.dom0.migration.save import save
from xenolith.dom0.migration.series import Series, join
from xenolith.dom0.migration.stream import BLOCKS, DESCRIPTION, STATE, ZSTD, Reader, Writer
from xenolith.dom0.services import DomainSpec
from xenolith.hypervisor import audit
from xenolith.hypervisor.control import DomainCreateError, RecordError
from xenolith.hypervisor.domain_record.kinds import Plain

from ..test_services import PREBUILT

if TYPE_CHECKING:
    from collections.abc import Iterator

FILES = int(os.environ.get("XENOLITH_FUZZ", "300"))
HEADER, SECTION = 24, 32


@pytest.fixture(scope="module", params=["unicorn"])
def small(request: pytest.FixtureRequest) -> Iterator[tuple[Machine, DomainSpec, bytes]]:
    """A machine, a tiny guest's description, and the file that it was saved to while it ran."""
    if reason := missing(request.param):
        pytest.skip(reason)
    machine = Machine(32, request.param)
    path = PREBUILT / "timers.elf"
    spec = DomainSpec(name="small", image=load_image(path), kernel="", memory_kib=4 << 10, vcpus=1)
    with machine.dom0 as dom0:
        domain = dom0.create(spec)
        dom0.start(domain)
        out = io.BytesIO()
        save(dom0, domain, Writer(out), {"config": None}, lambda done, total: None)
        dom0.destroy(domain)
        yield machine, replace(spec, image=None), out.getvalue()


def sections(data: bytes) -> list[tuple[int, int, int]]:
    """Kind, place and length of each section's contents."""
    found, place = [], HEADER
    while place < len(data):
        kind, _, stored, _, _ = unpack_from("<IIQQQ", data, place)
        found.append((kind, place + SECTION, stored))
        place += SECTION + stored
    return found


def mutated(data: bytes, chance: random.Random) -> bytes:
    """The file with something wrong: in pages (page tables first of all), in a number, in a header, or cut."""
    wrong = bytearray(data)
    _, place, length = chance.choice(sections(data))
    for _ in range(chance.choice((1, 1, 2, 8))):
        choice = chance.randrange(8)
        if choice == 0:
            pack_into("<B", wrong, chance.randrange(len(wrong)), chance.randrange(256))
        elif choice == 1:
            at = place - SECTION + chance.choice((0, 4, 8, 16, 24))
            pack_into("<Q" if at >= place - 24 else "<I", wrong, at, chance.choice((0, 1, 7, 1 << 20, (1 << 32) - 1)))
        elif choice == 2 and length >= 8:
            at = place + chance.randrange(length // 8) * 8
            old = unpack_from("<Q", wrong, at)[0]
            new = chance.choice((old ^ 1 << chance.randrange(64), old + 4096 & (1 << 64) - 1))
            pack_into("<Q", wrong, at, new)
        elif choice == 3:
            return bytes(wrong[: chance.randrange(len(wrong))])
        else:  # a digit of the records: most of what is checked one by one is there
            _, place, length = [section for section in sections(data) if section[0] == STATE][-1]
            at = place + chance.randrange(length)
            if chr(wrong[at]) in "0123456789abcdef":
                wrong[at] = ord(chance.choice("0123456789"))
            elif chance.random() < 0.2:
                wrong[at] = chance.choice(b'"[]{},:tfn-')
    return bytes(wrong)


def test_mutated_files_are_refused_or_make_a_sound_domain(small: tuple[Machine, DomainSpec, bytes]) -> None:
    machine, spec, data = small
    dom0 = machine.dom0
    chance = random.Random(int(os.environ.get("XENOLITH_SEED", "1")))
    free, nodes = dom0.control.machine().free_pages, dom0.xenstore.statistics()
    outcomes = {"refused": 0, "restored": 0}
    for _ in range(FILES):
        try:
            domain = dom0.restore(spec, Receiver(dom0.control, io.BytesIO(mutated(data, chance))).receive())
        except (RecordError, DomainCreateError) as refusal:
            assert " " in str(refusal)
            outcomes["refused"] += 1
        else:
            assert audit.check(dom0.hypervisor) == []
            dom0.start(domain)
            dom0.destroy(domain)
            assert "Xenolith failed" not in dom0.hypervisor.log_text
            outcomes["restored"] += 1
        assert dom0.control.machine().free_pages == free
        assert dom0.xenstore.statistics() == nodes
    print(outcomes)
    assert min(outcomes.values()) > 0


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("tsc_hz", 1 << 20, r"tell time by an invariant TSC of 1\.0 MHz, and this host's has \d+\.\d MHz"),
        ("7.0.ebx", 1 << 31, r"features that the engine unicorn lacks here: CPUID 7\.0\.ebx, bits 0x80000000"),
    ],
)
def test_what_the_guest_was_told_has_to_be_true_here(
    small: tuple[Machine, DomainSpec, bytes], name: str, value: int, why: str
) -> None:
    machine, spec, data = small
    _, place, length = next(section for section in sections(data) if section[0] == STATE)
    state = json.loads(data[place : place + length])
    state["domain"]["features"] |= {name: value, "80000007.0.edx": 1 << 8}
    text = json.dumps(state).encode()
    header = pack("<IIQQQ", STATE, 0, len(text), len(text), 0)
    file = io.BytesIO(data[: place - SECTION] + header + text + data[place + length :])
    with pytest.raises(RecordError, match=why):
        machine.dom0.restore(spec, Receiver(machine.dom0.control, file).receive())


def test_mutated_checkpoints_are_refused_or_make_a_sound_domain(small: tuple[Machine, DomainSpec, bytes]) -> None:
    machine, spec, _ = small
    dom0 = machine.dom0
    domain = dom0.create(replace(spec, image=load_image(PREBUILT / "timers.elf")))
    dom0.start(domain)
    checkpointer = Checkpointer(dom0, domain)
    files: dict[str, bytes] = {}
    for number, base in ((1, ""), (2, "1"), (3, "2")):
        out = io.BytesIO()
        checkpointer.take(out, Series(number, 0, f"i{number}", base, f"i{base}" if base else ""), {"config": None})
        files[str(number)] = out.getvalue()
    checkpointer.close()
    dom0.destroy(domain)
    chance = random.Random(int(os.environ.get("XENOLITH_SEED", "1")))
    free, nodes = dom0.control.machine().free_pages, dom0.xenstore.statistics()
    outcomes = {"refused": 0, "restored": 0}
    for _ in range(FILES // 3):
        wrong = chance.choice(list(files))
        given = files | {wrong: mutated(files[wrong], chance)}

        def opened(name: str, given: dict[str, bytes] = given) -> io.BytesIO:
            if name not in given:
                raise FileNotFoundError(2, "no such file")
            return io.BytesIO(given[name])

        try:
            domain = dom0.restore(spec, Receiver(dom0.control, opened("3"), opened).receive())
        except (RecordError, DomainCreateError) as refusal:
            assert " " in str(refusal)
            outcomes["refused"] += 1
        else:
            assert audit.check(dom0.hypervisor) == []
            dom0.destroy(domain)
            outcomes["restored"] += 1
        with suppress(RecordError):
            join(opened("3"), io.BytesIO(), opened)
        assert dom0.control.machine().free_pages == free
        assert dom0.xenstore.statistics() == nodes
    assert min(outcomes.values()) > 0
    with pytest.raises(RecordError, match="goes on from 2"):
        Receiver(dom0.control, io.BytesIO(files["3"])).receive()
    with pytest.raises(RecordError, match="not the checkpoint that it goes on from"):
        Receiver(dom0.control, io.BytesIO(files["3"]), lambda name: io.BytesIO(files["1"])).receive()


def test_mutated_protections_are_given_up_or_make_a_sound_domain(
    small: tuple[Machine, DomainSpec, bytes], tmp_path: Path
) -> None:
    machine, spec, _ = small
    dom0 = machine.dom0
    domain = dom0.create(replace(spec, image=load_image(PREBUILT / "timers.elf")))
    dom0.start(domain)
    out = io.BytesIO()
    answers = io.BytesIO(live.READY + b"".join(b"epoch %d\n" % number for number in range(1, 6)))
    protection = Protection(dom0, domain, out, answers, {"config": None})
    for _ in range(3):
        protection.epoch()
    protection.close()
    dom0.destroy(domain)
    chance = random.Random(int(os.environ.get("XENOLITH_SEED", "1")))
    free, nodes = dom0.control.machine().free_pages, dom0.xenstore.statistics()
    outcomes = {"refused": 0, "restored": 0}
    for _ in range(FILES // 3):
        standby = None
        try:
            standby = Standby(dom0.control, io.BytesIO(mutated(out.getvalue(), chance)), io.BytesIO(), tmp_path)
            assert standby.follow()
            domain = dom0.restore(spec, standby.take_over())
        except (RecordError, DomainCreateError) as refusal:
            assert " " in str(refusal)
            outcomes["refused"] += 1
            if standby is not None:
                standby.close()
        else:
            assert audit.check(dom0.hypervisor) == []
            dom0.destroy(domain)
            standby.close_disks()
            outcomes["restored"] += 1
        assert dom0.control.machine().free_pages == free
        assert dom0.xenstore.statistics() == nodes
    assert min(outcomes.values()) > 0


def test_mutated_relocations_are_given_up_or_make_a_sound_domain(small: tuple[Machine, DomainSpec, bytes]) -> None:
    """Of a domain that ran while it was sent, so that pages come more than once."""
    machine, spec, _ = small
    dom0 = machine.dom0
    domain = dom0.create(replace(spec, image=load_image(PREBUILT / "timers.elf")))
    dom0.start(domain)
    out = io.BytesIO()
    answers = io.BytesIO(live.READY + live.STARTED)
    live.send(dom0, domain, out, answers, {"config": None}, lambda text: None, lambda: None, lambda: None)
    dom0.destroy(domain)
    chance = random.Random(int(os.environ.get("XENOLITH_SEED", "1")))
    free, nodes = dom0.control.machine().free_pages, dom0.xenstore.statistics()
    outcomes = {"refused": 0, "restored": 0, "not let go": 0}
    for _ in range(FILES // 3):
        try:
            receiver = Receiver(dom0.control, io.BytesIO(mutated(out.getvalue(), chance)))
            domain = dom0.restore(spec, receiver.receive())
        except (RecordError, DomainCreateError) as refusal:
            assert " " in str(refusal)
            outcomes["refused"] += 1
        else:
            assert audit.check(dom0.hypervisor) == []
            try:
                receiver.wait_for_word()
            except RecordError:
                outcomes["not let go"] += 1
            else:
                dom0.start(domain)
                outcomes["restored"] += 1
            dom0.destroy(domain)
        assert dom0.control.machine().free_pages == free
        assert dom0.xenstore.statistics() == nodes
    print(outcomes)
    assert min(outcomes["refused"], outcomes["restored"]) > 0


def test_a_protection_has_each_disk_once_and_no_room_for_blocks_of_nothing(
    small: tuple[Machine, DomainSpec, bytes], tmp_path: Path
) -> None:
    control = small[0].dom0.control
    free, open_files = control.machine().free_pages, len(os.listdir("/proc/self/fd"))

    def standby(disks: list[Plain]) -> Standby:
        stream = io.BytesIO()
        writer = Writer(stream)
        writer.json(DESCRIPTION, {"max_pages": 1 << 10, "vcpus": 1, "toolstack": None, "disks": disks})
        writer.section(BLOCKS, b"", 3 << 36)
        stream.seek(0)
        return Standby(control, stream, io.BytesIO(), tmp_path)

    disk: Plain = {"number": 3, "sectors": 8}
    with pytest.raises(RecordError, match="disk 3 twice"):
        standby([disk, disk])
    made = standby([disk])
    with pytest.raises(RecordError, match="0 bytes at block 0"):
        made.follow()
    made.close()
    assert not list(tmp_path.iterdir()) and len(os.listdir("/proc/self/fd")) == open_files
    assert control.machine().free_pages == free


@pytest.mark.parametrize("says", [1 << 30, 1 << 62])
def test_a_section_that_unpacks_to_more_than_it_says_gets_no_room(says: int) -> None:
    blocks = says >> 17 if says == 1 << 30 else 1
    bomb = b"\x28\xb5\x2f\xfd\xe0" + pack("<Q", says)  # a frame of zstd: 128 KiB of one byte, again and again
    bomb += b"".join(pack("<I", 1 << 20 | 2 | (at == blocks - 1))[:3] + b" " for at in range(blocks))
    stream = io.BytesIO()
    Writer(stream)
    stream.write(pack("<IIQQQ", DESCRIPTION, ZSTD, len(bomb), 1 << 20, 0) + bomb)
    stream.seek(0)
    reader = Reader(stream)
    before = getrusage(RUSAGE_SELF).ru_maxrss
    with pytest.raises(RecordError, match="another length"):
        reader.json(reader.expect(DESCRIPTION))
    assert getrusage(RUSAGE_SELF).ru_maxrss - before < 512 << 10, "KiB"
