"""The toolstack of a daemon: Client and Supervision over its socket.

Simple requests share one connection, one after the other; what takes long or streams gets a connection of its own, so
that a program may do both at once. `RemoteClient.connect` starts the daemon if none listens.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Final

from xenolith.toolstack.client import (
    Client,
    ConnectionLost,
    ConsoleStream,
    DomainEvent,
    DomainInfo,
    DomainStatistics,
    EventStream,
    HostInfo,
    OnProgress,
    Progress,
    ShutdownRequest,
    Supervision,
    ToolstackError,
    Trigger,
    VcpuInfo,
    no_progress,
)
from xenolith.toolstack.config.domain import DomainConfig
from xenolith.toolstack.daemon.codec import CodecError, decode, encode
from xenolith.toolstack.daemon.protocol import (
    METHODS,
    PEER_CREDENTIALS,
    VERSION,
    Channel,
    End,
    Error,
    Event,
    Hello,
    Input,
    Message,
    Output,
    Request,
    Result,
    Welcome,
    exception,
)
from xenolith.toolstack.daemon.run_directory import RunDirectory, default_socket

_CONNECT_TIMEOUT_S: Final = 10.0
_START_TIMEOUT_S: Final = 60.0


class NoDaemon(ToolstackError):
    """No daemon listens at the socket."""


class RemoteClient:
    """A Client and a Supervision: everything is done by the daemon at `socket_path`."""

    def __init__(self, socket_path: Path) -> None:
        """Raises NoDaemon, and ConnectionLost if what listens there is no daemon of ours."""
        self.socket_path = socket_path
        self._lock = threading.Lock()
        self._shared: Channel | None = self._open()

    @classmethod
    def connect(cls, socket_path: Path | None = None) -> RemoteClient:
        """The daemon at `socket_path`, by default this user's; it is started if none runs."""
        path = (socket_path or default_socket()).absolute()
        try:
            return cls(path)
        except NoDaemon:
            pass
        directory = RunDirectory(path)
        with directory.starting():
            try:
                return cls(path)  # somebody else may have started it meanwhile
            except NoDaemon:
                start_daemon(directory)
                return cls(path)

    def close(self) -> None:
        with self._lock:
            if self._shared is not None:
                self._shared.close()
                self._shared = None

    def _open(self) -> Channel:
        """A new connection, after the greeting."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(_CONNECT_TIMEOUT_S)
        try:
            connection.connect(str(self.socket_path))
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            raise NoDaemon(f"no daemon listens at {self.socket_path}") from None
        except OSError as error:
            connection.close()
            raise ConnectionLost(f"cannot connect to {self.socket_path}: {error.strerror or error}") from error
        channel = Channel(connection)
        try:
            self._check_peer(connection)
            channel.send(Hello(VERSION))
            answer = _received(channel)
            if isinstance(answer, Error):
                raise exception(answer)
            if not isinstance(answer, Welcome):
                raise ConnectionLost(f"what listens at {self.socket_path} is no xenolith daemon")
        except BaseException:
            channel.close()
            raise
        connection.settimeout(None)
        return channel

    def _check_peer(self, connection: socket.socket) -> None:
        """Do not talk to a daemon of somebody else, who may have put the socket there before we did."""
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
        _, uid, _ = PEER_CREDENTIALS.unpack(credentials)
        if os.getuid() not in (uid, 0) and uid != 0:
            raise ConnectionLost(f"the daemon at {self.socket_path} belongs to user {uid}, not to you")

    # --- calls -------------------------------------------------------------------------------------------------

    def _call(self, method: str, /, **arguments: Any) -> Any:
        """A request on the shared connection."""
        with self._lock:
            if self._shared is None:
                self._shared = self._open()
            try:
                return _ask(self._shared, method, arguments, no_progress)
            except ConnectionLost:
                self._shared.close()
                self._shared = None
                raise

    def _call_alone(self, method: str, progress: OnProgress = no_progress, /, **arguments: Any) -> Any:
        """A request on a connection of its own."""
        channel = self._open()
        try:
            return _ask(channel, method, arguments, progress)
        finally:
            channel.close()

    def _stream(self, method: str, /, **arguments: Any) -> Channel:
        """A connection on which a stream has begun."""
        channel = self._open()
        try:
            _ask(channel, method, arguments, no_progress)
        except BaseException:
            channel.close()
            raise
        return channel

    def host(self) -> HostInfo:
        result: HostInfo = self._call("host")
        return result

    def domains(self) -> list[DomainInfo]:
        result: list[DomainInfo] = self._call("domains")
        return result

    def vcpus(self, domid: int) -> list[VcpuInfo]:
        result: list[VcpuInfo] = self._call("vcpus", domid=domid)
        return result

    def statistics(self) -> list[DomainStatistics]:
        result: list[DomainStatistics] = self._call("statistics")
        return result

    def config(self, domid: int) -> DomainConfig:
        result: DomainConfig = self._call("config", domid=domid)
        return result

    def set_config(self, domid: int, config: DomainConfig) -> None:
        self._call("set_config", domid=domid, config=config)

    def create(self, config: DomainConfig, progress: OnProgress = no_progress) -> int:
        result: int = self._call_alone("create", progress, config=config)
        return result

    def pause(self, domid: int) -> None:
        self._call("pause", domid=domid)

    def unpause(self, domid: int) -> None:
        self._call("unpause", domid=domid)

    def request_shutdown(self, domid: int, request: ShutdownRequest) -> None:
        self._call_alone("request_shutdown", domid=domid, request=request)

    def soft_reset(self, domid: int) -> None:
        self._call_alone("soft_reset", domid=domid)

    def destroy(self, domid: int) -> None:
        self._call_alone("destroy", domid=domid)

    def rename(self, domid: int, name: str) -> None:
        self._call("rename", domid=domid, name=name)

    def sysrq(self, domid: int, key: str) -> None:
        self._call("sysrq", domid=domid, key=key)

    def trigger(self, domid: int, trigger: Trigger, vcpu: int) -> None:
        self._call("trigger", domid=domid, trigger=trigger, vcpu=vcpu)

    def dump_core(self, domid: int, path: Path, progress: OnProgress = no_progress) -> None:
        self._call_alone("dump_core", progress, domid=domid, path=path)

    def dmesg(self) -> str:
        result: str = self._call("dmesg")
        return result

    def clear_dmesg(self) -> None:
        self._call("clear_dmesg")

    def supervise(self, domid: int) -> None:
        self._call("supervise", domid=domid)

    def open_console(self, domid: int, number: int = 0) -> ConsoleStream:
        return RemoteConsole(self._stream("open_console", domid=domid, number=number))

    def subscribe(self) -> EventStream:
        return RemoteEvents(self._stream("subscribe"))

    def watch(self, domid: int) -> EventStream:
        return RemoteEvents(self._stream("watch", domid=domid))


def _received(channel: Channel) -> Message | None:
    try:
        return channel.receive()
    except CodecError as error:
        raise ConnectionLost(f"the daemon speaks another language: {error}") from error


def _ask(channel: Channel, name: str, arguments: dict[str, Any], progress: OnProgress) -> Any:
    """Send a request and wait for what comes of it."""
    channel.send(Request(name, {key: encode(value) for key, value in arguments.items()}))
    while True:
        answer = _received(channel)
        if isinstance(answer, Progress):
            progress(answer)
        elif isinstance(answer, Error):
            raise exception(answer)
        elif isinstance(answer, Result):
            return _result(name, answer)
        else:
            raise ConnectionLost("the daemon ended while it worked on this")


def _result(name: str, answer: Result) -> Any:
    expected = METHODS[name].result
    try:
        return None if expected is type(None) else decode(expected, answer.value)
    except CodecError as error:
        raise ConnectionLost(f"the daemon speaks another language: {error}") from error


class _Receiver:
    """Takes the messages of a stream off its connection, and keeps them until somebody asks.

    Reading with a time limit straight from the socket could stop in the middle of a message.
    """

    def __init__(self, channel: Channel, limit: int) -> None:
        self._channel = channel
        self._limit = limit
        self._changed = threading.Condition()
        self._messages: list[Message] = []
        self._ended = False
        self._thread = threading.Thread(target=self._receive, name="stream", daemon=True)
        self._thread.start()

    def _receive(self) -> None:
        try:
            for message in self._channel.messages():
                if isinstance(message, End):
                    break
                with self._changed:
                    self._changed.wait_for(lambda: len(self._messages) < self._limit or self._ended)
                    self._messages.append(message)
                    self._changed.notify_all()
        except (ConnectionLost, CodecError):
            pass  # a stream that broke off has ended
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def get(self, timeout: float | None) -> Message | None:
        """The next message; None at the end, or when the time is up."""
        with self._changed:
            self._changed.wait_for(lambda: self._messages or self._ended, timeout)
            message = self._messages.pop(0) if self._messages else None
            self._changed.notify_all()
            return message

    @property
    def ended(self) -> bool:
        """Whether the stream has ended and everything was taken."""
        with self._changed:
            return self._ended and not self._messages

    def close(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._channel.close()
        self._thread.join()


class RemoteConsole:
    """An attachment to a console over the socket."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._receiver = _Receiver(channel, limit=64)

    def read(self, timeout: float | None = None) -> bytes | None:
        message = self._receiver.get(timeout)
        if isinstance(message, Output):
            return message.data
        return b"" if self._receiver.ended else None

    def write(self, data: bytes) -> None:
        try:
            self._channel.send(Input(data))
        except ConnectionLost:
            return  # the console has ended, as `read` says too

    def close(self) -> None:
        self._receiver.close()


class RemoteEvents:
    """Events over the socket."""

    def __init__(self, channel: Channel) -> None:
        self._receiver = _Receiver(channel, limit=1024)

    def get(self, timeout: float | None = None) -> DomainEvent | None:
        message = self._receiver.get(timeout)
        return message.event if isinstance(message, Event) else None

    def close(self) -> None:
        self._receiver.close()


def start_daemon(directory: RunDirectory) -> None:
    """Start a daemon that outlives this program; returns when it listens. Raises ToolstackError."""
    woken, wake = os.pipe()
    command = [sys.executable, "-m", "xenolith.cli.daemon", "--socket", str(directory.socket_path)]
    command += ["--ready-fd", str(wake)]
    try:
        with open(directory.log_path, "ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[wake],
                start_new_session=True,
                cwd="/",
            )
    finally:
        os.close(wake)
    with open(woken, "rb") as pipe:
        words = pipe.read().decode(errors="replace")
    _explain_start(process, words, directory)


def _explain_start(process: subprocess.Popen[bytes], words: str, directory: RunDirectory) -> None:
    """What the daemon said through its pipe: "ready", after anything else that people should know."""
    *messages, last = words.splitlines() or [""]
    for message in messages:
        print(f"xenolith: {message}", file=sys.stderr)
    if last != "ready":
        process.wait(_START_TIMEOUT_S)
        reason = last or f"it ended with status {process.returncode}"
        raise ToolstackError(f"the daemon did not start: {reason} (its log: {directory.log_path})")
    process.returncode = 0  # it lives on; nobody here shall wait for it


def checked_as_a_client(remote: RemoteClient) -> tuple[Client, Supervision]:
    """mypy holds RemoteClient against the protocols here."""
    return remote, remote
