"""The daemon: a machine that stays when the command that started it has ended.

It serves a Client (see `client`) over a UNIX socket that only its user may use: the socket's mode is 0600 and the
kernel tells who connects (SO_PEERCRED). Each connection has a thread of its own, which does what the requests ask for
and waits for its peer, never anybody else: domains are run by the engine's threads, and what they have to tell is
taken from queues that drop the oldest when a peer is slow. A peer that does not read for `SEND_TIMEOUT_S` loses its
connection.

SIGTERM and SIGINT end it in order: no more restarts, every guest is asked to power off, and destroyed if it has not
done so in `GUEST_SHUTDOWN_S`. SIGKILL gives no chance to do anything; see `rundir` for what the next one does.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

from xenolith.dom0.unix_socket import ListeningSocket
from xenolith.ready import readable, writable
from xenolith.toolstack.client import (
    Client,
    ConnectionLost,
    ConsoleStream,
    EventKind,
    EventStream,
    NewDomid,
    OnProgress,
    ProcessEnd,
    ProcessStream,
    Progress,
    ShutdownRequest,
    Supervision,
    ToolstackError,
    every,
)
from xenolith.toolstack.daemon.codec import CodecError, encode
from xenolith.toolstack.daemon.protocol import (
    METHODS,
    PEER_CREDENTIALS,
    VERSION,
    Channel,
    End,
    EndOfInput,
    Error,
    Event,
    Hello,
    Input,
    Output,
    Request,
    Resize,
    Result,
    Signal,
    Welcome,
    check_arguments,
    error_message,
)
from xenolith.toolstack.daemon.run_directory import LostDomain, RunDirectory
from xenolith.toolstack.verbs import PROGRESS, Verb

MAX_CONNECTIONS: Final = 128
SEND_TIMEOUT_S: Final = 30.0
HELLO_TIMEOUT_S: Final = 10.0
ACCEPT_PAUSE_S: Final = 0.1  # after a connection that could not be accepted, since the next one would not be either
GUEST_SHUTDOWN_S: Final = 60.0


log = logging.getLogger(__name__)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, what happened, and the fields given as `extra={"fields": {...}}`."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def note(event: str, level: int = logging.INFO, **fields: object) -> None:
    """Write one line to the log."""
    log.log(level, event, extra={"fields": fields})


class Daemon:
    """Serves `client` and `supervision` at the socket of `directory`, whose lock it must hold."""

    def __init__(self, directory: RunDirectory, client: Client, supervision: Supervision) -> None:
        self._directory = directory
        self.client = client
        self.supervision = supervision
        self._lock = threading.Lock()
        self._state_lock = threading.Lock()
        self._connections: set[_Connection] = set()
        self._stopping = threading.Event()
        self._woken, self.wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._events = client.subscribe()
        self._scribe = threading.Thread(target=self._keep_state, name="state", daemon=True)
        try:
            self._listener = ListeningSocket(directory.socket_path, MAX_CONNECTIONS, serving="domains")
        except OSError as error:
            raise ToolstackError(f"cannot listen on {directory.socket_path}: {error.strerror}") from error
        self._scribe.start()

    # --- serving -----------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Accept connections until `stop`."""
        note("serving", socket=self._directory.socket_path, pid=os.getpid())
        listening = self._listener.socket.fileno()
        while not self._stopping.is_set():
            ready = readable(listening, self._woken)
            if listening in ready and not self._stopping.is_set():
                self._accept()

    def stop(self, *_: object) -> None:
        """Make `serve` return. May be called by a signal handler."""
        self._stopping.set()
        with suppress(BlockingIOError):
            os.write(self.wake, b"x")

    def _accept(self) -> None:
        try:
            peer_socket, _ = self._listener.socket.accept()
        except OSError as error:  # it has gone again, or there are too many open files
            note("a connection was not accepted", logging.WARNING, error=str(error))
            self._stopping.wait(ACCEPT_PAUSE_S)
            return
        pid, uid, _ = PEER_CREDENTIALS.unpack(
            peer_socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
        )
        refusal = self._refusal(uid)
        if refusal:
            note("connection refused", logging.WARNING, pid=pid, uid=uid, reason=refusal)
        connection = _Connection(peer_socket, pid, self, refusal)
        with self._lock:
            self._connections.add(connection)
        try:
            connection.start()
        except RuntimeError as error:  # Python's, for a thread that the host does not give
            note("a connection cannot be served", logging.ERROR, pid=pid, error=str(error))
            connection.end()
            self.forget(connection)

    def _refusal(self, uid: int) -> str:
        if uid not in (os.getuid(), 0):
            return f"this daemon serves user {os.getuid()} only"
        if len(self._connections) >= MAX_CONNECTIONS:
            return f"{MAX_CONNECTIONS} connections are open already: try again when another command has ended"
        return ""

    def forget(self, connection: _Connection) -> None:
        with self._lock:
            self._connections.discard(connection)

    def _keep_state(self) -> None:
        """Note every domain that comes or goes, for a successor of a daemon that was killed."""
        while (event := self._events.get()) is not None:
            if event.kind in (EventKind.CREATED, EventKind.DESTROYED):
                self._write_state()

    def after_request(self, method: str) -> None:
        """Called by a connection's thread when it has done what was asked."""
        if method in ("create", "rename"):
            self._write_state()

    def _write_state(self) -> None:
        try:
            with self._state_lock:
                domains = [LostDomain(domain.domid, domain.name) for domain in self.client.domains() if domain.domid]
                self._directory.write_state(domains)
        except ToolstackError as error:
            note("the state file cannot be written", logging.ERROR, error=str(error))

    # --- ending ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End all connections and stop listening; the domains are left alone."""
        self._listener.close()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.end()
        for connection in connections:
            connection.join()
        self._events.close()
        self._scribe.join()
        os.close(self._woken)
        os.close(self.wake)


def shut_guests_down(client: Client, seconds: float = GUEST_SHUTDOWN_S) -> None:
    """Ask all guests to power off, wait for them, and destroy those that have not done so in time, or are paused."""
    events = client.subscribe()
    domids = {domain.domid for domain in client.domains() if domain.domid and not domain.shutdown and not domain.paused}
    deadline = time.monotonic() + seconds
    askers = [threading.Thread(target=_ask_to_power_off, args=(client, domid), daemon=True) for domid in domids]
    for asker in askers:
        with suppress(RuntimeError):  # no thread to be had: the guest is not asked
            asker.start()
    while domids and (event := events.get(max(0.0, deadline - time.monotonic()))) is not None:
        if event.kind in (EventKind.SHUTDOWN, EventKind.DESTROYED):
            domids.discard(event.domid)
    events.close()
    for domain in client.domains():
        if domain.domid:
            note("destroying", domid=domain.domid, name=domain.name, in_time=domain.domid not in domids)
            with suppress(ToolstackError):
                client.destroy(domain.domid)


def _ask_to_power_off(client: Client, domid: int) -> None:
    try:
        client.request_shutdown(domid, ShutdownRequest.POWEROFF)
    except ToolstackError as error:
        note("a guest does not shut down", logging.WARNING, domid=domid, error=str(error))


class _Connection:
    """One peer and the thread that serves it."""

    def __init__(self, peer: socket.socket, pid: int, daemon: Daemon, refusal: str) -> None:
        self._socket = peer
        self._channel = Channel(peer)
        self._pid = pid
        self._daemon = daemon
        self._refusal = refusal  # why this peer is not served; empty if it is
        self._client = daemon.client
        self._supervision = daemon.supervision
        self._stream: ConsoleStream | EventStream | ProcessStream | None = None
        self._thread = threading.Thread(target=self._run, name=f"peer {pid}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Close the connection, whatever it is doing."""
        if self._stream is not None:
            self._stream.close()
        self._channel.close()

    def join(self) -> None:
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._socket.settimeout(HELLO_TIMEOUT_S)
            if self._greet():
                # Reading waits for ever, sending for a while: the kernel keeps the two apart.
                self._socket.settimeout(None)
                timeout = struct.pack("ll", int(SEND_TIMEOUT_S), 0)
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
                self._serve()
        except ConnectionLost as error:
            note("peer lost", logging.DEBUG, pid=self._pid, error=str(error))
        except CodecError as error:
            note("peer speaks nonsense", logging.WARNING, pid=self._pid, error=str(error))
            with suppress(ConnectionLost):
                self._channel.send(Error("InvalidRequest", str(error), -6))
        except Exception:
            log.exception("connection failed", extra={"fields": {"pid": self._pid}})
        finally:
            self.end()
            self._daemon.forget(self)

    def _greet(self) -> bool:
        hello = self._channel.receive()
        if hello is None:
            return False
        if not isinstance(hello, Hello):
            raise CodecError("the first message must be hello")
        refusal = self._refusal
        if hello.version != VERSION:
            refusal = f"this daemon speaks version {VERSION} of the protocol, the client version {hello.version}"
        if refusal:
            self._channel.send(Error(ToolstackError.__name__, refusal, ToolstackError.rc))
            return False
        self._channel.send(Welcome(VERSION, os.getpid()))
        return True

    def _serve(self) -> None:
        for message in self._channel.messages():
            if not isinstance(message, Request):
                raise CodecError("a request was expected")
            self._answer(message)
            if self._stream is not None:
                return

    def _answer(self, request: Request) -> None:
        """Do what one request asks for and say what came of it."""
        try:
            arguments = check_arguments(request)
        except CodecError as error:
            self._channel.send(Error("InvalidRequest", str(error), -6))
            return
        note("request", logging.DEBUG, pid=self._pid, method=request.method)
        try:
            verb = METHODS[request.method]
            value = self._call(verb, arguments)
            if verb.result is ConsoleStream:
                self._attach(value)
            elif verb.result is EventStream:
                self._follow(value)
            elif verb.result is ProcessStream:
                self._accompany(value)
            else:
                self._deliver(verb, value)
        except ConnectionLost:
            raise
        except ToolstackError as error:
            note("request failed", pid=self._pid, method=request.method, error=str(error))
            self._channel.send(error_message(error))
        except Exception as error:
            log.exception("request failed", extra={"fields": {"pid": self._pid, "method": request.method}})
            text = f"{request.method} failed inside the daemon, which is a bug: {error!r}; its log says more"
            self._channel.send(Error(ToolstackError.__name__, text, ToolstackError.rc))

    def _deliver(self, verb: Verb, value: Any) -> None:
        """Tell the peer the result; a new domain that nobody hears of is no use."""
        try:
            self._channel.send(Result(encode(value)))
        except ConnectionLost:
            if verb.result is NewDomid:
                note("destroying a domain whose maker has gone", domid=value)
                with suppress(ToolstackError):
                    self._client.destroy(value)
            raise

    def _call(self, verb: Verb, arguments: dict[str, Any]) -> Any:
        target = self._supervision if verb.interface is Supervision else self._client
        if verb.reports_progress:
            arguments = arguments | {PROGRESS: self._progress()}
        value = getattr(target, verb.name)(**arguments)
        self._daemon.after_request(verb.name)
        return value

    def _progress(self) -> OnProgress:
        """A function that tells the peer about progress if that is possible without waiting for it."""

        def report(progress: Progress) -> None:
            if writable(self._socket.fileno(), wait=False):
                with suppress(ConnectionLost):  # the operation goes on without anybody watching
                    self._channel.send(progress)

        return report

    # --- streams -----------------------------------------------------------------------------------------------

    def _follow(self, events: EventStream) -> None:
        """Send events until the stream or the connection ends."""
        self._stream = events
        self._channel.send(Result())
        reader = threading.Thread(target=self._wait_for_peer, args=(events,), daemon=True)
        reader.start()
        for event in every(events):
            self._channel.send(Event(event))
        with suppress(ConnectionLost):
            self._channel.send(End())

    def _wait_for_peer(self, stream: ConsoleStream | EventStream) -> None:
        """End the stream when the peer goes, which nobody would notice while nothing is sent."""
        with suppress(ConnectionLost, CodecError):
            self._channel.receive()
        stream.close()

    def _attach(self, console: ConsoleStream) -> None:
        """Carry a console: output from here, input from a thread of its own."""
        self._stream = console
        self._channel.send(Result())
        reader = threading.Thread(target=self._take_input, args=(console,), daemon=True)
        reader.start()
        try:
            while data := console.read(None):
                self._channel.send(Output(data))
            with suppress(ConnectionLost):
                self._channel.send(End())
        finally:
            console.close()

    def _take_input(self, console: ConsoleStream) -> None:
        try:
            for message in self._inputs():
                console.write(message.data)
        except (ConnectionLost, CodecError, ToolstackError):
            pass  # the console is closed, upon which the connection's thread ends
        console.close()

    def _accompany(self, process: ProcessStream) -> None:
        """Carry what a process prints, and in the end how it ended; input from a thread of its own."""
        self._stream = process
        self._channel.send(Result())
        reader = threading.Thread(target=self._obey, args=(process,), daemon=True)
        reader.start()
        try:
            while (item := process.read()) is not None:
                self._channel.send(item)
                if isinstance(item, ProcessEnd):
                    break
        finally:
            process.close()

    def _obey(self, process: ProcessStream) -> None:
        """Do with a process what its peer says; when the peer goes, let go of it."""
        try:
            for message in self._channel.messages():
                match message:
                    case Input(data):
                        process.write(data)
                    case EndOfInput():
                        process.end_input()
                    case Signal(number):
                        process.signal(number)
                    case Resize(rows, columns):
                        process.resize(rows, columns)
                    case _:
                        break
        except (ConnectionLost, CodecError, ToolstackError):
            pass
        process.close()

    def _inputs(self) -> Iterator[Input]:
        for message in self._channel.messages():
            if not isinstance(message, Input):
                raise CodecError("input was expected")
            yield message
