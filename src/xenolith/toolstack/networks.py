"""Virtual interfaces, for the toolstack: from a VIFSPEC to what dom0 makes, and what is asked of networks later."""

from __future__ import annotations

import re
import secrets
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Final

from xenolith.dom0.backends.net import VifSpec
from xenolith.dom0.network.frame import MTU, TCP, UDP, address_text, mac_text
from xenolith.dom0.network.port import Capture, Publication, VifPort
from xenolith.dom0.network.rules import Policy, Rule, RuleError, parse_rules
from xenolith.hypervisor.control import DomainCreateError
from xenolith.toolstack.client import InvalidRequest, NetworkInfo, NotSupported, RuleInfo, ToolstackError
from xenolith.toolstack.config.vif import Nic

if TYPE_CHECKING:
    from xenolith.dom0.backends.net import NetBackend
    from xenolith.dom0.services import Dom0, GuestDomain
    from xenolith.dom0.xenbus import Device
    from xenolith.toolstack.config.domain import DomainConfig

XEN_OUI: Final = b"\x00\x16\x3e"
MAC_BYTES: Final = 6
MIN_MTU: Final = 576  # that every IPv4 host takes
MAX_MTU: Final = 65521  # with its Ethernet header, a packet's size is 16 bits


def virtual_interface(nic: Nic) -> VifSpec:
    """The interface that a VIFSPEC describes; it must have its MAC. Raises NotSupported and InvalidRequest.

    `script` and `vifname` are for a Linux dom0 and change nothing.  There is one network, where every `bridge` leads.
    """
    name = f"vif {nic.devid}"
    if nic.backend_domain not in (None, "", "0", "Domain-0"):
        raise NotSupported(f"{name}: a network of the domain {nic.backend_domain} (backend=); it is dom0's here.")
    if nic.nictype == "vif_ioemu":
        raise NotSupported(f"{name}: type=ioemu is for HVM domains.")
    if nic.mac is None or len(nic.mac) != MAC_BYTES or nic.mac[0] & 1:
        raise InvalidRequest(f"{name}: {nic.mac_text} is no MAC address that a machine can have.")
    if nic.mtu and not MIN_MTU <= nic.mtu <= MAX_MTU:
        raise InvalidRequest(f"{name}: an MTU of {nic.mtu} is not between {MIN_MTU} and {MAX_MTU}.")
    rate = (nic.rate_bytes_per_interval, nic.rate_interval_us) if nic.rate_bytes_per_interval else None
    return VifSpec(
        number=nic.devid,
        mac=nic.mac,
        ip=nic.ip or None,
        mtu=nic.mtu or MTU,
        rate=rate,
        rules=nic.rules or "",
        bridge=nic.bridge or "",
        publications=tuple(map(publication, nic.publish)),
    )


def random_mac() -> bytes:
    """One of Xen's (00:16:3e), as xl chooses it."""
    return XEN_OUI + bytes([secrets.randbelow(0x80)]) + secrets.token_bytes(2)


def publication(text: str) -> Publication:
    """[ADDRESS:]HOST:GUEST[/udp]: a port of this host's that leads to the domain's. Raises InvalidRequest."""
    match = re.fullmatch(r"(?:([0-9.]+):)?([0-9]{1,5}):([0-9]{1,5})(?:/(tcp|udp))?", text, re.ASCII)
    if match is None:
        raise InvalidRequest(f"{text!r} is no published port: [ADDRESS:]HOST:GUEST[/udp].")
    address, host, guest, protocol = match.groups()
    if not all(0 < int(port) < 65536 for port in (host, guest)):
        raise InvalidRequest(f"{text!r}: ports are between 1 and 65535.")
    try:
        IPv4Address(address or "127.0.0.1")
    except ValueError as error:
        raise InvalidRequest(f"{text!r}: {error}.") from error
    return Publication(UDP if protocol == "udp" else TCP, address or "127.0.0.1", int(host), int(guest))


def _device(domain: GuestDomain, devid: int) -> Device[NetBackend]:
    """Raises InvalidRequest."""
    device = domain.nets.get(devid)
    if device is None:
        raise InvalidRequest(f"Domain {domain.domid} has no network interface {devid}.")
    return device


def network_infos(dom0: Dom0, domain: GuestDomain) -> list[NetworkInfo]:
    """All interfaces of a domain."""
    return [_info(dom0, device) for _, device in sorted(domain.nets.items())]


def _info(dom0: Dom0, device: Device[NetBackend]) -> NetworkInfo:
    def node(*names: str) -> int:
        for name in names:
            value = dom0.xenstore.get(f"{device.frontend}/{name}") or ""
            if value.isascii() and value.isdigit() and len(value) < 11:
                return int(value)
        return -1

    spec, vif = device.backend.spec, device.backend.vif
    with dom0.network.router.turns:
        rules = tuple(RuleInfo(text=str(each), packets=each.packets, bytes=each.bytes) for each in vif.policy.rules)
        dropped = dict(vif.drops)
    return NetworkInfo(
        devid=device.number,
        mac=mac_text(spec.mac),
        state=node("state"),
        event_channel=node("event-channel", "event-channel-tx"),
        tx_ring_ref=node("tx-ring-ref"),
        rx_ring_ref=node("rx-ring-ref"),
        backend_path=device.directory,
        address=address_text(vif.address),
        mtu=spec.mtu,
        bridge=spec.bridge,
        published=tuple(map(_publication_text, spec.publications)),
        rules=rules,
        received_packets=vif.statistics.rx_packets,
        received_bytes=vif.statistics.rx_bytes,
        received_dropped=vif.statistics.rx_dropped,
        sent_packets=vif.statistics.tx_packets,
        sent_bytes=vif.statistics.tx_bytes,
        dropped=dropped,
    )


def _publication_text(each: Publication) -> str:
    return f"{each.host_address}:{each.host_port}:{each.guest_port}" + "/udp" * (each.protocol == UDP)


def attach_network(dom0: Dom0, domain: GuestDomain, known: DomainConfig, nic: Nic) -> None:
    """Also into the configuration, so that the domain has it in its next life. Raises ToolstackError."""
    nic.mac = nic.mac or random_mac()
    try:
        dom0.plug_net(domain, virtual_interface(nic))
    except DomainCreateError as error:
        raise ToolstackError(str(error)) from error
    known.nics.append(nic)


def detach_network(dom0: Dom0, domain: GuestDomain, known: DomainConfig, devid: int, force: bool) -> None:
    """Raises ToolstackError."""
    _device(domain, devid)
    if not dom0.unplug_net(domain, devid, force=force):
        raise ToolstackError(f"The guest does not let go of interface {devid}: it has no driver that listens.")
    known.nics[:] = [nic for nic in known.nics if nic.devid != devid]


def set_network_rules(dom0: Dom0, domain: GuestDomain, known: DomainConfig, devid: int, rules: str) -> None:
    """Raises ToolstackError."""
    vif = _device(domain, devid).backend.vif
    policy = Policy(_parsed(rules))
    router = dom0.network.router
    with router.turns:
        router.change_policy(vif, policy)
    for nic in known.nics:
        if nic.devid == devid:
            nic.rules = str(policy)


def _parsed(rules: str) -> tuple[Rule, ...]:
    try:
        return parse_rules(rules)
    except RuleError as error:
        raise InvalidRequest(f"{error}.") from error


class Capturing:
    """A capture of an interface, as a stream of bytes that cannot be written to."""

    def __init__(self, dom0: Dom0, domain: GuestDomain, devid: int) -> None:
        """Raises InvalidRequest."""
        self._router: Final = dom0.network.router
        self._vif: Final[VifPort] = _device(domain, devid).backend.vif
        self._capture: Final[Capture] = self._router.capture(self._vif)

    def read(self, timeout: float | None = None) -> bytes | None:
        return self._capture.read(timeout)

    def write(self, data: bytes) -> None:
        pass

    def close(self) -> None:
        self._router.end_capture(self._vif, self._capture)
