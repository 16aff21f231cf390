"""Working inside a stock Debian guest: commands by the agent, in their own process and by the daemon."""

from __future__ import annotations

import asyncio
import hashlib
import os
import pty
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import xenolith
import xenolith.aio
from people import Person, person_in
from xenolith.toolstack.api import Domain, Machine
from xenolith.toolstack.client import ProcessEnd, ProcessOutput

from .conftest import DEADLINE_SECONDS

pytestmark = pytest.mark.slow


@pytest.fixture
def machine(engine_name: str) -> Iterator[Machine]:
    with xenolith.power_on(400, engine_name) as machine:
        yield machine


def debian(machine: Machine) -> Domain:
    domain = machine.create(xenolith.debian("inside", memory_mib=128))
    domain.unpause()
    return domain


def test_commands_files_and_their_ends_inside_a_guest(machine: Machine, tmp_path: Path) -> None:
    domain = debian(machine)
    done = domain.run("echo out; echo err >&2; exit 3", timeout=DEADLINE_SECONDS)
    assert (done.exit_status, done.stdout, done.stderr, done.output) == (3, b"out\n", b"err\n", b"out\nerr\n")
    data = os.urandom(200_000)
    assert domain.run(["sha256sum"], input=data).stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()
    assert domain.run(["cat"], input=data).stdout == data  # more than any buffer on the way
    assert domain.run("kill -9 $$").exit_status == 137
    ends = [domain.run([name], workdir=where) for name, where in (("nothing", "/"), ("/etc", "/"), ("ls", "/none"))]
    assert [(done.exit_status, bool(done.message)) for done in ends] == [(127, True), (126, True), (126, True)]
    done = domain.run(
        'echo "$A-$PWD-$(id -u)-$(id -g)-$HOME-$(ulimit -n)"',
        env={"A": "b c"},
        workdir="/tmp",
        user="5:6",
        limits={"nofile": 99},
    )
    assert done.stdout == b"b c-/tmp-5-6-/-99\n"
    assert domain.run(["id", "-u"], user="nobody").exit_status == 126
    with pytest.raises(xenolith.Timeout):
        domain.run("sleep 1000 & sleep 1000", timeout=0.5)
    assert domain.run("pidof sleep").stdout == b""

    # Many at once, one of which nobody reads.
    flood = domain.start("cat /dev/zero")
    others = [domain.start(f"sleep 0.2; echo {number}") for number in range(20)]
    for number, process in enumerate(others):
        assert process.read(DEADLINE_SECONDS) == ProcessOutput(b"%d\n" % number)
        assert process.read(DEADLINE_SECONDS) == ProcessEnd(0)
    flood.close()
    assert domain.run("while pidof cat; do sleep 0.1; done").exit_status == 0

    # A terminal.
    shell = domain.start(
        ["sh", "-c", "trap 'stty size; exit 7' WINCH; stty size; tty; while :; do sleep 0.05; done"], terminal=(30, 70)
    )
    said = b""
    while b"/dev/pts/" not in said:
        item = shell.read(DEADLINE_SECONDS)
        assert isinstance(item, ProcessOutput), (said, item)
        said += item.data
    shell.resize(31, 71)
    while isinstance(item := shell.read(DEADLINE_SECONDS), ProcessOutput):
        said += item.data
    assert said.startswith(b"30 70\r\n/dev/pts/")
    assert said.endswith(b"31 71\r\n")
    assert item == ProcessEnd(7)

    # Files.
    domain.files.write("/tmp/f", b"\0\1\2", mode=0o600)
    assert domain.files.read("/tmp/f") == b"\0\1\2"
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "run").write_bytes(data)
    (source / "sub" / "run").chmod(0o750)
    (source / "link").symlink_to("sub/run")
    domain.files.put(source, "/tmp")
    assert domain.run(["sha256sum", "/tmp/source/link"]).stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()
    domain.files.get("/tmp/source", tmp_path / "back")
    assert (tmp_path / "back" / "link").read_bytes() == data
    assert stat.S_IMODE((tmp_path / "back" / "sub" / "run").stat().st_mode) == 0o750
    for wrong in ("/none/at/all", "/etc/"):
        with pytest.raises(xenolith.ToolstackError):
            domain.files.put(tmp_path / "nothing", wrong)
    with pytest.raises(xenolith.ToolstackError, match="No such file"):
        domain.files.read("/nothing")
    with pytest.raises(xenolith.ToolstackError, match="cannot be read in the guest"):
        domain.files.get("/nothing", tmp_path)

    # The end of the guest is the end of what runs in it.
    waiting = domain.start("sleep 1000")
    domain.shutdown()
    end = waiting.read(DEADLINE_SECONDS)
    assert isinstance(end, ProcessEnd)
    domain.wait(timeout=DEADLINE_SECONDS)
    with pytest.raises(xenolith.ToolstackError, match="has shut down"):
        domain.run("true")


def test_a_command_goes_on_in_a_domain_that_is_saved_and_its_agent_answers_where_it_is_restored(
    machine: Machine, tmp_path: Path
) -> None:
    domain = debian(machine)
    domain.run("(while :; do echo x >>/tmp/beat; sleep 0.05; done) >/dev/null 2>&1 &")
    busy = domain.start("cat /dev/zero")  # in the middle of a frame, most likely
    machine.client.save(domain.domid, tmp_path / "saved")
    end = busy.read(DEADLINE_SECONDS)
    while isinstance(end, ProcessOutput):
        end = busy.read(DEADLINE_SECONDS)
    assert isinstance(end, ProcessEnd)
    restored = Domain(machine, machine.client.restore(tmp_path / "saved"))
    restored.unpause()
    line = "n=$(wc -l </tmp/beat); while [ $(wc -l </tmp/beat) = $n ]; do sleep 0.05; done; echo on"
    assert restored.run(line, timeout=DEADLINE_SECONDS).stdout == b"on\n"
    restored.shutdown()
    restored.wait(timeout=DEADLINE_SECONDS)


def test_clones_are_told_who_they_are_before_they_do_anything(machine: Machine) -> None:
    domain = debian(machine)
    line = "hostname; cat /etc/machine-id; od -An -tx1 -N32 /dev/urandom"
    domain.run(line, timeout=DEADLINE_SECONDS)
    names = ["First One!", "second", "third"]
    clones = [Domain(machine, domid) for domid in machine.client.clone(domain.domid, names)]
    with pytest.raises(xenolith.ToolstackError, match="is paused"):
        clones[0].run("true")
    for clone in clones[:2]:
        clone.unpause()
    (young,) = (Domain(machine, domid) for domid in machine.client.clone(clones[0].domid, ["young"]))
    for clone in (clones[2], young):
        clone.unpause()
    said = [each.run(line, timeout=DEADLINE_SECONDS).stdout.split(b"\n", 2) for each in (domain, *clones, young)]
    assert [name for name, _, _ in said] == [b"xenolith", b"first-one", b"second", b"third", b"young"]
    assert len({identity for _, identity, _ in said[1:]}) == 4
    assert len({numbers for _, _, numbers in said}) == 5
    for each in (domain, *clones, young):
        each.destroy()


def test_asyncio_runs_several_commands_and_ends_one_that_is_cancelled() -> None:
    async def work() -> None:
        async with await xenolith.aio.power_on(256) as machine:
            domain = await machine.create(xenolith.debian("inside", memory_mib=128))
            await domain.unpause()
            await domain.run("true", timeout=DEADLINE_SECONDS)
            done = await asyncio.gather(*(domain.run(f"echo {n}") for n in range(8)))
            assert [each.stdout for each in done] == [b"%d\n" % n for n in range(8)]
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await domain.run("sleep 1000")
            assert (await domain.run("while pidof sleep; do sleep 0.1; done; echo gone")).stdout.endswith(b"gone\n")
            await domain.files.write("/tmp/f", "text")
            assert await domain.files.read("/tmp/f") == b"text"

    asyncio.run(work())


@pytest.fixture
def person(tmp_path: Path) -> Iterator[Person]:
    with person_in(tmp_path) as person:
        yield person


def test_exec_cp_logs_ps_and_wait_as_a_person_uses_them(person: Person) -> None:
    def xenolith_(*arguments: str, **more: object) -> subprocess.CompletedProcess[bytes]:
        line = [sys.executable, "-m", "xenolith", *arguments]
        return subprocess.run(
            line, capture_output=True, timeout=DEADLINE_SECONDS, cwd=person.directory, env=person.environment, **more
        )  # type: ignore[call-overload,no-any-return]

    assert xenolith_("guest", "debian", "--cfg", "web.cfg").returncode == 0
    assert person.xl("create", "-q", "web.cfg", "memory=128", 'on_poweroff="preserve"').returncode == 0
    done = xenolith_(
        "exec", "-i", "--env", "A=1", "web", "--", "sh", "-c", "cat; echo $A >&2; exit 5", input=b"in\0put"
    )
    assert (done.returncode, done.stdout, done.stderr) == (5, b"in\0put", b"1\n")
    done = xenolith_("exec", "--timeout", "0.3", "web", "sleep", "1000")
    assert (done.returncode, done.stderr) == (119, b"xenolith: 0.3 seconds are over\n")
    assert xenolith_("exec", "web", "nonsense").returncode == 127
    assert xenolith_("exec", "nobody", "true").returncode == 125

    # A signal goes on to the command, which sees to it.
    line = [
        sys.executable,
        "-m",
        "xenolith",
        "exec",
        "web",
        "--",
        "sh",
        "-c",
        "trap 'echo got; exit 9' INT; echo ready; while :; do sleep 0.05; done",
    ]
    with subprocess.Popen(line, stdout=subprocess.PIPE, cwd=person.directory, env=person.environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == b"got\n"
        assert process.wait(DEADLINE_SECONDS) == 9

    # A terminal: what is typed is edited and obeyed there.
    ours, theirs = pty.openpty()
    line = [
        sys.executable,
        "-m",
        "xenolith",
        "exec",
        "-it",
        "web",
        "--",
        "sh",
        "-c",
        "tty; read x; echo got $x; sleep 1000",
    ]
    with subprocess.Popen(line, stdin=theirs, stdout=theirs, cwd=person.directory, env=person.environment) as process:
        os.close(theirs)
        said = b""
        while b"/dev/pts/" not in said:
            said += os.read(ours, 4096)
        os.write(ours, b"worf\x7fd\r")
        while b"got word" not in said:
            said += os.read(ours, 4096)
        os.write(ours, b"\x03")
        assert process.wait(DEADLINE_SECONDS) == 130
    os.close(ours)

    (person.directory / "tree").mkdir()
    (person.directory / "tree" / "leaf").write_text("green")
    assert xenolith_("cp", "tree", "web:/tmp").returncode == 0
    assert xenolith_("cp", "web:/tmp/tree", "back").returncode == 0
    assert (person.directory / "back" / "leaf").read_text() == "green"
    done = xenolith_("cp", "web:/none", "x")
    assert (done.returncode, b"cannot be read in the guest" in done.stderr) == (1, True)
    assert b"/etc/agent /dev/hvc1" in xenolith_("ps", "web").stdout
    assert b"~ # " in xenolith_("logs", "web").stdout
    assert person.xl("shutdown", "-w", "web").returncode == 0
    assert xenolith_("wait", "web").stdout == b"poweroff\n"
