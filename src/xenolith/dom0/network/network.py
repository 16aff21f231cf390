"""The network of a machine: its router, its ways to the outside, and who is attached.

The outside is reached by passt, which is started when the first domain that may go there does; an interface with
published ports has a passt of its own, which listens on them.  XENOLITH_UPLINK says otherwise: `none`, or
`tap:NAME,ADDRESS/LENGTH,GATEWAY` for a TAP device (`tap`).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Interface
from typing import TYPE_CHECKING, Final

from xenolith.dom0.network.dns import Forwarder
from xenolith.dom0.network.link import Link, UplinkError
from xenolith.dom0.network.passt import Passt
from xenolith.dom0.network.port import UplinkPort, VifPort
from xenolith.dom0.network.router import Router
from xenolith.dom0.network.rules import Policy, parse_rules
from xenolith.dom0.network.tap import Tap

if TYPE_CHECKING:
    from xenolith.dom0.backends.net import VifSpec

RETRY_SECONDS: Final = 30.0  # after which a way to the outside that could not be opened is tried again


class Attachment:
    """An interface that takes part in the network, and its published ports."""

    def __init__(self, router: Router, vif: VifPort, log: Callable[[str], None]) -> None:
        self.vif: Final = vif
        self._router: Final = router
        self._log: Final = log
        self._own: Link | None = None

    def publish(self) -> None:
        """Open its published ports, if it has any and they are not open. Raises UplinkError."""
        vif = self.vif
        if vif.publications and self._own is None:
            self._own = Passt(self._router, [(vif, publication) for publication in vif.publications])
            self._own.failed = self._log
            vif.uplink = self._own.port

    def withdraw(self) -> None:
        """Close its published ports, and the connections that go through them."""
        own, self._own = self._own, None
        if own is not None:
            own.failed = None
            own.close()
            self.vif.uplink = None

    def detach(self) -> None:
        """It takes part no more."""
        with self._router.turns:
            self._router.detach(self.vif)
        self.withdraw()


class Network:
    """What dom0 has of networks."""

    def __init__(self, log: Callable[[str], None], uplink: str = "none") -> None:
        """`uplink` is as XENOLITH_UPLINK, or `passt`."""
        self.router: Final = Router()
        self._log: Final = log
        self._uplink: Final = uplink
        self._lock: Final = threading.Lock()  # of what follows
        self._link: Link | None = None
        self._opening: threading.Thread | None = None
        self._retry = 0.0
        self._closed = False
        self._forwarder: Final = Forwarder(self.router)
        self.router.resolver = self._forwarder
        self.router.open_uplink = self._wanted

    # --- the outside -------------------------------------------------------------------------------------------

    def _wanted(self) -> UplinkPort | None:
        """In the router's turn: begin to open the way to the outside, unless that was tried just now."""
        with self._lock:
            if self._link is not None:
                return self._link.port
            now = time.monotonic()
            if self._opening is None and now >= self._retry and not self._closed and self._uplink != "none":
                self._retry = now + RETRY_SECONDS
                self._opening = threading.Thread(target=self._open, name="uplink", daemon=True)
                self._opening.start()
        return None

    def _open(self) -> None:
        link = None
        try:
            link = open_link(self.router, self._uplink)
            link.failed = self._failed
        except (UplinkError, OSError) as error:
            self._log(f"network: no way to the outside: {error}; domains reach each other all the same")
        with self._lock:
            self._link, self._opening = link, None

    def _failed(self, why: str) -> None:
        """On the link's thread."""
        self._log(f"network: {why}")
        with self._lock:
            link, self._link = self._link, None
        if link is not None:
            link.close()

    # --- interfaces --------------------------------------------------------------------------------------------

    def attach(self, domain: str, spec: VifSpec, wake: Callable[[], None]) -> Attachment:
        """Make a port for an interface of a domain's. Raises RuleError, AddressError and UplinkError."""
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
        attachment = Attachment(router, vif, self._log)
        try:
            attachment.publish()
        except BaseException:
            attachment.detach()
            raise
        return attachment

    def close(self) -> None:
        """Nobody is attached any more."""
        with self._lock:
            self._closed = True
            opening = self._opening
        if opening is not None:
            opening.join()
        with self._lock:
            link, self._link = self._link, None
        if link is not None:
            link.failed = None
            link.close()
        self._forwarder.close()


def open_link(router: Router, uplink: str) -> Link:
    """Raises UplinkError."""
    if uplink == "passt":
        return Passt(router)
    kind, _, rest = uplink.partition(":")
    try:
        name, own, gateway = rest.split(",")
        if kind != "tap" or not name or len(name) > 15:
            raise ValueError
        return Tap(router, name, IPv4Interface(own), int(IPv4Address(gateway)))
    except ValueError:
        raise UplinkError(f"XENOLITH_UPLINK={uplink} is not passt, none or tap:NAME,ADDRESS/LENGTH,GATEWAY") from None


def chosen_uplink() -> str:
    """What the environment says."""
    return os.environ.get("XENOLITH_UPLINK", "passt")
