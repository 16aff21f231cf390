"""The network of a machine: its router, its ways to the outside, and who is attached."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from xenolith.dom0.network.port import VifPort
from xenolith.dom0.network.router import Router
from xenolith.dom0.network.rules import Policy, parse_rules

if TYPE_CHECKING:
    from xenolith.dom0.backends.net import VifSpec


class Network:
    """What dom0 has of networks."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self.router: Final = Router()
        self._log: Final = log

    def attach(self, domain: str, spec: VifSpec, wake: Callable[[], None]) -> tuple[VifPort, Callable[[], None]]:
        """Make a port for an interface of a domain's; and what takes it away. Raises RuleError and AddressError."""
        router = self.router
        policy = Policy(parse_rules(spec.rules))
        with router.turns:
            vif = VifPort(
                router.number(),
                f"vif{spec.number} of {domain}",
                wake,
                domain=domain,
                mac=spec.mac,
                address=router.address_for(spec.mac, spec.ip),
                policy=policy,
                clock=router.clock,
                mtu=spec.mtu,
                publications=spec.publications,
            )
            router.attach(vif)

        def detach() -> None:
            with router.turns:
                router.detach(vif)

        return vif, detach

    def close(self) -> None:
        """Nobody is attached any more."""
