"""`xenolith run --template NAME -- COMMAND`, quickly: what it takes to ask the daemon for that, and no more.

Loading the whole client (click, the configuration's classes, the codec) takes longer than such a run. So this speaks
the daemon's protocol (docs/control-protocol.md) by hand, with what Python has loaded anyway. It is for pipes and files;
where a terminal is to be connected, or an option is given that it does not know, `parsed` leaves it to
`xenolith.cli.run`.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _socket
import json
import os
import select
import sys
from binascii import a2b_base64, b2a_base64
from collections.abc import Sequence

from xenolith.toolstack.daemon.socket_path import default_socket_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

OUTPUT_FAILED = 118
CANNOT_RUN = 125
_FORWARDED = (1, 2, 3, 10, 12, 15)  # SIGHUP, INT, QUIT, USR1, USR2, TERM
_VALUES = ("--template", "--env", "--workdir", "--user", "--timeout")
_CHUNK = 64 << 10
_MOST_MESSAGE = 4 << 20


def parsed(arguments: Sequence[str]) -> tuple[str, dict[str, Any]] | None:
    """The template and the Execution (as JSON has it) of a command line; None: not for us."""
    given: dict[str, list[str]] = {name: [] for name in _VALUES}
    words = iter(arguments)
    for word in words:
        if word == "--":
            break
        name, equals, value = word.partition("=")
        if name not in given:
            return None
        given[name].append(value if equals else next(words, ""))
    command = list(words)
    if len(given["--template"]) != 1 or not command or (os.isatty(0) and os.isatty(1)):
        return None
    environment = {}
    for variable in given["--env"]:
        name, equals, value = variable.partition("=")
        if not equals and name not in os.environ:
            return None
        environment[name] = value if equals else os.environ[name]
    execution: dict[str, Any] = {"command": command, "environment": environment}
    for name, field in (("--workdir", "directory"), ("--user", "user")):
        if given[name]:
            execution[field] = given[name][-1]
    if given["--timeout"]:
        try:
            execution["timeout"] = float(given["--timeout"][-1])
        except ValueError:
            return None
    return given["--template"][0], execution


def run(template: str, execution: dict[str, Any]) -> int:
    """Run it on our streams; the exit status."""
    path = default_socket_path()
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        connection.connect(path)
    except OSError:
        return _say(f"there is no template {template!r}, as no daemon listens at {path}")
    credentials = connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)
    if int.from_bytes(credentials[4:8], sys.byteorder) not in (os.getuid(), 0) and os.getuid():
        return _say(f"the daemon at {path} is somebody else's")
    arguments = {"name": template, "execution": execution}
    request = {"request": {"method": "run_template", "arguments": arguments}}
    return _Conversation(connection, _message({"hello": {"version": 1}}) + _message(request)).carry_on()


class _Conversation:
    """Carries our streams and signals to a process of the daemon's, until it ends."""

    def __init__(self, connection: _socket.socket, first: bytes) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._outgoing = first
        self._incoming = bytearray()
        self._reads_input = False  # the process is there
        self._status: int | None = None

    def carry_on(self) -> int:
        come, note = os.pipe()
        os.set_blocking(note, False)
        for number in _FORWARDED:
            _signal.signal(number, lambda *_: None)
        _signal.set_wakeup_fd(note)
        poll = select.poll()
        poll.register(come, select.POLLIN)
        while self._status is None:
            poll.register(self._connection.fileno(), select.POLLIN | (select.POLLOUT if self._outgoing else 0))
            if self._reads_input and not self._outgoing:
                poll.register(0, select.POLLIN)
            for descriptor, _ in poll.poll():
                if descriptor == come:
                    for number in os.read(come, 64):
                        self._outgoing += _message({"signal": {"number": number}})
                elif descriptor == 0:
                    poll.unregister(0)
                    self._read_input()
                else:
                    self._talk()
        return self._status

    def _read_input(self) -> None:
        try:
            data = os.read(0, _CHUNK)
        except OSError:
            data = b""
        if data:
            self._outgoing += _message({"input": {"data": b2a_base64(data, newline=False).decode()}})
        else:
            self._reads_input = False
            self._outgoing += _message({"end_of_input": {}})

    def _talk(self) -> None:
        try:
            if self._outgoing:
                sent = self._connection.send(self._outgoing)
                self._outgoing = self._outgoing[sent:]
        except BlockingIOError:
            pass
        except OSError:
            self._outgoing = b""  # what it has said last is still to come
        try:
            data = self._connection.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._status = _say("the connection to the daemon was lost")
            return
        self._incoming += data
        while self._status is None and (body := self._next()) is not None:
            self._take(json.loads(body))

    def _next(self) -> bytes | None:
        if len(self._incoming) < 4:
            return None
        length = int.from_bytes(self._incoming[:4], "big")
        if length > _MOST_MESSAGE:
            raise OSError(None, "the daemon speaks another language")
        if len(self._incoming) < 4 + length:
            return None
        body = bytes(self._incoming[4 : 4 + length])
        del self._incoming[: 4 + length]
        return body

    def _take(self, message: dict[str, Any]) -> None:
        ((kind, content),) = message.items()
        if kind == "process_output":
            self._print(2 if content["errors"] else 1, a2b_base64(content["data"]))
        elif kind == "process_end":
            self._status = int(content["status"])
            if content["message"]:
                _say(content["message"])
        elif kind == "result":
            self._reads_input = True
        elif kind == "error":
            self._status = _say(content["text"])

    def _print(self, descriptor: int, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            select.select([], [descriptor], [])
            self._print(descriptor, data)
        except BrokenPipeError:
            self._status = 128 + 13  # SIGPIPE
        except OSError as error:
            _say(f"standard output cannot be written: {error.strerror}")
            self._status = OUTPUT_FAILED


def _message(content: dict[str, Any]) -> bytes:
    body = json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return len(body).to_bytes(4, "big") + body


def _say(text: str) -> int:
    print(f"xenolith: {text}", file=sys.stderr)
    return CANNOT_RUN
