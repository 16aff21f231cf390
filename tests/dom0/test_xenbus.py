"""The handshake of back-ends with a front-end that the test plays in xenstore."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

import pytest

from xenolith.abi.xenbus import XenbusState as S
from xenolith.dom0.bell import Bell
from xenolith.dom0.xenbus import Backend, Device, FrontendError, FrontendNodes, Xenbus
from xenolith.dom0.xenstore import XenstoreService

from .frontends import DEADLINE_SECONDS, Follower, running_store, state


class Toy(Backend):
    """Records what is asked of it."""

    kind: ClassVar[str] = "toy"

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.threads: set[int] = set()
        self.breaks: set[str] = set()
        self.served = threading.Event()
        self.ring: Callable[[], None] = lambda: None
        self.size = 10

    def _note(self, call: str) -> None:
        self.calls.append(call)
        self.threads.add(threading.get_ident())
        if call in self.breaks:
            raise RuntimeError(f"{call} is broken")

    def offer(self) -> Mapping[str, str]:
        return {"feature-toy": "1"}

    def connect(self, nodes: FrontendNodes, bell: Bell) -> None:
        self._note("connect")
        self.ring = bell.ring
        nodes.number("ring-ref", 100)

    def describe(self) -> Mapping[str, str]:
        return {"size": str(self.size)}

    def serve(self) -> bool:
        self._note("serve")
        self.served.set()
        return False

    def disconnect(self) -> None:
        self._note("disconnect")

    def close(self) -> None:
        self._note("close")


class Guest:
    """A front-end's hands on xenstore, and dom0's Xenbus across from it."""

    def __init__(self, store: XenstoreService) -> None:
        self.store = store
        self.log: list[str] = []
        self.xenbus = Xenbus(store, self.log.append)
        self.toy = Toy()
        store.mkdir("/local/domain/7", ["n0", "r7"])
        self.device: Device[Toy] = self.xenbus.plug(7, 3, self.toy, {"tag": "f"}, {"label": "b"})
        self.front, self.back = self.device.frontend, self.device.directory
        self._state = Follower(store, f"{self.back}/state")

    def says(self, value: S, **nodes: str) -> None:
        for name, text in nodes.items():
            self.store.write(f"{self.front}/{name.replace('_', '-')}", text)
        self.store.write(f"{self.front}/state", state(value))

    def sees(self, value: S) -> None:
        self._state.wait(state(value))

    def connect(self) -> None:
        self.says(S.INITIALISED, ring_ref="8")
        self.sees(S.CONNECTED)
        self.says(S.CONNECTED)


@pytest.fixture
def guest() -> Iterator[Guest]:
    with running_store() as store:
        made = Guest(store)
        yield made
        made.device.stop()
        assert made.toy.calls.count("close") == 1
        assert made.toy.calls[-1] == "close"
        assert len(made.toy.threads) == 1, "a back-end is called on its device's thread only"


def test_a_new_device_is_described_to_its_front_end(guest: Guest) -> None:
    store = guest.store
    assert {name: store.read(f"{guest.front}/{name}") for name in store.directory(guest.front)} == {
        "backend": "/local/domain/0/backend/toy/7/3",
        "backend-id": "0",
        "state": state(S.INITIALISING),
        "tag": "f",
    }
    assert {name: store.read(f"{guest.back}/{name}") for name in store.directory(guest.back)} == {
        "frontend": "/local/domain/7/device/toy/3",
        "frontend-id": "7",
        "online": "1",
        "label": "b",
        "feature-toy": "1",
        "state": state(S.INIT_WAIT),
    }
    assert store.get_perms(guest.front) == store.get_perms(f"{guest.front}/state") == ["n7", "r0"]
    assert store.get_perms(guest.back) == store.get_perms(f"{guest.back}/state") == ["n0", "r7"]


def test_the_device_connects_and_serves(guest: Guest) -> None:
    guest.connect()
    assert guest.store.read(f"{guest.back}/size") == "10"
    assert guest.toy.served.wait(DEADLINE_SECONDS), "requests may have come before the connection"
    guest.toy.served.clear()
    guest.toy.ring()
    assert guest.toy.served.wait(DEADLINE_SECONDS)


def test_a_second_device_with_the_same_number_is_refused(guest: Guest) -> None:
    with pytest.raises(ValueError, match="already"):
        guest.xenbus.plug(7, 3, Toy(), {}, {})


def test_closing_waits_for_the_front_end_to_see_it(guest: Guest) -> None:
    """Linux's power-off waits five seconds for each device whose back-end it does not see in Closing."""
    guest.connect()
    guest.says(S.CLOSING)
    guest.sees(S.CLOSING)
    assert "disconnect" not in guest.toy.calls, "the front-end may still have requests"
    guest.says(S.CLOSED)
    guest.sees(S.CLOSED)
    assert guest.toy.calls.count("disconnect") == 1


def test_a_front_end_that_begins_again_gets_a_new_connection(guest: Guest) -> None:
    guest.connect()
    guest.says(S.CLOSED)
    guest.sees(S.CLOSED)
    guest.says(S.INITIALISING)
    guest.sees(S.INIT_WAIT)
    guest.connect()
    guest.says(S.INITIALISING)  # as after a resume, which says no goodbye
    guest.sees(S.INIT_WAIT)
    guest.connect()
    assert [call for call in guest.toy.calls if call != "serve"] == ["connect", "disconnect"] * 2 + ["connect"]


def test_unplugging_asks_the_front_end_and_then_removes_both_directories(guest: Guest) -> None:
    guest.connect()
    done: list[bool] = []
    unplugging = threading.Thread(target=lambda: done.append(guest.xenbus.unplug(guest.device, DEADLINE_SECONDS)))
    unplugging.start()
    guest.sees(S.CLOSING)
    assert guest.store.read(f"{guest.back}/online") == "0"
    guest.says(S.CLOSED)
    unplugging.join()
    assert done == [True]
    assert not guest.store.exists(guest.front)
    assert not guest.store.exists(guest.back)


def test_a_device_that_no_driver_took_is_unplugged_at_once(guest: Guest) -> None:
    assert guest.xenbus.unplug(guest.device, DEADLINE_SECONDS)
    assert guest.toy.calls == ["close"]


def test_a_front_end_that_keeps_its_device_loses_it_by_force_only(guest: Guest) -> None:
    guest.connect()
    assert not guest.xenbus.unplug(guest.device, timeout=0)
    assert guest.store.exists(guest.back)
    assert guest.xenbus.unplug(guest.device, timeout=0, force=True)
    assert not guest.store.exists(guest.back)
    assert "disconnect" in guest.toy.calls


@pytest.mark.parametrize("value", ["", "x", "-1", "100", "1e1", "٣", " 1", "1" * 100_000, None])
def test_a_number_that_is_none_closes_the_device_and_names_the_node(guest: Guest, value: str | None) -> None:
    if value is not None:
        guest.store.write(f"{guest.front}/ring-ref", value)
    guest.says(S.INITIALISED)
    guest.sees(S.CLOSING)
    assert guest.toy.calls.count("disconnect") == 1, "what was mapped before is given up"
    assert "ring-ref" in guest.store.read(f"{guest.back}/error")
    assert any("ring-ref" in line and "d7" in line and len(line) < 300 for line in guest.log)
    guest.says(S.CLOSED)
    guest.sees(S.CLOSED)


@pytest.mark.parametrize("call", ["connect", "serve", "disconnect"])
def test_a_back_end_that_breaks_closes_its_own_device_with_a_line_in_the_log(guest: Guest, call: str) -> None:
    guest.toy.breaks.add(call)
    guest.says(S.INITIALISED, ring_ref="8")
    if call == "disconnect":
        guest.sees(S.CONNECTED)
        guest.says(S.CLOSED)
    guest.sees(S.CLOSED if call == "disconnect" else S.CLOSING)
    assert any(f"{call} is broken" in line for line in guest.log)
    guest.says(S.INITIALISING)
    guest.says(S.INITIALISED)
    guest.says(S.CLOSED)
    guest.sees(S.CLOSED)
    assert guest.toy.calls.count("connect") == 1, "a device that failed stays closed"


@pytest.mark.parametrize("value", ["", "0", "9", "-1", "44", "4 ", "four", "4" * 5000])
def test_nonsense_in_the_state_is_as_no_state(guest: Guest, value: str) -> None:
    guest.connect()
    guest.store.write(f"{guest.front}/state", value)
    guest.sees(S.CLOSED)
    assert "disconnect" in guest.toy.calls


def test_a_front_end_that_removes_its_directory_has_closed(guest: Guest) -> None:
    guest.connect()
    guest.store.rm(guest.front)
    guest.sees(S.CLOSED)
    assert "disconnect" in guest.toy.calls


def test_what_changed_is_told_to_a_connected_front_end(guest: Guest) -> None:
    guest.connect()
    size = Follower(guest.store, f"{guest.back}/size")
    again = threading.Event()
    watch = guest.store.watch(f"{guest.back}/state", lambda path: again.set())
    again.wait(DEADLINE_SECONDS)
    again.clear()
    guest.toy.size = 20
    guest.device.refresh()
    size.wait("20")
    assert again.wait(DEADLINE_SECONDS), "the state is written again, which is what front-ends watch"
    watch.cancel()


def test_nothing_of_a_device_stays(guest: Guest) -> None:
    guest.connect()
    before = threading.active_count(), len(os.listdir("/proc/self/fd")), guest.store.statistics()["watches"]
    for number in range(20):
        device = guest.xenbus.plug(7, 100 + number, Toy(), {}, {})
        device.stop()
        guest.xenbus.remove(device)
    assert before == (
        threading.active_count(),
        len(os.listdir("/proc/self/fd")),
        guest.store.statistics()["watches"],
    )


def test_an_error_of_the_front_ends_while_it_is_served_closes_the_device(guest: Guest) -> None:
    def lie() -> bool:
        raise FrontendError("its ring lies")

    guest.toy.serve = lie  # type: ignore[method-assign]
    guest.says(S.INITIALISED, ring_ref="8")
    guest.sees(S.CLOSING)
    assert guest.device.failure == "its front-end broke the protocol: its ring lies"


def test_a_host_that_gives_no_thread_costs_the_device_and_leaves_nothing(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    before = len(os.listdir("/proc/self/fd")), guest.store.statistics()["watches"]
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(ValueError, match="new thread"):
            guest.xenbus.plug(7, 9, Toy(), {}, {})
    assert not guest.store.exists("/local/domain/7/device/toy/9")
    assert not guest.store.exists("/local/domain/0/backend/toy/7/9")
    assert before == (len(os.listdir("/proc/self/fd")), guest.store.statistics()["watches"])
