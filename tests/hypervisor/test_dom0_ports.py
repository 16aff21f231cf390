"""dom0's event channels suffice for thousands of domains; it has no bitmaps that would end at 4,096."""

from __future__ import annotations

from xenolith.dom0.power import power_on
from xenolith.hypervisor.lifecycle import OF_DOM0


def test_dom0_has_more_event_channels_than_the_two_level_bitmap() -> None:
    with power_on([16], "unicorn") as dom0:
        ports = [dom0.domain.alloc_unbound(0) for _ in range(5000)]
        assert len(set(ports)) == 5000
        assert max(ports) > 4096
        assert OF_DOM0.event_channel_port > 15_000
