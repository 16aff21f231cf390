"""What a domain may have at most is what the toolstack said when it was made."""

from __future__ import annotations

from xenolith.abi.errno import ENOSPC
from xenolith.hypervisor.control import Limits

from .bare import BareMachine


def test_event_channels_end_at_the_limit() -> None:
    machine = BareMachine()
    domid = machine.control.create_domain(bytes(16), 1, 64, Limits(event_channel_port=5))
    events = machine.hypervisor.domains[domid].events
    assert [events.alloc_unbound(0) for _ in range(7)] == [1, 2, 3, 4, 5, -ENOSPC, -ENOSPC]


def test_a_larger_limit_than_usual_is_had() -> None:
    machine = BareMachine()
    domid = machine.control.create_domain(bytes(16), 1, 64, Limits(event_channel_port=2000))
    events = machine.hypervisor.domains[domid].events
    assert [events.alloc_unbound(0) for _ in range(2001)] == [*range(1, 2001), -ENOSPC]


def test_grant_frames_and_mappings_end_at_the_limits() -> None:
    machine = BareMachine()
    limits = Limits(grant_frames=3, mappings=7)
    domid = machine.control.create_domain(bytes(16), 1, 64, limits)
    grants = machine.hypervisor.domains[domid].grants
    assert (grants.max_frames, grants.max_mappings) == (3, 7)
