"""The commands as a person types them: real processes, a daemon started on demand, and small guests that run."""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from people import XL, Person, person_in


@pytest.fixture
def person(tmp_path: Path) -> Iterator[Person]:
    with person_in(tmp_path) as person:
        yield person


def test_a_guest_that_prints_and_powers_off_is_followed_to_its_end(person: Person) -> None:
    done = person.xl("create", "-F", person.configuration("hello", "hello.elf"))
    assert re.sub(r"pid \d+", "pid N", done.stderr).splitlines() == [
        "Parsing config from hello.cfg",
        "Waiting for domain hello (domid 1) to die [pid N]",
        "Domain 1 has shut down, reason code 0 0x0",
        "Action for shutdown reason code 0 is destroy",
        "Domain 1 needs to be cleaned up: destroying the domain",
        "Done. Exiting now",
    ]
    assert done.returncode == 0
    assert person.xl("domid", "hello").returncode == 1


def test_the_console_of_a_new_domain_appears_on_the_terminal(person: Person) -> None:
    ending = person.configuration("crash", "crash.elf", extra="shutdown reason=0")
    screen = person.xl_on_a_terminal("create", "-q", "-c", ending)
    assert "ending: shutdown reason=0\n" in screen


def test_a_crash_with_rename_restart_leaves_a_corpse_and_a_successor(person: Person) -> None:
    config = person.configuration("c", "crash.elf", extra="no-handler", on_crash="rename-restart")
    person.xl("create", "-F", config)
    rows = [line.split() for line in person.xl("list").stdout.splitlines()[2:]]
    assert [row[4] for row in rows] == ["---sc-", "---sc-"]
    assert re.fullmatch(r"c-\d{8}T\d{4}Z", rows[0][0])
    assert rows[1][0] == "c"


def test_a_preserved_domain_is_still_there_for_the_next_command(person: Person) -> None:
    config = person.configuration("kept", "hello.elf", on_poweroff="preserve")
    assert person.xl("create", "-F", config).returncode == 0
    assert person.xl("domid", "kept").stdout == "1\n"
    assert person.xl("rename", "kept", "corpse").returncode == 0
    assert person.xl("domname", "1").stdout == "corpse\n"
    assert person.xl("create", "-q", config, 'name="corpse"').returncode == 3
    assert person.xl("destroy", "corpse").returncode == 0
    assert person.xl("list", "corpse").stderr == "corpse is an invalid domain identifier (rc=-6)\n"


def test_a_kernel_that_is_none_is_refused_with_its_name(person: Person) -> None:
    (person.directory / "text").write_text("not a kernel")
    done = person.xl("create", "-q", "/dev/null", 'name="x"', 'kernel="text"')
    assert done.returncode == 3
    assert "text" in done.stderr


def test_what_a_killed_daemon_had_is_told_by_the_next_command(person: Person) -> None:
    person.xl("create", "-F", person.configuration("kept", "hello.elf", on_poweroff="preserve"))
    killed = person.daemon_pid()
    person.end_daemon(signal.SIGKILL)
    done = person.xl("list")
    assert done.stderr == (
        f"xenolith: The daemon that ran before (pid {killed}) was killed; its domains are lost: kept (domid 1).\n"
    )
    assert len(done.stdout.splitlines()) == 2


def test_sigterm_ends_the_daemon_and_leaves_no_socket(person: Person) -> None:
    person.xl("create", "-F", person.configuration("kept", "hello.elf", on_poweroff="preserve"))
    person.end_daemon(signal.SIGTERM)
    assert not person.socket.exists()
    assert [entry["event"] for entry in person.log()][-1] == "stopped"


def test_a_link_by_the_name_of_xl_is_xl(person: Person) -> None:
    """Its usage and statuses are xl's and not those of `xenolith`, whatever the program behind the link."""
    link = person.directory / "xl"
    link.write_text(f"#!{sys.executable}\nfrom xenolith.cli.entry import xenolith\nxenolith()\n")
    link.chmod(0o755)
    person.configuration("hello", "hello.elf")

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        directory, environment = person.directory, person.environment
        return subprocess.run([link, *words], cwd=directory, env=environment, capture_output=True, text=True)

    bare = call()
    assert (bare.returncode, bare.stdout.splitlines()[0]) == (1, "Usage xl [-vfNtT] <subcommand> [args]")
    dry = call("-N", "create", "hello.cfg")
    assert dry.returncode == 0 and '"name": "hello"' in dry.stdout
    assert call("bogus").returncode == 1
    assert not person.socket.exists()  # none of these needs a daemon
    assert call("--socket", str(person.socket), "domname", "0").stdout == "Domain-0\n"


@pytest.mark.parametrize("kind", ["file", "symbolic link", "FIFO"])
def test_a_socket_path_that_is_none_is_left_as_it_is(person: Person, kind: str) -> None:
    path = person.directory / "web.cfg"
    if kind == "FIFO":
        os.mkfifo(path)
    else:
        (person.directory / "real").write_text("mine")
        path.symlink_to("real") if kind == "symbolic link" else path.write_text("mine")
    before = path.lstat().st_ino, path.lstat().st_mtime_ns
    person.environment["XENOLITH_SOCKET"] = "web.cfg"
    done = person.xl("list")
    assert (done.returncode, done.stdout) == (1, "")
    assert "is no socket but a " in done.stderr and done.stderr.count("\n") == 1
    assert (path.lstat().st_ino, path.lstat().st_mtime_ns) == before
    assert not (person.directory / "web.cfg.d").exists()


def test_a_machine_that_is_new_at_a_chosen_place_is_told_of(person: Person) -> None:
    assert "there was no machine at" in person.xl("list").stderr
    assert person.xl("list").stderr == ""


@pytest.mark.parametrize(("output", "words"), [("/dev/full", "No space left on device"), ("closed", "Bad file")])
def test_output_that_cannot_be_written_is_a_failure(person: Person, output: str, words: str) -> None:
    redirection = ">&-" if output == "closed" else f">{output}"
    done = subprocess.run(
        ["sh", "-c", f'"$@" {redirection}', "sh", *XL, "help"],
        env=person.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("xl: cannot write the output: ") and words in done.stderr
    assert done.stderr.count("\n") == 1


def test_output_into_a_pipe_that_does_not_block_is_all_there(person: Person) -> None:
    reading, writing = os.pipe2(os.O_NONBLOCK)
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writing, b"x" * 4096)  # it is full before the command begins
    process = subprocess.Popen(
        [sys.executable, "-c", "from xenolith.cli.entry import xl; xl()", "help"],
        env=person.environment,
        stdout=writing,
        stderr=subprocess.PIPE,
    )
    os.close(writing)
    os.set_blocking(reading, True)
    with open(reading, "rb") as pipe:
        printed = pipe.read()
    assert printed == b"x" * 4096 + person.xl("help").stdout.encode()
    assert (process.communicate()[1], process.returncode) == (b"", 0)


def test_a_reader_that_has_seen_enough_ends_a_command_quietly(person: Person) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*XL, "help"], env=person.environment, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("limit", ["v 40000", "v 120000", "f 8"])
def test_what_the_host_does_not_give_is_a_sentence(person: Person, limit: str) -> None:
    program = [sys.executable, "-c", "from xenolith.cli.entry import xl; xl()", "list"]
    done = subprocess.run(
        ["sh", "-c", f'ulimit -{limit}; "$@"', "sh", *program], env=person.environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_ctrl_c_while_the_command_is_loaded_ends_it_without_a_word(person: Person) -> None:
    """A library of ours is replaced by one in whose place somebody types Ctrl-C."""
    typing = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nimport nonsense\n"
    (person.directory / "lark.py").write_text(typing)
    done = subprocess.run(
        ["env", "--default-signal=INT", *XL, "list"],
        env=person.environment | {"PYTHONPATH": str(person.directory)},
        capture_output=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_ctrl_c_while_a_daemon_is_started_leaves_none(person: Person) -> None:
    started = person.directory / "started"
    os.mkfifo(started)
    (person.directory / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if '--ready-fd' in sys.orig_argv:\n"
        f"    open({str(started)!r}, 'w').write(str(os.getpid()))\n"
        "    signal.pause()\n"
    )
    command = subprocess.Popen(
        ["env", "--default-signal=INT", *XL, "list"],
        env=person.environment | {"PYTHONPATH": str(person.directory)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    daemon = os.pidfd_open(int(started.read_text()))
    command.send_signal(signal.SIGINT)
    assert (command.communicate()[0].strip(), command.returncode) == (b"", 130)
    assert select.select([daemon], [], [], 0)[0], "the daemon has ended too"
    os.close(daemon)


def test_engine_memory_and_scheduler_reach_the_daemon_that_a_command_starts(person: Person) -> None:
    person.environment |= {"XENOLITH_ENGINE": "unicorn", "XENOLITH_MEMORY": "64", "XENOLITH_SCHEDULER": "bvt"}
    assert person.xl("info", "engine").stdout == "unicorn\n"
    assert person.xl("info", "xen_scheduler").stdout == "bvt\n"
    assert 64 <= int(person.xl("info", "total_memory").stdout) < 128
    person.end_daemon(signal.SIGTERM)
    person.environment["XENOLITH_ENGINE"] = "steam"
    refused = person.xl("info", "engine")
    assert refused.returncode == 1 and "'steam' is not one of" in refused.stderr


def test_a_short_lived_guest_can_be_watched_by_name(person: Person) -> None:
    person.xl("create", "-q", person.configuration("hello", "hello.elf"))
    person.wait_for("list", shows="Domain-0")
    gone = time.monotonic() + 60
    while person.xl("domid", "hello").returncode == 0:
        assert time.monotonic() < gone
    done = person.xl("console", "hello")
    assert done.returncode == 0 and "hello from a PV guest" in done.stdout


def test_commands_at_the_same_time_start_one_daemon(person: Person) -> None:
    together = [
        subprocess.Popen([*XL, "domname", "0"], env=person.environment, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    assert [process.communicate()[0] for process in together] == ["Domain-0\n"] * 4
    assert [entry["event"] for entry in person.log()].count("serving") == 1
