"""A conversation with an agent, which a test plays: what it says is taken as long as it keeps to the protocol."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Callable, Iterator
from typing import cast

import pytest

from xenolith.abi import console_ring as ring
from xenolith.dom0.console import Console
from xenolith.toolstack.agent import frames
from xenolith.toolstack.agent import session as agent_session
from xenolith.toolstack.agent.frames import Decoder, Frame, Kind, Stage, encode
from xenolith.toolstack.agent.running import finish
from xenolith.toolstack.agent.session import OUTPUT_ROOM, AgentUnavailable, Session
from xenolith.toolstack.client import Execution, InvalidRequest, Outcome, ProcessEnd, ProcessOutput, ProcessStream

DEADLINE = 60
WELCOME = bytes((frames.VERSION, 0))


class Guest:
    """The guest's half of the ring. It takes what comes at once, and says what a test wants."""

    def __init__(self) -> None:
        self._page = bytearray(4096)
        self._index = memoryview(self._page).cast("I")
        self._decoder = Decoder()
        self.heard: list[Frame] = []
        self.answer: Callable[[Frame], list[Frame]] = lambda frame: []
        self.console = Console(memoryview(self._page), self._look)
        self._pending = b""
        self.deaf = False

    def _look(self) -> None:
        """Called with the console's lock held, as an event is."""
        if self.deaf:
            return
        start, end = self._index[ring.IN_CONS], self._index[ring.IN_PROD]
        data = bytes(self._page[ring.IN + at % ring.IN_SIZE] for at in range(start, end))
        self._index[ring.IN_CONS] = end
        for frame in self._decoder.feed(data):
            if frame is not None:
                self.heard.append(frame)
                self._pending += b"".join(map(encode, self.answer(frame)))

    def say(self, *what: Frame | bytes) -> None:
        """Say it, and what is to be answered."""
        self._pending += b"".join(each if isinstance(each, bytes) else encode(each) for each in what)
        self.flush()

    def flush(self) -> None:
        while self._pending:
            piece, self._pending = self._pending[:1500], self._pending[1500:]
            position = self._index[ring.OUT_PROD]
            for offset, byte in enumerate(piece):
                self._page[ring.OUT + (position + offset) % ring.OUT_SIZE] = byte
            self._index[ring.OUT_PROD] = position + len(piece)
            while self._index[ring.OUT_CONS] != self._index[ring.OUT_PROD]:
                self.console.service()


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.console.close()


@pytest.fixture
def session(guest: Guest) -> Iterator[Session]:
    session = Session(guest.console)
    session.greet()
    (hello,) = guest.heard
    guest.say(Frame(Kind.WELCOME, 0, hello.body + WELCOME))
    session.wait(DEADLINE)
    guest.heard.clear()
    yield session
    session.close()


def test_an_agent_that_comes_late_is_greeted_again_and_old_words_are_passed_over(guest: Guest) -> None:
    session = Session(guest.console)
    session.greet()
    guest.say(
        b"half a frame of an earlier convers\0", Frame(Kind.EXIT, 7, b"\0\0\0\0"), Frame(Kind.WELCOME, 0, b"?" * 18)
    )
    guest.answer = lambda frame: [Frame(Kind.WELCOME, 0, frame.body + WELCOME)] if frame.kind == Kind.HELLO else []
    guest.say(Frame(Kind.READY, 0, WELCOME))
    while not session._welcome:  # each greeting is answered once somebody looks
        session.greet()
        guest.flush()
        with session._changed:
            session._changed.wait_for(lambda: session._welcome, 0.1)
    session.wait(DEADLINE)
    assert not session.ended
    session.close()


def test_a_command_gets_its_words_input_and_signals_and_gives_output_and_status(guest: Guest, session: Session) -> None:
    process = session.execute(
        Execution(command=("echo", "a b"), environment={"A": "1"}, directory="/tmp", user="5", limits={"nofile": 9})
    )
    words, description, *credit = guest.heard
    assert words.body == b"/tmp\0" + b"5\0echo\0a b\0A=1\0"
    assert description.body == frames.EXEC.pack(0, 0, 0, 2, 1, 1) + frames.LIMIT.pack(7, 9)
    assert [each.body for each in credit] == [frames.CREDIT.pack(n, OUTPUT_ROOM) for n in (1, 2)]
    number = description.command
    guest.heard.clear()
    process.write(b"input")
    process.signal(15)
    process.resize(3, 4)
    process.end_input()
    process.write(b"too late")
    assert [(each.kind, each.body) for each in guest.heard] == [
        (Kind.STDIN, b"input"),
        (Kind.SIGNAL, b"\x0f"),
        (Kind.SIZE, b"\3\0\4\0"),
        (Kind.STDIN_END, b""),
    ]
    guest.say(Frame(Kind.STARTED, number, bytes(4)), Frame(Kind.ROOM, number, b"\5\0\0\0"))
    guest.say(
        Frame(Kind.STDOUT, number, b"out"), Frame(Kind.STDERR, number, b"err"), Frame(Kind.EXIT, number, b"\0\3\0\0")
    )
    said = [process.read(DEADLINE) for _ in range(3)]
    assert said == [ProcessOutput(b"out"), ProcessOutput(b"err", errors=True), ProcessEnd(3)]
    assert process.read(0) == ProcessEnd(3)


@pytest.mark.parametrize(
    ("frame", "end"),
    [
        ((Kind.EXIT, b"\x09\0\0\0"), ProcessEnd(137)),
        ((Kind.FAILED, frames.FAILURE.pack(Stage.PROGRAM, 2)), 127),
        ((Kind.FAILED, frames.FAILURE.pack(Stage.PROGRAM, 13)), 126),
        ((Kind.FAILED, frames.FAILURE.pack(Stage.DIRECTORY, 2)), 126),
        ((Kind.FAILED, frames.FAILURE.pack(99, 77777)), 126),
        ((Kind.FAILED, frames.FAILURE.pack(Stage.AGENT, 11)), 125),
    ],
)
def test_ends_have_the_statuses_of_a_shell(
    guest: Guest, session: Session, frame: tuple[Kind, bytes], end: ProcessEnd | int
) -> None:
    process = session.execute(Execution(command=("x",)))
    guest.say(Frame(frame[0], process.number, frame[1]))
    found = process.read(DEADLINE)
    assert isinstance(found, ProcessEnd)
    assert found == end or (found.outcome is Outcome.NOT_STARTED and found.status == end and found.message)


BREACHES: dict[str, Callable[[int], list[Frame | bytes]]] = {
    "output before there is room": lambda number: [Frame(Kind.STDOUT, number, b"x" * 4096)] * (OUTPUT_ROOM // 4096 + 1),
    "a command that is none": lambda number: [Frame(Kind.STDOUT, number + 1, b"x")],
    "an end of another length": lambda number: [Frame(Kind.EXIT, number, b"\0")],
    "an end that comes twice": lambda number: [Frame(Kind.EXIT, number, bytes(4))] * 2,
    "room for what was not sent": lambda number: [Frame(Kind.ROOM, number, b"\1\0\0\0")],
    "a frame of no kind": lambda number: [Frame(200, number)],
    "empty output": lambda number: [Frame(Kind.STDOUT, number)],
    "no frame": lambda number: [b"\5\5\5\0"],
    "an identity that it cannot take": lambda number: [Frame(Kind.IDENTIFIED, 0, b"\1\0\0\0")],
    "an errno that is none": lambda number: [Frame(Kind.IDENTIFIED, 0, b"\xff" * 4)],
    "a new beginning": lambda number: [Frame(Kind.READY, 0, WELCOME)],
}


@pytest.mark.parametrize("breach", BREACHES)
def test_an_agent_that_breaks_the_protocol_is_not_listened_to_any_more(
    guest: Guest, session: Session, breach: str
) -> None:
    process, other = (session.execute(Execution(command=("x",))) for _ in range(2))
    session._last_id = 500
    guest.say(*BREACHES[breach](other.number))
    while not isinstance(end := process.read(DEADLINE), ProcessEnd):
        assert end is not None
    assert end.outcome is Outcome.LOST
    with pytest.raises(AgentUnavailable):
        session.execute(Execution(command=("x",)))


def test_output_that_is_read_makes_room_for_more(guest: Guest, session: Session) -> None:
    process = session.execute(Execution(command=("x",)))
    for _ in range(3 * OUTPUT_ROOM // 4096):
        guest.say(Frame(Kind.STDOUT, process.number, b"x" * 4096))
        assert process.read(DEADLINE) == ProcessOutput(b"x" * 4096)
    assert not session.ended


def test_a_command_that_is_let_go_of_is_told_and_its_last_words_go_nowhere(guest: Guest, session: Session) -> None:
    process = session.execute(Execution(command=("x",)))
    process.close()
    assert guest.heard[-1].kind == Kind.FORGET
    guest.say(*[Frame(Kind.STDOUT, process.number, b"x" * 4096)] * 200, Frame(Kind.EXIT, process.number, bytes(4)))
    guest.say(Frame(Kind.EXIT, session.execute(Execution(command=("y",))).number, bytes(4)))
    assert not session.ended


def test_a_time_limit_kills_what_does_not_end(guest: Guest, session: Session) -> None:
    process = session.execute(Execution(command=("x",), timeout=0.001))
    guest.answer = lambda frame: [Frame(Kind.EXIT, frame.command, b"\x09\0\0\0")] if frame.kind == Kind.SIGNAL else []
    assert process.read(0.01) is None or guest.heard[-1].body == b"\x09"
    guest.flush()
    end = process.read(DEADLINE)
    assert isinstance(end, ProcessEnd)
    assert (end.status, end.outcome) == (119, Outcome.TIMED_OUT)


def test_an_agent_that_talks_and_does_not_listen_holds_nobody_up(
    guest: Guest, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_session, "STUCK_SECONDS", 0.1)
    process = session.execute(Execution(command=("x",), timeout=0.001))
    guest.deaf = True
    talks, over = threading.Event(), threading.Event()

    def talk() -> None:
        while not over.wait(0.001):  # each event wakes whoever waits for room in the ring
            guest.console.service()
            talks.set()

    talker = threading.Thread(target=talk)
    talker.start()
    assert talks.wait(DEADLINE)
    writer = threading.Thread(target=process.write, args=(b"x" * (16 << 10),))
    writer.start()
    end = process.read(DEADLINE)
    writer.join()
    over.set()
    talker.join()
    assert isinstance(end, ProcessEnd)
    assert "takes nothing" in session.ended


def test_output_of_a_byte_each_takes_the_room_of_its_bytes() -> None:
    class Drips:
        left = 1 << 17

        def read(self, timeout: float | None = None) -> ProcessOutput | ProcessEnd:
            self.left -= 1
            return ProcessOutput(bytes([self.left & 127]), errors=bool(self.left & 1)) if self.left else ProcessEnd(0)

        def end_input(self) -> None: ...
        def close(self) -> None: ...

    drips = cast(ProcessStream, Drips())
    tracemalloc.start()
    try:
        done, _ = finish(drips)
        assert tracemalloc.get_traced_memory()[1] < 8 * Drips.left
    finally:
        tracemalloc.stop()
    assert (len(done.output), len(done.stdout)) == (Drips.left - 1, Drips.left // 2 - 1)


def test_the_end_of_the_domain_is_the_end_of_its_commands(guest: Guest, session: Session) -> None:
    process = session.execute(Execution(command=("x",)))
    guest.console.close()
    assert process.read(DEADLINE) == ProcessEnd(125, Outcome.LOST, "the domain has ended")
    process.write(b"x" * 100_000)


@pytest.mark.parametrize(
    "execution",
    [
        Execution(command=()),
        Execution(command=("a\0b",)),
        Execution(command=("a",), environment={"=": "x"}),
        Execution(command=("a", "x" * 300_000)),
        Execution(command=("a",) * 5000),
        Execution(command=("a",), limits={"nonsense": 1}),
    ],
)
def test_commands_that_cannot_be_are_refused(session: Session, execution: Execution) -> None:
    with pytest.raises(InvalidRequest):
        session.execute(execution)
