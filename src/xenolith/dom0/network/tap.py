"""The outside by a TAP device that the administrator made (Linux: Documentation/networking/tuntap.rst).

    ip tuntap add xen0 mode tap user USER
    ip address add 192.0.2.1/24 dev xen0; ip link set xen0 up

The host is the gateway, and decides by its own routes and rules what becomes of the packets.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from ipaddress import IPv4Interface
from typing import TYPE_CHECKING, Final

from xenolith.dom0.network.frame import ETHERNET_HEADER, MTU
from xenolith.dom0.network.link import Link, UplinkError
from xenolith.ready import readable

if TYPE_CHECKING:
    from xenolith.dom0.network.router import Router

TUNSETIFF: Final = 0x400454CA
IFF_TAP: Final = 2
IFF_NO_PI: Final = 0x1000
_DEVICE: Final = "/dev/net/tun"
BATCH: Final = 64


class Tap(Link):
    """An open TAP device."""

    def __init__(self, router: Router, name: str, own: IPv4Interface, gateway: int) -> None:
        """`own` is the address that all domains have there. Raises UplinkError."""
        try:
            self._descriptor: Final = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise UplinkError(f"{_DEVICE} cannot be opened: {error.strerror}") from error
        try:
            fcntl.ioctl(self._descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
        except OSError as error:
            os.close(self._descriptor)
            raise UplinkError(f"the TAP device {name} cannot be used: {error.strerror}") from error
        self._wake, self._woken = os.pipe2(os.O_CLOEXEC)
        super().__init__(router, name, int(own.ip), gateway, MTU)
        self.start()

    def read(self) -> list[bytearray]:
        frames: list[bytearray] = []
        while not frames:
            ready = readable(self._descriptor, self._wake)
            if self._wake in ready:
                return []
            with contextlib.suppress(BlockingIOError):
                while len(frames) < BATCH:
                    frames.append(bytearray(os.read(self._descriptor, MTU + ETHERNET_HEADER + 4)))
        return frames

    def write(self, frames: list[bytearray]) -> None:
        for frame in frames:
            try:
                os.write(self._descriptor, frame)
            except BlockingIOError:
                self.port.statistics.rx_dropped += 1

    def end(self) -> str:
        os.close(self._woken)
        return ""

    def close(self) -> str:
        reason = super().close()
        os.close(self._descriptor)
        os.close(self._wake)
        return reason
