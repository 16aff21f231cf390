"""A daemon and its clients over a real socket; the machine behind it is one in memory."""

from __future__ import annotations

import inspect
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from toolstack.fake import DOM0, HOST, UNREADABLE, FakeClient
from xenolith.toolstack.client import (
    Closed,
    ConnectionLost,
    DomainEvent,
    DomainNotFound,
    EventKind,
    EventStream,
    InvalidRequest,
    NotAcknowledged,
    OnProgress,
    Progress,
    ShutdownRequest,
    ToolstackError,
    Trigger,
    every,
    no_progress,
)
from xenolith.toolstack.config.domain import Action, DomainConfig
from xenolith.toolstack.daemon import remote as remote_module
from xenolith.toolstack.daemon import server as daemon_module
from xenolith.toolstack.daemon.protocol import METHODS, Channel, Error, Hello, Request, Welcome, to_bytes
from xenolith.toolstack.daemon.remote import NoDaemon, RemoteClient
from xenolith.toolstack.daemon.run_directory import AlreadyRunning, LostDomain, RunDirectory, default_socket
from xenolith.toolstack.daemon.server import Daemon, shut_guests_down
from xenolith.toolstack.supervisor import Supervisor
from xenolith.toolstack.verbs import forwarding, verbs_of


class Served:
    """A daemon in this process."""

    def __init__(self, directory: Path) -> None:
        self.machine = FakeClient()
        self.rundir = RunDirectory(directory / "control.sock")
        self.rundir.acquire()
        self.supervisor = Supervisor(self.machine, self.rundir.dump_path)
        self.supervisor.pause_between_lives = lambda seconds: False
        self.daemon = Daemon(self.rundir, self.machine, self.supervisor)
        self.thread = threading.Thread(target=self.daemon.serve)
        self.thread.start()

    def client(self) -> RemoteClient:
        return RemoteClient.at(self.rundir.socket_path)

    def raw(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(20)
        connection.connect(str(self.rundir.socket_path))
        return connection

    def close(self) -> None:
        self.daemon.stop()
        self.thread.join()
        self.supervisor.close()
        self.daemon.close()
        self.machine.close()
        self.rundir.release()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path)
    yield served
    served.close()


@pytest.fixture
def remote(served: Served) -> Iterator[RemoteClient]:
    client = served.client()
    yield client
    client.close()


# --- requests --------------------------------------------------------------------------------------------------


def test_everything_that_can_be_looked_at_arrives_as_it_is(served: Served, remote: RemoteClient) -> None:
    served.machine.create(DomainConfig("a", vcpus=2, kernel="/k"))
    assert remote.host() == HOST
    assert remote.domains() == served.machine.domains()
    assert remote.domains()[0] == DOM0
    assert remote.vcpus(1) == served.machine.vcpus(1)
    assert remote.statistics() == served.machine.statistics()
    assert remote.config(1) == served.machine.config(1)
    assert remote.dmesg() == served.machine.dmesg()


def test_everything_that_can_be_done_is_done(served: Served, remote: RemoteClient) -> None:
    domid = remote.create(DomainConfig("a"))
    remote.unpause(domid)
    remote.pause(domid)
    remote.rename(domid, "b")
    remote.sysrq(domid, "h")
    remote.trigger(domid, Trigger.NMI, 0)
    remote.dump_core(domid, Path("/tmp/core"))
    remote.set_config(domid, DomainConfig("c"))
    remote.request_shutdown(domid, ShutdownRequest.REBOOT)
    remote.soft_reset(domid)
    remote.clear_dmesg()
    remote.destroy(domid)
    assert [call[0] for call in served.machine.calls] == [
        "create", "unpause", "pause", "rename", "sysrq", "trigger", "dump_core", "set_config", "request_shutdown",
        "soft_reset", "destroy",
    ]  # fmt: skip
    assert served.machine.calls[6] == ("dump_core", 1, "/tmp/core")
    assert remote.dmesg() == ""


class Garden(ABC):
    """An interface of its own, to see what is made of a definition."""

    @abstractmethod
    def water(self, bed: int, litres: float = 1.5) -> list[str]:
        """Give a bed some water.

        Not every day.
        """

    @abstractmethod
    def grow(self, progress: OnProgress = no_progress) -> EventStream: ...

    def beds(self) -> int:  # no verb
        return 3


def test_a_verb_is_what_its_signature_says() -> None:
    water, grow = verbs_of(Garden).values()
    assert (water.name, water.arguments, water.optional) == ("water", {"bed": int, "litres": float}, {"litres"})
    assert (water.result, water.summary, water.reports_progress) == (list[str], "Give a bed some water.", False)
    assert (grow.arguments, grow.result, grow.reports_progress) == ({}, EventStream, True)


def test_verbs_that_a_class_does_not_define_are_handed_on_as_they_were_called() -> None:
    asked: list[tuple[object, ...]] = []

    @forwarding
    class Distant(Garden):
        def grow(self, progress: OnProgress = no_progress) -> EventStream:
            raise NotImplementedError

        def ask(self, *what: object) -> list[str]:
            asked.append(what)
            return ["wet"]

    garden = Distant()
    assert garden.water(3) == garden.water(litres=2.0, bed=3) == ["wet"]
    water = verbs_of(Garden)["water"]
    assert asked == [(water, {"bed": 3, "litres": 1.5}, None), (water, {"bed": 3, "litres": 2.0}, None)]
    with pytest.raises(TypeError, match="'bed'"):
        garden.water()  # type: ignore[call-arg]
    with pytest.raises(NotImplementedError):
        garden.grow()


def test_every_request_of_the_protocol_is_a_method_at_the_other_end(remote: RemoteClient) -> None:
    assert {"dump_core", "open_console", "supervise", "watch"} <= set(METHODS)
    for name, verb in METHODS.items():
        assert inspect.signature(getattr(remote, name)) == verb.signature


def test_errors_arrive_with_their_kind_and_number(served: Served, remote: RemoteClient) -> None:
    with pytest.raises(DomainNotFound, match="Domain 99 does not exist") as missing:
        remote.pause(99)
    assert (missing.value.domid, missing.value.rc) == (99, -21)
    with pytest.raises(InvalidRequest, match="already exists"):
        remote.create(DomainConfig("Domain-0"))
    with pytest.raises(ToolstackError, match="No such file"):
        remote.create(DomainConfig("a", kernel=UNREADABLE))
    served.machine.create(DomainConfig("deaf"))
    served.machine.guests[1].acknowledges = False
    with pytest.raises(NotAcknowledged):
        remote.request_shutdown(1, ShutdownRequest.POWEROFF)
    assert remote.host() == HOST  # the connection is as good as before


def test_progress_is_reported_while_a_domain_is_made(remote: RemoteClient) -> None:
    seen: list[Progress] = []
    remote.create(DomainConfig("a"), seen.append)
    assert seen == [Progress("loading the kernel", done, 2) for done in range(3)]


def test_a_bug_in_the_machine_is_reported_and_ends_nothing(served: Served, remote: RemoteClient) -> None:
    def broken() -> str:
        raise ZeroDivisionError("oops")

    served.machine.dmesg = broken  # type: ignore[method-assign]
    with pytest.raises(ToolstackError, match="which is a bug"):
        remote.dmesg()
    assert remote.host() == HOST


# --- streams ---------------------------------------------------------------------------------------------------


def test_events_reach_every_subscriber(served: Served, remote: RemoteClient) -> None:
    streams = [remote.subscribe(), served.client().subscribe()]
    domid = remote.create(DomainConfig("a"))
    served.machine.end(domid, 3)
    remote.destroy(domid)
    for stream in streams:
        assert [stream.get(20) for _ in range(3)] == [
            DomainEvent(EventKind.CREATED, domid),
            DomainEvent(EventKind.SHUTDOWN, domid, reason=3),
            DomainEvent(EventKind.DESTROYED, domid),
        ]
        stream.close()


def test_a_supervised_domain_is_followed_over_the_socket(served: Served, remote: RemoteClient) -> None:
    domid = remote.create(DomainConfig("a", on_crash=Action.RESTART))
    remote.supervise(domid)
    events = remote.watch(domid)
    remote.unpause(domid)
    served.machine.end(domid, 3)
    kinds = [event.kind for event in every(events) if _end_second_life(served, event)]
    assert kinds[0] is EventKind.SHUTDOWN
    assert EventKind.REBUILT in kinds
    assert kinds[-1] is EventKind.RELEASED


def _end_second_life(served: Served, event: DomainEvent) -> bool:
    if event.kind is EventKind.REBUILT and event.successor is not None:
        served.machine.end(event.successor, 0)
    return True


def test_watching_a_domain_that_nobody_supervises_is_an_error(remote: RemoteClient) -> None:
    with pytest.raises(ToolstackError, match="not supervised"):
        remote.watch(5)


def test_a_console_carries_both_directions_until_it_ends(served: Served, remote: RemoteClient) -> None:
    domid = remote.create(DomainConfig("a"))
    console = served.machine.guests[domid].console
    stream = remote.open_console(domid)
    console.print(b"login: ")
    assert stream.read(20) == b"login: "
    stream.write(b"root\r")
    with console.changed:
        assert console.changed.wait_for(lambda: bytes(console.typed) == b"root\r", 20)
    assert stream.read(0) is None
    remote.destroy(domid)
    assert stream.read(20) == b""
    stream.close()


def test_closing_a_remote_console_closes_the_one_behind_it(served: Served, remote: RemoteClient) -> None:
    domid = remote.create(DomainConfig("a"))
    console = served.machine.guests[domid].console
    remote.open_console(domid).close()
    with console.changed:
        assert console.changed.wait_for(lambda: console.closed, 20)


# --- peers that misbehave --------------------------------------------------------------------------------------


def test_the_socket_is_for_its_user_only(served: Served) -> None:
    assert stat.S_IMODE(served.rundir.socket_path.stat().st_mode) == 0o600
    assert stat.S_IMODE(served.rundir.path.stat().st_mode) == 0o700


class Credentials(struct.Struct):
    """What the kernel would say about a process of user 666."""

    def unpack(self, data: object) -> tuple[int, int, int]:
        return (1, 666, 666)


def test_another_user_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon_module, "PEER_CREDENTIALS", Credentials("3i"))
    with pytest.raises(ToolstackError, match=f"serves user {os.getuid()} only"):
        served.client()


def test_a_client_does_not_talk_to_somebody_elses_daemon(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module.os, "getuid", lambda: 4711)
    monkeypatch.setattr(remote_module, "PEER_CREDENTIALS", Credentials("3i"))
    with pytest.raises(ConnectionLost, match="belongs to user 666"):
        served.client()


def test_too_many_connections_are_refused_with_a_reason(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon_module, "MAX_CONNECTIONS", 2)
    clients = [served.client(), served.client()]
    with pytest.raises(ToolstackError, match="2 connections are open already"):
        served.client()
    for client in clients:
        client.close()


def test_a_client_of_another_version_is_told_so(served: Served) -> None:
    with served.raw() as connection:
        channel = Channel(connection)
        channel.send(Hello(999))
        answer = channel.receive()
    assert isinstance(answer, Error)
    assert "version 999" in answer.text


@pytest.mark.parametrize(
    "nonsense",
    [
        struct.pack(">I", 0xFFFFFFFF),
        struct.pack(">I", 5) + b"hello",
        to_bytes(Request("host")),
        b"GET / HTTP/1.1\r\n\r\n",
        b"",
        b"\0",
    ],
)
def test_a_peer_that_speaks_nonsense_loses_its_connection_and_nobody_elses(
    served: Served, remote: RemoteClient, nonsense: bytes
) -> None:
    with served.raw() as connection:
        connection.sendall(nonsense)
        connection.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):  # so it ends when the daemon had not read all
            while connection.recv(4096):
                pass
    assert remote.host() == HOST


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        (Request("format_disk"), "no request 'format_disk'"),
        (Request("pause"), "lacks argument 'domid'"),
        (Request("pause", {"domid": "1"}), "must be of type int"),
        (Request("pause", {"domid": True}), "must be of type int"),
        (Request("host", {"x": 1}), "has no argument 'x'"),
        (Request("trigger", {"domid": 1, "trigger": "zap", "vcpu": 0}), "must be one of nmi"),
        (Request("create", {"config": {"name": "a", "disks": [{"colour": "red"}]}}), "has no field 'colour'"),
    ],
)
def test_a_wrong_request_is_answered_with_what_is_wrong(served: Served, request_: Request, complaint: str) -> None:
    with served.raw() as connection:
        channel = Channel(connection)
        channel.send(Hello(1))
        assert isinstance(channel.receive(), Welcome)
        channel.send(request_)
        answer = channel.receive()
        assert isinstance(answer, Error)
        assert complaint in answer.text
        channel.send(Request("dmesg"))
        assert channel.receive() is not None
    assert served.machine.guests == {}


def test_a_peer_that_never_reads_holds_nobody_up(served: Served, remote: RemoteClient) -> None:
    """It subscribes and then sleeps; events pile up, are dropped, and everybody else goes on."""
    with served.raw() as connection:
        channel = Channel(connection)
        channel.send(Hello(1))
        channel.receive()
        channel.send(Request("subscribe"))
        for number in range(3000):
            domid = served.machine.create(DomainConfig(f"d{number}"))
            served.machine.destroy(domid)
        assert remote.host() == HOST


def test_a_client_that_vanishes_leaves_no_thread_behind(served: Served, remote: RemoteClient) -> None:
    remote.create(DomainConfig("a"))
    before = set(threading.enumerate())
    for method, arguments in (("subscribe", {}), ("open_console", {"domid": 1, "number": 0})):
        with served.raw() as connection:
            channel = Channel(connection)
            channel.send(Hello(1))
            channel.receive()
            channel.send(Request(method, arguments))
            channel.receive()
    left = set(threading.enumerate()) - before
    for thread in left:
        while thread.ident is None:
            os.sched_yield()  # it is being started at this moment
        thread.join(20)
    assert not any(thread.is_alive() for thread in left)


def test_many_clients_at_once_are_all_served(served: Served) -> None:
    errors: list[Exception] = []

    def work(number: int) -> None:
        try:
            client = served.client()
            for turn in range(5):
                domid = client.create(DomainConfig(f"c{number}-{turn}"))
                client.unpause(domid)
                client.destroy(domid)
            client.close()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len([call for call in served.machine.calls if call[0] == "destroy"]) == 100


# --- beginnings and ends ---------------------------------------------------------------------------------------


def test_without_a_daemon_connecting_says_so(tmp_path: Path) -> None:
    with pytest.raises(NoDaemon, match="no daemon listens"):
        RemoteClient.at(tmp_path / "control.sock")


def test_only_one_daemon_serves_a_socket(served: Served) -> None:
    with pytest.raises(AlreadyRunning, match="already"):
        RunDirectory(served.rundir.socket_path).acquire()


def test_a_host_that_gives_no_thread_loses_the_peer_and_not_the_daemon(
    served: Served, remote: RemoteClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name.startswith("peer"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        with pytest.raises(ConnectionLost):
            served.client()
    served.client().close()


def test_a_new_domain_whose_maker_has_gone_is_taken_away_again(served: Served, remote: RemoteClient) -> None:
    """Somebody interrupted `xl create` while it was at work."""
    events = remote.subscribe()
    with served.raw() as connection:
        channel = Channel(connection)
        channel.send(Hello(1))
        channel.receive()
        serve = served.machine.create

        def slow_create(**arguments: Any) -> int:
            channel.close()
            return serve(**arguments)

        served.machine.create = slow_create  # type: ignore[assignment, method-assign]
        channel.send(Request("create", {"config": {"name": "a"}}))
        assert [getattr(events.get(20), "kind", None) for _ in range(2)] == [EventKind.CREATED, EventKind.DESTROYED]
    assert [domain.domid for domain in remote.domains()] == [0]
    events.close()


def test_nothing_is_made_beside_a_file_that_is_no_socket(tmp_path: Path) -> None:
    (tmp_path / "web.cfg").write_text("mine")
    with pytest.raises(ToolstackError, match="is no socket but a file; it is left as it is"):
        RunDirectory(tmp_path / "web.cfg").acquire()
    assert [path.name for path in tmp_path.iterdir()] == ["web.cfg"]


def test_a_directory_of_somebodys_own_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "web.d").mkdir()
    (tmp_path / "web.d" / "state.json").write_text("mine")
    with pytest.raises(ToolstackError, match="holds something else"):
        RunDirectory(tmp_path / "web").acquire()
    assert (tmp_path / "web.d" / "state.json").read_text() == "mine"


def test_a_daemon_that_is_refused_leaves_the_other_ones_state(served: Served) -> None:
    second = RunDirectory(served.rundir.socket_path)
    with pytest.raises(AlreadyRunning):
        second.acquire()
    second.release()
    assert (served.rundir.path / "state.json").exists()


@pytest.mark.parametrize("where", ["/proc/x.sock", "/nope/typo/x.sock"])
def test_a_directory_that_cannot_be_made_is_named(where: str) -> None:
    with pytest.raises(ToolstackError, match=r"^the directory /\S+ cannot be used: No such file"):
        RunDirectory(Path(where)).acquire()


def test_use_after_closing_is_an_error(remote: RemoteClient) -> None:
    remote.close()
    for use in (remote.host, remote.subscribe, lambda: remote.pause(1)):
        with pytest.raises(Closed, match="was closed"):
            use()


def test_a_directory_that_others_can_change_is_not_used(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(ToolstackError, match="can be changed by others"):
        RunDirectory(tmp_path / "control.sock").acquire()


def test_the_socket_path_comes_from_the_environment_or_the_runtime_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 7)
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) in writable)
    writable: set[str] = set()
    monkeypatch.setenv("XENOLITH_SOCKET", "/a/b")
    assert default_socket() == Path("/a/b")
    monkeypatch.delenv("XENOLITH_SOCKET")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/var/session")
    assert default_socket() == Path("/var/session/xenolith/control.sock")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert default_socket().parent.name == "xenolith-7"
    writable.add("/run/user/7")
    assert default_socket() == Path("/run/user/7/xenolith/control.sock")


def test_roots_commands_find_one_daemon_from_a_login_shell_and_from_a_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 0)
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    monkeypatch.delenv("XENOLITH_SOCKET", raising=False)
    for session in ("/run/user/0", ""):
        monkeypatch.setenv("XDG_RUNTIME_DIR", session)
        assert default_socket() == Path("/run/xenolith/control.sock")


def test_guests_that_do_not_power_off_in_time_are_destroyed() -> None:
    machine = FakeClient()
    for name in ("willing", "deaf"):
        machine.unpause(machine.create(DomainConfig(name)))
    machine.guests[2].acknowledges = False
    shut_guests_down(machine, seconds=0.2)
    assert machine.guests == {}
    assert sorted(call for call in machine.calls if call[0] == "request_shutdown") == [
        ("request_shutdown", 1, "poweroff"),
        ("request_shutdown", 2, "poweroff"),
    ]


PROGRAM = """
import signal, sys
from pathlib import Path
from toolstack.fake import FakeClient
from xenolith.toolstack.daemon.server import Daemon, shut_guests_down
from xenolith.toolstack.daemon.run_directory import RunDirectory
from xenolith.toolstack.supervisor import Supervisor

directory = RunDirectory(Path(sys.argv[1]))
leftovers = directory.acquire()
machine = FakeClient()
supervisor = Supervisor(machine, directory.dump_path)
daemon = Daemon(directory, machine, supervisor)
signal.signal(signal.SIGTERM, daemon.stop)
print(leftovers.describe() if leftovers else "nothing was left", flush=True)
daemon.serve()
supervisor.close()
shut_guests_down(machine)
daemon.close()
directory.release()
print([call for call in machine.calls if call[0] == "request_shutdown"], flush=True)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], tuple[subprocess.Popen[str], str]]]:
    """Starts daemon processes at one socket; gives each with its first line."""
    started: list[subprocess.Popen[str]] = []

    def start_one() -> tuple[subprocess.Popen[str], str]:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "control.sock")],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        )
        started.append(process)
        assert process.stdout is not None
        return process, process.stdout.readline().rstrip("\n")

    yield start_one
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_after_sigkill_the_next_daemon_says_what_was_lost_and_works(
    start: Callable[[], tuple[subprocess.Popen[str], str]], tmp_path: Path
) -> None:
    first, words = start()
    assert words == "nothing was left"
    client = RemoteClient.at(tmp_path / "control.sock")
    events = client.subscribe()
    client.create(DomainConfig("web"))
    client.create(DomainConfig("db"))
    client.destroy(1)
    client.create(DomainConfig("mail"))
    assert [events.get(20) is not None for _ in range(4)] == [True] * 4
    state = RunDirectory(tmp_path / "control.sock")
    wanted = (LostDomain(2, "db"), LostDomain(3, "mail"))
    while (left := state._leftovers()) is None or left.domains != wanted:
        os.sched_yield()  # the state file is written after the event was told
    first.send_signal(signal.SIGKILL)
    first.wait()
    with pytest.raises(ConnectionLost):
        client.domains()
    _, words = start()
    assert words == (
        f"The daemon that ran before (pid {first.pid}) was killed; its domains are lost: db (domid 2), mail (domid 3)."
    )
    assert [domain.name for domain in RemoteClient.at(tmp_path / "control.sock").domains()] == ["Domain-0"]


def test_sigterm_powers_the_guests_off_and_leaves_nothing_behind(
    start: Callable[[], tuple[subprocess.Popen[str], str]], tmp_path: Path
) -> None:
    process, _ = start()
    client = RemoteClient.at(tmp_path / "control.sock")
    domid = client.create(DomainConfig("web", on_poweroff=Action.RESTART))
    client.supervise(domid)
    client.unpause(domid)
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "[('request_shutdown', 1, 'poweroff')]\n"
    assert process.wait() == 0
    assert not (tmp_path / "control.sock").exists()
    _, words = start()
    assert words == "nothing was left"
