"""The toolstack of a daemon: Client and Supervision over its socket.

Its methods are made from the definitions of the verbs (see `verbs`): each sends a request and waits for the answer, on
a connection that no other thread uses meanwhile. `RemoteClient.connect` starts the daemon if none listens.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self

from xenolith.dom0 import unix_socket
from xenolith.toolstack.client import (
    Client,
    Closed,
    ConnectionLost,
    ConsoleStream,
    DomainEvent,
    EventStream,
    OnProgress,
    Outcome,
    ProcessEnd,
    ProcessOutput,
    ProcessStream,
    Progress,
    Supervision,
    ToolstackError,
    no_progress,
)
from xenolith.toolstack.daemon.codec import CodecError, decode, encode
from xenolith.toolstack.daemon.protocol import (
    PEER_CREDENTIALS,
    VERSION,
    Channel,
    End,
    EndOfInput,
    Error,
    Event,
    Hello,
    Input,
    Message,
    Output,
    Request,
    Resize,
    Result,
    Signal,
    Welcome,
    exception,
)
from xenolith.toolstack.daemon.run_directory import RunDirectory, default_socket
from xenolith.toolstack.verbs import Verb, forwarding

_CONNECT_TIMEOUT_S: Final = 10.0
_START_TIMEOUT_S: Final = 60.0
INPUT_BYTES: Final = 1 << 20  # of a process at once
LOST_STATUS: Final = 125
_IDLE_CONNECTIONS: Final = 4  # kept for the next requests


class NoDaemon(ToolstackError):
    """No daemon listens at the socket."""


@forwarding
class RemoteClient(Client, Supervision):
    """A Client and a Supervision: everything is done by the daemon at `socket_path`."""

    def __init__(self, socket_path: Path) -> None:
        """`RemoteClient.at` and `RemoteClient.connect` are for others to use."""
        self.socket_path = socket_path
        self.is_new = False  # `connect` started the first daemon that ever was here
        self._lock = threading.Lock()  # the two below
        self._idle: list[Channel] = []
        self._closed = False

    @classmethod
    def at(cls, socket_path: Path) -> Self:
        """The daemon that listens at `socket_path`.

        Raises NoDaemon, and ConnectionLost if what listens there is no daemon of ours.
        """
        client = cls(socket_path)
        client._give_back(client._open())
        return client

    @classmethod
    def connect(cls, socket_path: Path | None = None, say: Callable[[str], object] = lambda text: None) -> Self:
        """The daemon at `socket_path`, by default this user's; it is started if none runs.

        `say` gets what people should know, such as what a daemon that was killed has lost.
        """
        path = (socket_path or default_socket()).absolute()
        try:
            return cls.at(path)
        except NoDaemon:
            pass
        directory = RunDirectory(path)
        is_new = not directory.exists()
        with directory.starting():
            try:
                return cls.at(path)  # somebody else may have started it meanwhile
            except NoDaemon:
                start_daemon(directory, say)
            client = cls.at(path)
            client.is_new = is_new
            return client

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._drop_idle()

    def _open(self) -> Channel:
        """A new connection, after the greeting."""
        if self._closed:
            raise Closed(f"the connection to {self.socket_path} was closed")
        try:
            connection = unix_socket.connect(self.socket_path, _CONNECT_TIMEOUT_S)
        except (FileNotFoundError, ConnectionRefusedError):
            raise NoDaemon(f"no daemon listens at {self.socket_path}") from None
        except unix_socket.InTheWay as error:
            raise ToolstackError(str(error)) from error
        except OSError as error:
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

    def ask(self, verb: Verb, arguments: dict[str, Any], progress: OnProgress | None) -> Any:
        """A request, on a connection that no other thread uses meanwhile; a stream keeps its connection."""
        channel = self._take()
        try:
            value = _ask(channel, verb, arguments, progress or no_progress)
        except ToolstackError as error:
            if isinstance(error, ConnectionLost):
                channel.close()
                self._drop_idle()  # the others are to the same daemon
            else:
                self._give_back(channel)
            raise
        except BaseException:
            channel.close()  # the answer is still to come
            raise
        if verb.result in _STREAMS:
            return _STREAMS[verb.result](channel)
        self._give_back(channel)
        return value

    def _take(self) -> Channel:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return self._open()

    def _give_back(self, channel: Channel) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < _IDLE_CONNECTIONS:
                self._idle.append(channel)
                return
        channel.close()

    def _drop_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for channel in idle:
            channel.close()


def _received(channel: Channel) -> Message | None:
    try:
        return channel.receive()
    except CodecError as error:
        raise ConnectionLost(f"the daemon speaks another language: {error}") from error


def _ask(channel: Channel, verb: Verb, arguments: dict[str, Any], progress: OnProgress) -> Any:
    """Send a request and wait for what comes of it."""
    channel.send(Request(verb.name, {key: encode(value) for key, value in arguments.items()}))
    while True:
        answer = _received(channel)
        if isinstance(answer, Progress):
            progress(answer)
        elif isinstance(answer, Error):
            raise exception(answer)
        elif isinstance(answer, Result):
            return _result(verb, answer)
        else:
            raise ConnectionLost("the daemon ended while it worked on this")


def _result(verb: Verb, answer: Result) -> Any:
    if verb.result is type(None) or verb.result in _STREAMS:
        return None
    try:
        return decode(verb.result, answer.value)
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


class RemoteProcess:
    """A process over the socket."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._receiver = _Receiver(channel, limit=64)
        self._end: ProcessEnd | None = None

    def read(self, timeout: float | None = None) -> ProcessOutput | ProcessEnd | None:
        if self._end is None:
            message = self._receiver.get(timeout)
            if isinstance(message, ProcessOutput):
                return message
            if isinstance(message, ProcessEnd):
                self._end = message
            elif self._receiver.ended:
                self._end = ProcessEnd(LOST_STATUS, Outcome.LOST, "the connection to the daemon was lost")
        return self._end

    def _tell(self, message: Message) -> None:
        with suppress(ConnectionLost):  # it has ended, as `read` says too
            self._channel.send(message)

    def write(self, data: bytes) -> None:
        for at in range(0, len(data), INPUT_BYTES):
            self._tell(Input(data[at : at + INPUT_BYTES]))

    def end_input(self) -> None:
        self._tell(EndOfInput())

    def signal(self, number: int) -> None:
        self._tell(Signal(number))

    def resize(self, rows: int, columns: int) -> None:
        self._tell(Resize(rows, columns))

    def close(self) -> None:
        self._receiver.close()


_STREAMS: Final = {ConsoleStream: RemoteConsole, EventStream: RemoteEvents, ProcessStream: RemoteProcess}
"""What a verb that returns one of these has at this end."""


def start_daemon(directory: RunDirectory, say: Callable[[str], object]) -> None:
    """Start a daemon that outlives this program; returns when it listens. Raises ToolstackError.

    Whoever is interrupted meanwhile leaves none.
    """
    woken, wake = os.pipe()
    command = [sys.executable, "-m", "xenolith.cli.daemon", "--socket", str(directory.socket_path)]
    command += ["--ready-fd", str(wake)]
    try:
        with open(directory.log_path, "ab") as log:
            known = log.tell()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[wake],
                start_new_session=True,
                cwd="/",
            )
    except OSError as error:
        os.close(woken)
        raise ToolstackError(f"no daemon can be started: {error}") from error
    finally:
        os.close(wake)
    try:
        with open(woken, "rb") as pipe:
            *messages, last = pipe.read().decode(errors="replace").splitlines() or [""]
        for message in messages:
            say(message)
        if last != "ready":
            with suppress(subprocess.TimeoutExpired):
                process.wait(_START_TIMEOUT_S)
            reason = last or f"it ended with status {process.returncode}, {_last_words(directory.log_path, known)}"
            raise ToolstackError(f"the daemon did not start: {reason} (its log: {directory.log_path})")
    except BaseException:
        process.terminate()
        process.wait()
        raise
    process.returncode = 0  # it lives on; nobody here shall wait for it


def _last_words(log: Path, known: int) -> str:
    """The last line that came to a log after its first `known` bytes."""
    with open(log, "rb") as file:
        file.seek(known)
        lines = file.read().decode(errors="replace").split("\n")
    return next((f"its last words: {line.strip()}" for line in reversed(lines) if line.strip()), "without a word")
