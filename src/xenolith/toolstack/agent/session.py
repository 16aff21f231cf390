"""A conversation with the agent of one guest: the commands that it runs for us.

A thread takes what the agent sends, as soon as it is there.  It waits for nobody: of each stream of a command the agent
may send as many bytes as its reader has room for (`CREDIT`), and one that sends more breaks the protocol.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

from xenolith.dom0.console import Console, ConsoleClosed, Overflow
from xenolith.toolstack.agent import frames
from xenolith.toolstack.agent.frames import Decoder, Frame, Kind, Stage, encode
from xenolith.toolstack.client import (
    LIMITS,
    Execution,
    InvalidRequest,
    Outcome,
    ProcessEnd,
    ProcessOutput,
    ToolstackError,
)

OUTPUT_ROOM: Final = 256 << 10  # bytes of each of a command's streams that nobody has read yet
GREETING_SECONDS: Final = 1.0  # between two tries
STUCK_SECONDS: Final = 30.0  # without taking a frame: then the agent is not there any more
KILL_SECONDS: Final = 5.0  # from SIGKILL to the end
_SIGKILL: Final = 9
END_OF_FILE: Final = b"\x04"  # what a terminal takes for it

TIMED_OUT: Final = 119  # statuses, as `xenolith run` has them
CANNOT_RUN: Final = 125
CANNOT_START: Final = 126
NOT_FOUND: Final = 127


class AgentUnavailable(ToolstackError):
    """The guest has no agent that answers."""


class Session:
    """A conversation, from `greet` to the end of the console or a breach of the protocol."""

    def __init__(self, console: Console) -> None:
        self._console: Final = console
        self._reader: Final = console.open_reader(Overflow.WAIT)
        self._sending: Final = threading.Lock()
        self._changed: Final = threading.Condition()  # of what follows
        self._processes: Final[dict[int, Process]] = {}
        self._last_id = 0
        self._nonce = b""
        self._welcome = False
        self._ready = False  # the agent has said that it is there, since it was last greeted
        self.ended = ""  # why
        self._thread: Final = threading.Thread(target=self._receive, name="agent", daemon=True)
        self._thread.start()

    # --- for its user ----------------------------------------------------------------------------------

    def greet(self, *first: Frame) -> None:
        """Begin the conversation, and send these frames too. An agent that is there answers in its time."""
        with self._changed:
            self._nonce, self._ready = os.urandom(16), False
            nonce = self._nonce
        self._send([Frame(Kind.HELLO, 0, nonce), *first], prefix=b"\0")

    def wait(self, timeout: float) -> None:
        """Wait for the agent's answer, greeting it again where it did not hear. Raises AgentUnavailable."""
        deadline = time.monotonic() + timeout
        while True:
            with self._changed:
                left = min(GREETING_SECONDS, max(0.0, deadline - time.monotonic()))
                self._changed.wait_for(lambda: self._welcome or self._ready or self.ended, left)
                if self._welcome:
                    return
                if self.ended:
                    raise AgentUnavailable(self.ended)
            if time.monotonic() >= deadline:
                raise AgentUnavailable(f"no agent has answered in the guest for {timeout:g} seconds")
            self.greet()

    def execute(self, execution: Execution) -> Process:
        """Start a command. Raises InvalidRequest for one that cannot be, and AgentUnavailable."""
        words, description = _arguments(execution), _description(execution)
        with self._changed:
            if self.ended:
                raise AgentUnavailable(self.ended)
            number = self._free_id()
            process = self._processes[number] = Process(self, number, execution)
        first = [words[at : at + frames.MOST_BODY] for at in range(0, len(words), frames.MOST_BODY)]
        room = frames.CREDIT.pack(1, OUTPUT_ROOM), frames.CREDIT.pack(2, OUTPUT_ROOM)
        self._send(
            [
                *(Frame(Kind.ARGUMENTS, 0, piece) for piece in first),
                Frame(Kind.EXEC, number, description),
                *(Frame(Kind.CREDIT, number, credit) for credit in room),
            ]
        )
        return process

    def _free_id(self) -> int:
        for _ in range(1 << 16):
            self._last_id = (self._last_id + 1) & 0xFFFF
            if self._last_id not in self._processes:
                return self._last_id
        raise AgentUnavailable("the agent has not told the end of 65,536 commands")

    def close(self) -> None:
        """End the conversation; commands that still run are lost."""
        self._break("the connection to the guest's agent was closed")

    def _send(self, what: Iterable[Frame], prefix: bytes = b"") -> None:
        """Raises AgentUnavailable, also where the agent takes what others send as slowly as it can."""
        its_turn = self._sending.acquire(timeout=STUCK_SECONDS)
        try:
            if not (its_turn and all(self._taken(frame) for frame in (prefix, *map(encode, what)))):
                self._break("the guest's agent takes nothing any more")
        except ConsoleClosed:
            self._break("the domain has ended")
        finally:
            if its_turn:
                self._sending.release()
        if self.ended:
            raise AgentUnavailable(self.ended)

    def _taken(self, data: bytes) -> bool:
        return not self.ended and self._console.write(data, STUCK_SECONDS) == len(data)

    def send_for(self, process: Process, kind: Kind, body: bytes = b"") -> None:
        """Tell the agent something about a command; nothing where that has ended."""
        with suppress(AgentUnavailable):
            self._send([Frame(kind, process.number, body)])

    # --- on its thread -----------------------------------------------------------------------------------

    def _receive(self) -> None:
        decoder = Decoder()
        while data := self._reader.read():
            for frame in decoder.feed(data):
                if self.ended:
                    return
                try:
                    self._take(frame)
                except (_Breach, KeyError, ValueError) as error:
                    self._break(f"the guest's agent broke the protocol: {error}")
        self._break("the domain has ended")

    def _take(self, frame: Frame | None) -> None:
        if frame is not None and frame.kind == Kind.READY:
            self._begun_anew()
        elif frame is not None and frame.kind == Kind.WELCOME:
            with self._changed:
                if frame.body == self._nonce + bytes((frames.VERSION, 0)):
                    self._welcome = True
                    self._changed.notify_all()
        elif not self._welcome:
            pass  # of a conversation before this
        elif frame is None:
            raise _Breach("what it sent is no frame")
        elif frame.kind == Kind.IDENTIFIED:
            (error,) = _unpacked(frames.U32, frame)
            if error:
                raise _Breach(f"it could not take the identity that it was given: {_error(error)}")
        else:
            self._take_of_process(frame)

    def _take_of_process(self, frame: Frame) -> None:
        process = self._processes.get(frame.command)
        if process is None:
            raise _Breach(f"it told of command {frame.command}, which there is not")
        if frame.kind in (Kind.STDOUT, Kind.STDERR):
            process.take(frame.body, errors=frame.kind == Kind.STDERR)
        elif frame.kind == Kind.ROOM:
            process.take_room(*_unpacked(frames.U32, frame))
        elif frame.kind == Kind.EXIT:
            (status,) = _unpacked(frames.U32, frame)
            self._finish(process, _exited(status))
        elif frame.kind == Kind.FAILED:
            self._finish(process, _failed(*_unpacked(frames.FAILURE, frame)))
        elif frame.kind != Kind.STARTED:
            raise _Breach(f"it sent a frame of kind {frame.kind}, which there is not")

    def _finish(self, process: Process, end: ProcessEnd) -> None:
        with self._changed:
            del self._processes[process.number]
        process.finish(end)

    def _begun_anew(self) -> None:
        """The agent was started (again): it knows nothing of us."""
        with self._changed:
            lost, self._welcome, self._ready = self._welcome, False, True
            self._changed.notify_all()
        if lost:
            self._break("the guest's agent was started anew")

    def _break(self, why: str) -> None:
        with self._changed:
            if self.ended:
                return
            self.ended = why
            processes = list(self._processes.values())
            self._processes.clear()
            self._changed.notify_all()
        for process in processes:
            process.finish(ProcessEnd(CANNOT_RUN, Outcome.LOST, why))
        self._reader.close()


class Process:
    """A command inside the guest: a ProcessStream."""

    def __init__(self, session: Session, number: int, execution: Execution) -> None:
        self.number: Final = number
        self._session: Final = session
        self._terminal: Final = execution.terminal is not None
        self._timeout: Final = execution.timeout
        self._deadline: float | None = None if self._timeout is None else time.monotonic() + self._timeout
        self._timed_out = False
        self._changed: Final = threading.Condition()  # of what follows
        self._pieces: Final[deque[ProcessOutput]] = deque()
        self._credit: Final = [OUTPUT_ROOM, OUTPUT_ROOM]  # that the agent has left, of output and errors
        self._read: Final = [0, 0]  # what was read, and the agent has not been told of
        self._room = frames.INPUT_ROOM
        self._input_ended = False
        self._end: ProcessEnd | None = None
        self._closed = False

    # --- from the session's thread -------------------------------------------------------------------------

    def take(self, data: bytes, *, errors: bool) -> None:
        with self._changed:
            if self._closed:
                return
            if len(data) > self._credit[errors] or not data:
                raise _Breach("it sent more output than there was room for")
            self._credit[errors] -= len(data)
            self._pieces.append(ProcessOutput(data, errors))
            self._changed.notify_all()

    def take_room(self, count: int) -> None:
        with self._changed:
            if self._room + count > frames.INPUT_ROOM:
                raise _Breach("it has room for more input than it was sent")
            self._room += count
            self._changed.notify_all()

    def finish(self, end: ProcessEnd) -> None:
        with self._changed:
            self._end = end
            self._changed.notify_all()

    # --- for its user ----------------------------------------------------------------------------------

    def read(self, timeout: float | None = None) -> ProcessOutput | ProcessEnd | None:
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pieces or self._end, _seconds_to(until, self._deadline))
                piece = self._pieces.popleft() if self._pieces else None
                end = self._end
            if piece is not None:
                self._give_credit(piece)
                return piece
            if end is not None:
                return self._told(end)
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._end_by_force()
            elif until is not None and time.monotonic() >= until:
                return None

    def _give_credit(self, piece: ProcessOutput) -> None:
        with self._changed:
            self._read[piece.errors] += len(piece.data)
            count = self._read[piece.errors]
            if count < OUTPUT_ROOM // 4 or self._end is not None:
                return
            self._read[piece.errors] = 0
            self._credit[piece.errors] += count
        self._session.send_for(self, Kind.CREDIT, frames.CREDIT.pack(1 + piece.errors, count))

    def _told(self, end: ProcessEnd) -> ProcessEnd:
        if self._timed_out:
            return ProcessEnd(TIMED_OUT, Outcome.TIMED_OUT, f"{self._timeout:g} seconds are over")
        return end

    def _end_by_force(self) -> None:
        if self._timed_out:  # and it has not ended by being killed
            self.finish(ProcessEnd(TIMED_OUT, Outcome.TIMED_OUT))
            return
        self._timed_out = True
        self._deadline = time.monotonic() + KILL_SECONDS
        self.signal(_SIGKILL)

    def write(self, data: bytes) -> None:
        while data:
            with self._changed:
                self._changed.wait_for(lambda: self._room or self._end or self._input_ended)
                if self._end or self._input_ended:
                    return
                count = min(len(data), self._room, frames.MOST_BODY)
                self._room -= count
            self._session.send_for(self, Kind.STDIN, data[:count])
            data = data[count:]

    def end_input(self) -> None:
        if self._terminal:
            self.write(END_OF_FILE)
            return
        with self._changed:
            if self._end or self._input_ended:
                return
            self._input_ended = True
            self._changed.notify_all()
        self._session.send_for(self, Kind.STDIN_END)

    def signal(self, number: int) -> None:
        if not 1 <= number <= 64:
            raise InvalidRequest(f"There is no signal {number}.")
        with self._changed:
            if self._end:
                return
        self._session.send_for(self, Kind.SIGNAL, bytes((number,)))

    def resize(self, rows: int, columns: int) -> None:
        with self._changed:
            if self._end:
                return
        self._session.send_for(self, Kind.SIZE, frames.SIZE.pack(rows & 0xFFFF, columns & 0xFFFF))

    def close(self) -> None:
        """Nobody reads its output any more. One that still runs is told by SIGHUP; a reader gets the end."""
        with self._changed:
            if self._end or self._closed:
                return
            self._closed = True
            self._pieces.clear()
            self._end = ProcessEnd(CANNOT_RUN, Outcome.LOST, "it was let go of")
            self._changed.notify_all()
        self._session.send_for(self, Kind.FORGET)


class _Breach(Exception):
    """The agent does not keep to the protocol."""


def _unpacked(structure: struct.Struct, frame: Frame) -> tuple[int, ...]:
    if len(frame.body) != structure.size:
        raise _Breach(f"a frame of kind {frame.kind} has {len(frame.body)} bytes")
    return structure.unpack(frame.body)


def _seconds_to(*moments: float | None) -> float | None:
    """From now to the first of these moments, of those that there are."""
    there = [moment for moment in moments if moment is not None]
    return max(0.0, min(there) - time.monotonic()) if there else None


def _exited(status: int) -> ProcessEnd:
    """A wait status (wait(2)) as a shell has it."""
    return ProcessEnd(128 + (status & 0x7F) if status & 0x7F else status >> 8 & 0xFF)


def _error(number: int) -> str:
    """What an errno of the guest's means, which may be any number."""
    return os.strerror(number) if number in errno.errorcode else f"error {number}"


def _failed(stage: int, number: int) -> ProcessEnd:
    why = _error(number)
    what = {
        Stage.USER: "it cannot run as this user",
        Stage.DIRECTORY: "it cannot be in this directory",
        Stage.PROGRAM: "it cannot be run",
    }.get(stage, "the guest's agent cannot start it")  # type: ignore[call-overload]
    status = CANNOT_RUN if stage == Stage.AGENT else CANNOT_START
    if stage == Stage.PROGRAM and number == errno.ENOENT:
        status = NOT_FOUND
    return ProcessEnd(status, Outcome.NOT_STARTED, f"{what}: {why}")


def _arguments(execution: Execution) -> bytes:
    """The words of a command as the agent takes them. Raises InvalidRequest."""
    variables = [f"{name}={value}" for name, value in execution.environment.items()]
    if not execution.command:
        raise InvalidRequest("There is no command to run.")
    if any(not name or "=" in name for name in execution.environment):
        raise InvalidRequest("A variable of the environment has no name, or one with '='.")
    words = [os.fsencode(word) for word in (execution.directory, execution.user, *execution.command, *variables)]
    if any(b"\0" in word for word in words):
        raise InvalidRequest("A word of the command contains a NUL byte, which no program can be given.")
    joined = b"".join(word + b"\0" for word in words)
    if len(joined) > frames.MOST_ARGUMENTS or len(words) > frames.MOST_WORDS:
        most = f"{frames.MOST_ARGUMENTS >> 10} KiB and {frames.MOST_WORDS} words"
        raise InvalidRequest(f"The command and its environment are too long; {most} are the most.")
    return joined


def _description(execution: Execution) -> bytes:
    rows, columns = execution.terminal or (0, 0)
    limits = []
    for name, value in execution.limits.items():
        if name not in LIMITS or not 0 <= value < 1 << 64:
            raise InvalidRequest(f"There is no limit {name}={value}; limits are {', '.join(LIMITS)}.")
        limits.append(frames.LIMIT.pack(LIMITS[name], value))
    terminal = 1 if execution.terminal else 0
    counts = len(execution.command), len(execution.environment), len(limits)
    return frames.EXEC.pack(terminal, rows & 0xFFFF, columns & 0xFFFF, *counts) + b"".join(limits)
