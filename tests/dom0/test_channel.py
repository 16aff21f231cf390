"""A channel whose front-end the test plays."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from xenolith.abi.xenbus import XenbusState as S
from xenolith.dom0.channel import Channel, describe
from xenolith.dom0.event_thread import EventThread

from .frontends import FakeDom0, Follower, running_store, state

DOMID, NUMBER = 7, 1


class AtOnce:
    """dom0's event thread, which is whoever calls."""

    def on_event(self, work: Callable[[], None]) -> Callable[[int], None]:
        return lambda port: work()


def test_a_front_end_without_a_ring_is_told_of_once_and_may_come_with_one() -> None:
    with running_store() as store:
        dom0 = FakeDom0()
        store.transact(lambda within: describe(within, DOMID, NUMBER, "agent"))
        front = f"/local/domain/{DOMID}/device/console/{NUMBER}"
        channel = Channel(dom0.hypercalls, store, cast(EventThread, AtOnce()), DOMID, NUMBER)
        theirs = Follower(store, f"/local/domain/0/backend/console/{DOMID}/{NUMBER}/state")
        for ref in ("1", "-1", "", "9" * 60):
            for value, answer in ((S.INITIALISING, S.INIT_WAIT), (S.INITIALISED, S.CLOSING)):
                store.write(f"{front}/ring-ref", ref)
                store.write(f"{front}/port", "3")
                store.write(f"{front}/state", state(value))
                theirs.wait(state(answer))
        assert len(dom0.lines) == 1 and "ring cannot be reached" in dom0.lines[0]
        dom0.grant(8)
        store.write(f"{front}/state", state(S.INITIALISING))
        theirs.wait(state(S.INIT_WAIT))
        store.write(f"{front}/ring-ref", "8")
        store.write(f"{front}/state", state(S.CONNECTED))
        theirs.wait(state(S.CONNECTED))
        assert channel.open(60) is not None
        channel.close()
        assert dom0.mapped == {} and 3 in dom0.unbound
        theirs.close()
