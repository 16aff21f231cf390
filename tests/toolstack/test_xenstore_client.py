"""xenstore from Python: transactions and watches, over the socket that a machine in this process or a daemon has."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import xenolith
from xenolith.abi.xs_wire import HEADER, Op
from xenolith.dom0.xenstore import XenstoreService
from xenolith.toolstack.client import ConnectionLost
from xenolith.toolstack.xenstore_client import XenstoreClient, XenstoreWatch

PATIENCE = 30  # seconds; only broken code takes that long


@pytest.fixture
def service(tmp_path: Path) -> Iterator[XenstoreService]:
    service = XenstoreService()
    service.listen(tmp_path / "socket")
    service.start()
    yield service
    service.stop()


@pytest.fixture
def store(service: XenstoreService, tmp_path: Path) -> Iterator[XenstoreClient]:
    with XenstoreClient(tmp_path / "socket") as store:
        yield store


def test_a_transaction_takes_effect_as_a_whole_at_its_end(store: XenstoreClient, service: XenstoreService) -> None:
    store.write("/a", "1")
    with store.transaction() as transaction:
        transaction.write("/b", transaction.read("/a"))
        transaction.rm("/a")
        assert "b" in transaction.directory("/")
        assert (store.read("/a"), service.get("/b")) == ("1", None)
    assert (service.get("/a"), store.read("/b")) == (None, "1")


def test_an_exception_abandons_a_transaction(store: XenstoreClient, service: XenstoreService) -> None:
    with pytest.raises(KeyError), store.transaction() as transaction:
        transaction.write("/a", "1")
        raise KeyError
    assert service.get("/a") is None
    assert service.statistics()["transactions"] == 0


def test_a_transaction_fails_when_somebody_changed_what_it_looked_at(store: XenstoreClient) -> None:
    store.write("/a", "1")

    def add(interferes: bool) -> None:
        with store.transaction() as transaction:
            value = int(transaction.read("/a"))
            if interferes:
                store.write("/a", "10")
            transaction.write("/a", str(value + 1))

    with pytest.raises(xenolith.XenstoreConflict) as caught:
        add(interferes=True)
    assert caught.value.name == "EAGAIN"
    add(interferes=False)
    assert store.read("/a") == "11"


def test_a_transaction_that_has_ended_is_no_transaction(store: XenstoreClient) -> None:
    with store.transaction() as transaction:
        pass
    with pytest.raises(xenolith.XenstoreError, match="ENOENT"):
        transaction.read("/")


def test_a_watch_begins_with_its_own_path_and_tells_of_every_change_below(
    store: XenstoreClient, service: XenstoreService
) -> None:
    with store.watch("/w") as watch:
        assert watch.read(PATIENCE) == "/w"
        assert watch.read(0) is None
        service.write("/w/x", "1")
        assert watch.read(PATIENCE) == "/w/x"
        store.rm("/w")
        assert watch.read(PATIENCE) == "/w"
        with store.transaction() as transaction:
            transaction.write("/w/y", "1")
            assert watch.read(0) is None
        assert watch.read(PATIENCE) == "/w/y"


def test_watches_are_of_their_own(store: XenstoreClient, service: XenstoreService) -> None:
    with store.watch("/a") as a, store.watch("/b") as b:
        assert (a.read(PATIENCE), b.read(PATIENCE)) == ("/a", "/b")
        store.write("/b", "1")
        assert b.read(PATIENCE) == "/b"
        assert a.read(0) is None
        assert service.statistics()["watches"] == 2


def test_a_watch_ends_when_it_is_closed_while_somebody_waits(store: XenstoreClient) -> None:
    watch = store.watch("/w")
    seen: list[str] = []
    first = threading.Event()

    def follow() -> None:
        for path in watch:
            seen.append(path)
            first.set()

    thread = threading.Thread(target=follow)
    thread.start()
    assert first.wait(PATIENCE)
    watch.close()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert seen == ["/w"]
    assert watch.read() == ""
    watch.close()


def test_closing_the_client_ends_its_watches(service: XenstoreService, tmp_path: Path) -> None:
    with XenstoreClient(tmp_path / "socket") as store:
        watch = store.watch("@releaseDomain")
        assert watch.read(PATIENCE) == "@releaseDomain"
    assert watch.read() == ""


def test_a_watch_that_is_refused_leaves_no_connection(store: XenstoreClient, service: XenstoreService) -> None:
    with pytest.raises(xenolith.XenstoreError, match="EINVAL"):
        store.watch("//")
    store.read("/")  # by now the service has noticed
    assert service.statistics()["watches"] == 0


def test_an_event_that_comes_in_pieces_is_not_lost(tmp_path: Path) -> None:
    event = HEADER.pack(Op.WATCH_EVENT, 0, 0, 9) + b"/w\0watch\0"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "slow"))
        listener.listen()
        listener.settimeout(PATIENCE)
        accepted: list[socket.socket] = []

        def answer() -> None:
            peer, _ = listener.accept()
            accepted.append(peer)
            peer.recv(100)
            peer.sendall(HEADER.pack(Op.WATCH, 0, 0, 3) + b"OK\0" + event[:20])

        thread = threading.Thread(target=answer)
        thread.start()
        with XenstoreWatch(tmp_path / "slow", "/w") as watch:
            thread.join()
            assert watch.read(0) is None
            accepted[0].sendall(event[20:])
            assert watch.read(PATIENCE) == "/w"
            accepted[0].close()
            assert watch.read(PATIENCE) == ""


def test_without_a_service_there_is_no_client(tmp_path: Path) -> None:
    with pytest.raises(ConnectionLost, match="cannot connect to xenstore"):
        XenstoreClient(tmp_path / "nobody")


def test_a_machine_in_this_process_has_it_too() -> None:
    with xenolith.power_on(64, engine="unicorn") as machine:
        with machine.xenstore.transaction() as transaction:
            transaction.write("/t", transaction.read("/local/domain/0/name"))
        watch = machine.xenstore.watch("/t")
        assert watch.read(PATIENCE) == "/t"
        assert machine.xenstore.read("/t") == "Domain-0"
    assert watch.read(PATIENCE) == ""
