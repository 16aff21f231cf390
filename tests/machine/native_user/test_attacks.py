"""What a hostile program in a stub can do: end itself."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from struct import pack_into

import pytest
from stubs import ALL_RIGHTS, FIRST, PAGES, PROGRAM, SYSCALL, Hostile

from xenolith.machine.engines.unicorn.user import code, stub
from xenolith.machine.engines.unicorn.user.stub import FLUSH, StubDied, map_pages

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="/proc shows a stub, which cannot be dumped, to root alone")
Make = Callable[[], Hostile]

HANDED_OVER = (code.SIGILL, code.SIGTRAP, code.SIGBUS, code.SIGFPE, code.SIGKICK, code.SIGSEGV, code.SIGSYS)
WANTED = {  # what an attacker would like to call: number and arguments
    "mmap of the memory object": (9, PROGRAM + 0x100_0000, 0x10000, 3, 1, 3, 0),
    "mmap of nothing": (9, PROGRAM + 0x100_0000, 0x10000, 7, 0x32, -1, 0),
    "munmap of the text": (11, code.TEXT, 4096, 0, 0, 0, 0),
    "munmap of the mailbox": (11, code.MAILBOX, code.MAILBOX_SIZE, 0, 0, 0, 0),
    "mprotect of the commands": (10, code.COMMANDS, code.COMMANDS_SIZE, 3, 0, 0, 0),
    "mremap of the commands": (25, code.COMMANDS, 4096, 4096, 3, PROGRAM + 0x100_0000, 0),
    "fork": (57, 0, 0, 0, 0, 0, 0),
    "exit_group": (231, 0, 0, 0, 0, 0, 0),
    "kill of everybody": (62, -1, 9, 0, 0, 0, 0),
    "prctl": (157, 38, 0, 0, 0, 0, 0),
    "rt_sigprocmask": (14, 2, code.TEXT, 0, 8, 0, 0),
    "rt_sigaction": (13, 11, 0, 0, 8, 0, 0),
    "sigaltstack": (131, PROGRAM, 0, 0, 0, 0, 0),
    "hand over": (code.SYS_HAND_OVER, 11, PROGRAM, 0, 0, 0, 0),
    "return from a signal": (code.SYS_SIGRETURN, 0, 0, 0, 0, 0, 0),
}
NOT_FILTERED = (335, 336)  # uretprobe, uprobe: newer kernels let no filter see them, and answer SIGILL and ENXIO
CALLS_IN_TEXT = [
    at for at in range(4095) if code.program()[4096 + at : 4098 + at] == b"\x0f\x05"
]  # also those within other instructions


def registers(number: int, *arguments: int) -> dict[str, int]:
    return dict(zip(("rax", "rdi", "rsi", "rdx", "r10", "r8", "r9"), (number, *arguments), strict=True))


@root_only
def test_the_guests_task_has_no_descriptor_and_the_mapper_the_memory_object_alone(hostile: Make) -> None:
    program = hostile()
    mapper, guest = program.tasks
    assert program.descriptors(guest) == {}
    assert list(program.descriptors(mapper)) == [code.MEMORY_FD]
    assert "xenolith-domain-memory" in program.descriptors(mapper)[code.MEMORY_FD]


@root_only
def test_nothing_is_mapped_but_the_stubs_own_pages_and_what_was_asked_for(hostile: Make) -> None:
    program = hostile()
    found = {at: rights for at, (_, rights, what) in program.mappings().items() if what != "[vsyscall]"}
    assert found == {
        PROGRAM: "rwxs",
        code.TEXT: "r-xp",
        code.MAILBOX: "rw-s",
        code.COMMANDS: "r--s",
    }


def test_no_system_call_is_made_whatever_its_number(hostile: Make) -> None:
    program = hostile()
    program.place(bytes.fromhex(SYSCALL))
    for number in (*range(520), *range(1 << 30, (1 << 30) + 560), -1, 1 << 31, 1 << 63):
        if number in NOT_FILTERED:
            continue
        assert program.run(rax=number) == code.SIGSYS, number
        assert program.register("rip") == PROGRAM + 2
        assert program.register("rax") == number & (1 << 64) - 1


@pytest.mark.parametrize("wanted", WANTED)
def test_a_system_call_from_code_of_the_programs_own_is_a_signal(hostile: Make, wanted: str) -> None:
    program = hostile()
    assert program.run(SYSCALL, **registers(*WANTED[wanted])) == code.SIGSYS


def test_a_system_call_of_32_bit_programs_is_none_either(hostile: Make) -> None:
    program = hostile()
    assert program.run("cd 80", **registers(*WANTED["mmap of nothing"])) in (code.SIGSYS, code.SIGSEGV)


@root_only
@pytest.mark.parametrize("at", CALLS_IN_TEXT)
def test_jumps_to_the_stubs_own_system_calls_end_the_stub_at_most(hostile: Make, at: int) -> None:
    program = hostile()
    before = program.mappings()
    for wanted in WANTED.values():
        try:
            assert program.run(rip=code.TEXT + at, **registers(*wanted)) in HANDED_OVER
        except StubDied:
            program.close()
            program = hostile()
            continue
        assert program.mappings() == before
        assert len(program.tasks) == 2


def forged_frame(program: Hostile, **changes: int) -> int:
    """A copy of the stub's signal frame in the program's memory, with 64-bit words of these offsets changed."""
    frame, size = program.stub.frame, code.MAILBOX_SIZE - program.stub.frame
    content = bytearray(program.stub.bytes[frame : frame + size])
    place = PROGRAM + 0x2000 + frame % 64
    pack_into("<Q", content, stub.FPSTATE, place + program.stub.xsave - frame)
    for name, value in changes.items():
        pack_into("<Q", content, {"mask": stub.SIGNAL_MASK, "rip": stub.RIP, "stack": stub.STACK}[name], value)
    return program.place(bytes(content), place - PROGRAM)


ENDLESS = "eb fe"
RETURNS = code.GUEST_RETURNS - 2


def test_a_program_that_blocks_signals_by_a_forged_frame_is_ended(
    hostile: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stub, "ANSWER_PIECES", 4)
    program = hostile()
    program.run("0f 0b")
    program.place(bytes.fromhex("c6 04 25 00 10 40 00 01 eb fe"))  # mov byte [PROGRAM + 0x1000], 1; and for ever
    frame = forged_frame(program, mask=(1 << 64) - 1, rip=PROGRAM)
    with pytest.raises(StubDied, match="does not let itself be interrupted"):
        program.run(
            rip=RETURNS,
            rax=code.SYS_SIGRETURN,
            rsp=frame + 8,
            kicked=lambda: program.memory.b[(FIRST + 1) << 12] == 1,
        )


def test_a_program_that_moves_its_signal_stack_by_a_forged_frame_is_ended(hostile: Make) -> None:
    program = hostile()
    program.run("0f 0b")
    program.place(bytes.fromhex("0f 0b"))
    frame = forged_frame(program, rip=PROGRAM, stack=PROGRAM + 0x6000)
    with pytest.raises(StubDied, match="forged"):
        program.run(rip=RETURNS, rax=code.SYS_SIGRETURN, rsp=frame + 8)


def test_a_forged_frame_with_nonsense_is_a_fault_of_the_programs(hostile: Make) -> None:
    assert hostile().run(rip=RETURNS, rax=code.SYS_SIGRETURN, rsp=PROGRAM + 0x1008) == code.SIGSEGV


def test_a_kick_interrupts_a_program_that_computes(hostile: Make) -> None:
    program = hostile()
    program.place(bytes.fromhex(ENDLESS))
    done: list[int] = []
    runner = threading.Thread(target=lambda: done.append(program.run()))
    runner.start()
    while runner.is_alive():
        program.stub.kick()
        runner.join(0.01)
    assert done == [code.SIGKICK]
    assert program.register("rip") == PROGRAM


@pytest.mark.parametrize("register", ["fs", "gs"])
def test_a_base_that_is_not_canonical_ends_the_stub_at_most(hostile: Make, register: str) -> None:
    program = hostile()
    program.place(bytes.fromhex("0f 0b"))
    program.stub.words[code.FS_BASE // 8 if register == "fs" else code.GS_BASE // 8] = 1 << 63
    with pytest.raises(StubDied):
        program.run()


def test_the_stubs_pages_show_nothing_but_the_program_that_runs_in_it(hostile: Make) -> None:
    """What another one left in registers, or had mapped, is gone."""
    program = hostile()
    secret = b"a secret of others"
    program.run("f3 0f 6f 07 48 8b 07 0f 0b", rdi=program.place(secret, 0x100))  # movdqu xmm0, [rdi]; mov rax, [rdi]
    assert secret[:16] in bytes(program.stub.bytes)
    assert not program.stub.carry_out(FLUSH)
    program.stub.forget_registers()
    shown = bytes(program.stub.bytes)
    assert secret[:8] not in shown
    assert not any(shown[code.MAILBOX_SIZE :])


def test_text_and_commands_cannot_be_written(hostile: Make) -> None:
    program = hostile()
    for place in (code.TEXT, code.COMMANDS):
        assert program.run("48 89 07", rdi=place) == code.SIGSEGV  # mov [rdi], rax


def test_the_mapper_does_not_touch_the_stubs_own_pages(hostile: Make) -> None:
    """Its filter is the second wall: the monitor never asks for that."""
    for place in (code.TEXT, code.MAILBOX, code.COMMANDS):
        with pytest.raises(StubDied):
            hostile().stub.carry_out([map_pages(place, 1, ALL_RIGHTS, FIRST)])
        with pytest.raises(StubDied):
            hostile().stub.carry_out([stub.unmap(place, 4096)])


def test_the_mapper_maps_shared_memory_of_the_domain_alone(hostile: Make) -> None:
    with pytest.raises(StubDied):
        hostile().stub.carry_out([(code.SYS_MMAP, PROGRAM, 4096, ALL_RIGHTS, 0x32, 0)])  # anonymous and private
    with pytest.raises(StubDied):
        hostile().stub.carry_out([(59, PROGRAM, 0, 0, 0, 0)])  # execve


def test_more_mappings_than_the_host_allows_are_refused_and_the_stub_lives(hostile: Make) -> None:
    program = hostile()
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    if limit > 200_000:
        pytest.skip("this host allows very many mappings")
    error = program.stub.carry_out([map_pages(0x1000_0000 + 0x2000 * n, 1, 1, FIRST) for n in range(limit + 10)])
    assert error
    assert not program.stub.carry_out([*FLUSH, map_pages(PROGRAM, PAGES, ALL_RIGHTS, FIRST)])
    assert program.run("0f 0b") == code.SIGILL


def test_a_stub_may_die_at_any_moment(hostile: Make) -> None:
    program = hostile()
    program.place(bytes.fromhex(ENDLESS))

    def kill() -> None:
        os.kill(program.stub.pid, 9)

    killer = threading.Timer(0.05, kill)
    killer.start()
    with pytest.raises(StubDied):
        program.run()
    killer.join()
    with pytest.raises(StubDied):
        program.stub.carry_out([map_pages(PROGRAM, 1, 1, FIRST)])


def test_a_stub_ends_with_its_monitor(tmp_path: Path) -> None:
    script = "import sys, stubs\nprogram = stubs.Hostile()\nprint(program.stub.pid, flush=True)\n"
    script += "program.place(bytes.fromhex('eb fe'))\nprogram.run()\n"
    folder = str(Path(__file__).parent)
    monitor = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=folder)
    assert monitor.stdout is not None
    pid = int(monitor.stdout.readline())
    descriptor = os.pidfd_open(pid)
    monitor.kill()
    monitor.wait()
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    assert poll.poll(20_000)
    os.close(descriptor)


TRACED = """
import stubs
from xenolith.machine.engines.unicorn.user import code
program = stubs.Hostile()
print("PID", program.stub.pid, flush=True)
for number in (0, 1, 2, 9, 39, 57, 59, 231, -1):
    program.run("0f 05", rax=number)
program.run("0f 0b")
program.run("48 8b 07", rdi=0x12345000)
program.close()
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_an_outer_trace_shows_no_other_system_call(tmp_path: Path) -> None:
    """From the first hand-over on: hand-overs and returns from signals; mmap and munmap of the mapper."""
    log = tmp_path / "trace"
    line = ["strace", "-f", "-qq", "-o", str(log), sys.executable, "-c", TRACED]
    done = subprocess.run(line, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120, check=False)
    if "PID" not in done.stdout:
        pytest.skip(f"strace cannot be used here: {done.stderr[-200:]}")
    pid = int(done.stdout.split()[1])
    calls: dict[int, list[str]] = {}
    for entry in log.read_text().splitlines():
        task, _, what = entry.partition(" ")
        if not what.strip().startswith("<... "):  # the end of a call whose beginning has a line
            calls.setdefault(int(task), []).append(what.strip())
    guests = [task for task, made in calls.items() if made and made[0].startswith("close_range(0, 4294967295")]
    assert guests
    for task, allowed in ((pid, {"getpid", "mmap", "munmap"}), (guests[0], {"getpid", "rt_sigreturn"})):
        made = calls[task]
        begun = max(n for n, what in enumerate(made) if what.startswith("seccomp("))
        for what, then in pairwise(made[begun + 1 :]):
            if what[0].isalpha() and "(" in what and what.partition("(")[0] not in allowed:
                assert then.startswith("--- SIGSYS"), what  # it was not carried out
