"""Virtual interfaces, for the toolstack: from a VIFSPEC to what dom0 makes, and what is asked of networks later."""

from __future__ import annotations

import re
import secrets
from ipaddress import IPv4Address
from typing import Final

from xenolith.dom0.backends.net import VifSpec
from xenolith.dom0.network.frame import MTU, TCP, UDP
from xenolith.dom0.network.port import Publication
from xenolith.toolstack.client import InvalidRequest, NotSupported
from xenolith.toolstack.config.vif import Nic

XEN_OUI: Final = b"\x00\x16\x3e"
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
    if nic.mac is None or nic.mac[0] & 1:
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
