"""The running service: threads, the socket and dom0's own calls. Waits are for events, never for time to pass."""

from __future__ import annotations

import os
import queue
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from xenolith.abi import xs_wire
from xenolith.abi.xs_wire import HEADER, INDEX, Op
from xenolith.dom0.xenstore import HostRequests, RingConnection, XenstoreService, XsError

from .wire import Message, pack, unpack

PATIENCE: Final = 30  # seconds; only a broken service takes that long


@pytest.fixture
def service() -> Iterator[XenstoreService]:
    service = XenstoreService()
    service.start()
    yield service
    service.stop()


@pytest.fixture
def path(service: XenstoreService, tmp_path: Path) -> Path:
    service.listen(tmp_path / "socket")
    return tmp_path / "socket"


class Tool:
    """A blocking client on the socket."""

    def __init__(self, path: Path) -> None:
        self.stream: Final = socket.socket(socket.AF_UNIX)
        self.stream.settimeout(PATIENCE)
        self.stream.connect(str(path))

    def receive(self) -> Message:
        header = self._exactly(HEADER.size)
        return unpack(header + self._exactly(HEADER.unpack(header)[3]))[0]

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            chunk = self.stream.recv(count - len(data))
            if not chunk:
                raise EOFError
            data += chunk
        return data

    def ask(self, op: Op, payload: bytes, tx: int = 0) -> bytes:
        self.stream.sendall(pack(op, payload, tx))
        while (answer := self.receive())[0] == Op.WATCH_EVENT:
            pass
        assert answer[0] == op, answer
        return answer[3]


class Guest:
    """A guest with its ring in a page; ``notified`` is what its event channel would tell."""

    def __init__(self) -> None:
        self.page: Final = bytearray(4096)
        self.notified: Final = threading.Semaphore(0)
        self.ring: RingConnection

    def ask(self, op: Op, payload: bytes) -> Message:
        message = pack(op, payload)
        produced = INDEX.unpack_from(self.page, xs_wire.REQ_PROD)[0]
        for byte in message:
            self.page[produced % 1024] = byte
            produced += 1
        INDEX.pack_into(self.page, xs_wire.REQ_PROD, produced)
        self.ring.on_event()
        received = b""
        consumed = INDEX.unpack_from(self.page, xs_wire.RSP_CONS)[0]
        while len(received) < 16 or len(received) < 16 + HEADER.unpack_from(received)[3]:
            assert self.notified.acquire(timeout=PATIENCE)
            while consumed != INDEX.unpack_from(self.page, xs_wire.RSP_PROD)[0]:
                received += bytes([self.page[1024 + consumed % 1024]])
                consumed += 1
            INDEX.pack_into(self.page, xs_wire.RSP_CONS, consumed)
        return unpack(received)[0]


def connect(service: XenstoreService, domid: int) -> Guest:
    guest = Guest()
    service.mkdir(f"/local/domain/{domid}", ["n0", f"r{domid}"])
    service.mkdir(f"/local/domain/{domid}/data", [f"n{domid}"])
    guest.ring = service.introduce(domid, memoryview(guest.page), guest.notified.release)
    return guest


def test_dom0s_code_reads_writes_lists_and_removes(service: XenstoreService) -> None:
    service.write("/a/b", "value")
    service.write("c", "relative")
    assert service.read("/a/b") == "value"
    assert service.read("/local/domain/0/c") == "relative"
    assert service.directory("/a") == ["b"]
    assert service.exists("/a") and not service.exists("/none")
    assert service.get("/none") is None
    with pytest.raises(XsError, match="ENOENT"):
        service.read("/none")
    service.set_perms("/a/b", ["n0", "r5"])
    assert service.get_perms("/a/b") == ["n0", "r5"]
    service.rm("/a")
    service.rm("/a/b/never/was")
    assert not service.exists("/a")


def test_any_bytes_survive_a_read_and_a_write_by_dom0s_code(service: XenstoreService, path: Path) -> None:
    everything = bytes(range(256))
    tool = Tool(path)
    tool.ask(Op.WRITE, b"/raw\0" + everything)
    service.write("/copy", service.read("/raw"))
    assert tool.ask(Op.READ, b"/copy\0") == everything


def test_a_transaction_of_dom0_happens_at_once_or_not_at_all(service: XenstoreService) -> None:
    with service.transaction() as transaction:
        transaction.write("/t/a", "1")
        transaction.write("/t/b", "2")
        assert not service.exists("/t")
    assert service.directory("/t") == ["a", "b"]
    with pytest.raises(KeyError), service.transaction() as transaction:
        transaction.write("/t/c", "3")
        raise KeyError
    assert service.directory("/t") == ["a", "b"]
    with pytest.raises(XsError, match="EAGAIN"), service.transaction() as transaction:
        transaction.write("/t/a", transaction.read("/t/a") + "!")
        service.write("/t/a", "other")
    assert service.read("/t/a") == "other"


def test_transact_tries_again_until_nobody_interferes(service: XenstoreService) -> None:
    service.write("/count", "0")

    def count_up(store: HostRequests) -> None:
        store.write("/count", str(int(store.read("/count")) + 1))

    def count_fifty_times() -> None:
        for _ in range(50):
            service.transact(count_up)

    threads = [threading.Thread(target=count_fifty_times) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert service.read("/count") == "200"


def test_a_watch_calls_back_first_at_once_and_then_for_each_change_until_cancelled(service: XenstoreService) -> None:
    events: queue.Queue[str] = queue.Queue()
    watch = service.watch("/w", events.put)
    assert events.get(timeout=PATIENCE) == "/w"
    service.write("/w/x", "1")
    assert events.get(timeout=PATIENCE) == "/w/x"
    watch.cancel()
    watch.cancel()
    service.write("/w/y", "1")
    service.watch("/last", events.put)
    assert events.get(timeout=PATIENCE) == "/last"
    assert service.statistics()["watches"] == 1


def test_a_failing_callback_disturbs_no_other(service: XenstoreService, caplog: pytest.LogCaptureFixture) -> None:
    events: queue.Queue[str] = queue.Queue()
    service.watch("/w", lambda path: events.put(str(1 / 0)))
    service.watch("/w", events.put)
    assert events.get(timeout=PATIENCE) == "/w"
    assert "a watch callback for /w failed" in caplog.text


def test_a_guest_is_served_through_its_ring_and_event_channel(service: XenstoreService) -> None:
    guest = connect(service, 3)
    assert guest.ask(Op.WRITE, b"data/x\0hello")[3] == b"OK\0"
    assert service.read("/local/domain/3/data/x") == "hello"


def test_introducing_and_releasing_a_domain_is_told_to_watchers(service: XenstoreService) -> None:
    events: queue.Queue[str] = queue.Queue()
    service.watch("@introduceDomain", events.put)
    service.watch("@releaseDomain", events.put)
    assert {events.get(timeout=PATIENCE), events.get(timeout=PATIENCE)} == {"@introduceDomain", "@releaseDomain"}
    connect(service, 3)
    assert events.get(timeout=PATIENCE) == "@introduceDomain"
    service.domain_event("@releaseDomain")
    assert events.get(timeout=PATIENCE) == "@releaseDomain"
    service.release(3)
    assert events.get(timeout=PATIENCE) == "@releaseDomain"
    with pytest.raises(XsError, match="ENOENT"):
        service.release(3)


def test_after_release_the_page_is_not_touched_and_nothing_of_the_domain_is_left(service: XenstoreService) -> None:
    before = service.statistics()
    for domid in range(1, 50):
        guest = connect(service, domid)
        guest.ask(Op.WATCH, b"data\0t\0")
        service.release(domid)
        service.rm(f"/local/domain/{domid}")
        guest.page[:] = bytes(4096)
        guest.ring.on_event()
        service.write("/local/domain/0/x", "y")
        assert not any(guest.page)
    service.rm("/local")
    assert service.statistics() == before


def test_a_guest_that_floods_does_not_keep_another_from_its_answers(service: XenstoreService) -> None:
    flooder, honest = connect(service, 3), connect(service, 4)
    flooder.page[:1024] = (pack(Op.READ, b"data\0") * 50)[:1024].ljust(1024, b"\0")
    INDEX.pack_into(flooder.page, xs_wire.REQ_PROD, 1024)
    for _ in range(200):
        flooder.ring.on_event()
        assert honest.ask(Op.READ, b"data\0")[0] == Op.READ


def test_the_socket_is_ours_alone(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_socket_of_a_dead_daemon_is_replaced_and_that_of_a_living_one_is_not(path: Path, tmp_path: Path) -> None:
    second = XenstoreService()
    with pytest.raises(FileExistsError, match="another daemon serves xenstore on"):
        second.listen(path)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead"))
    second.listen(tmp_path / "dead")
    (tmp_path / "file").write_text("precious")
    third = XenstoreService()
    with pytest.raises(FileExistsError, match="is no socket"):
        third.listen(tmp_path / "file")
    second.stop()
    third.stop()
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user to try")
def test_another_user_is_hung_up_on_even_where_the_file_modes_let_him_in(path: Path) -> None:
    listener = str(path)
    path.chmod(0o666)
    with tempfile.TemporaryDirectory() as public:
        os.chmod(public, 0o755)
        link = Path(public) / "socket"
        os.link(listener, link)
        stranger = (
            f"import os, socket; os.setuid(65534); s = socket.socket(socket.AF_UNIX); s.connect({str(link)!r});"
            f"s.sendall({pack(Op.READ, b'/tool' + bytes(1))!r}); print(s.recv(100))"
        )
        result = subprocess.run([sys.executable, "-c", stranger], capture_output=True, text=True, timeout=PATIENCE)
    assert result.stdout == "b''\n" or "ConnectionResetError" in result.stderr or "BrokenPipeError" in result.stderr


def test_a_tool_that_sends_half_a_message_or_reads_nothing_stalls_nobody(service: XenstoreService, path: Path) -> None:
    half, deaf, busy = Tool(path), Tool(path), Tool(path)
    half.stream.sendall(pack(Op.READ, b"/tool\0")[:10])
    busy.ask(Op.WRITE, b"/big\0" + b"x" * 4000)
    deaf.ask(Op.WATCH, b"/\0t\0")
    deaf.stream.settimeout(0)
    flood = pack(Op.READ, b"/big\0") * 1000
    with pytest.raises(BlockingIOError):
        while True:
            flood = flood[deaf.stream.send(flood) :] or pack(Op.READ, b"/big\0") * 1000
    for _ in range(100):
        busy.ask(Op.WRITE, b"/x\0y")
    half.stream.sendall(pack(Op.READ, b"/tool\0")[10:])
    assert half.receive()[0] == Op.READ


def test_a_tool_that_vanishes_leaves_no_watch_and_no_transaction(service: XenstoreService, path: Path) -> None:
    gone, stays = Tool(path), Tool(path)
    gone.ask(Op.WATCH, b"/\0t\0")
    tx = int(gone.ask(Op.TRANSACTION_START, b"\0")[:-1])
    gone.ask(Op.WRITE, b"/never\0x", tx)
    assert service.statistics()["watches"] == 1
    gone.stream.close()
    while service.statistics()["sockets"] != 1:
        stays.ask(Op.READ, b"/\0")
    assert service.statistics()["watches"] == service.statistics()["transactions"] == 0
    assert not service.exists("/never")


def test_a_tool_that_lies_about_a_length_is_hung_up_on(path: Path) -> None:
    liar = Tool(path)
    liar.stream.sendall(HEADER.pack(Op.READ, 0, 0, xs_wire.PAYLOAD_MAX + 1))
    with pytest.raises(EOFError):
        liar.receive()


def test_introduce_by_a_tool_maps_the_domain_through_the_embedder(tmp_path: Path) -> None:
    guest = Guest()
    asked: list[tuple[int, int, int]] = []

    def map_domain(domid: int, mfn: int, port: int) -> tuple[memoryview, object]:
        if domid != 5:
            raise XsError("ENOENT", "no such domain")
        asked.append((domid, mfn, port))
        return memoryview(guest.page), guest.notified.release

    service = XenstoreService(map_domain=map_domain)  # type: ignore[arg-type]
    service.listen(tmp_path / "socket")
    service.start()
    try:
        tool = Tool(tmp_path / "socket")
        assert tool.ask(Op.INTRODUCE, b"5\x00123\x007\0") == b"OK\0"
        assert asked == [(5, 123, 7)]
        assert tool.ask(Op.IS_DOMAIN_INTRODUCED, b"5\0") == b"T\0"
        tool.stream.sendall(pack(Op.INTRODUCE, b"6\x001\x001\0"))
        assert tool.receive()[3] == b"ENOENT\0"
        assert tool.ask(Op.RELEASE, b"5\0") == b"OK\0"
        assert tool.ask(Op.IS_DOMAIN_INTRODUCED, b"5\0") == b"F\0"
    finally:
        service.stop()


def test_stopping_leaves_no_thread_and_no_socket(tmp_path: Path) -> None:
    threads = set(threading.enumerate())
    service = XenstoreService()
    service.listen(tmp_path / "socket")
    service.start()
    tool = Tool(tmp_path / "socket")
    tool.ask(Op.READ, b"/\0")
    service.stop()
    assert set(threading.enumerate()) == threads
    assert not (tmp_path / "socket").exists()
    with pytest.raises(EOFError):
        tool.receive()
