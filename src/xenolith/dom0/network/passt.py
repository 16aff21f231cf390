"""The outside by passt(1): sockets of an ordinary user's process, no privilege and no device.

passt is the other end of a UNIX stream socket, on which each frame is preceded by its length, 32 bits big-endian.  It
ends when the socket is closed, and so with us.  It turns the connections that come to it into its own, so that what it
can reach is what this user can; `--no-map-gw` keeps it from this host's loopback addresses.  Its packets may have
64 KiB: the router cuts them for a domain only in name (GSO).
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Final

from xenolith.dom0.network.frame import ETHERNET_HEADER, TCP
from xenolith.dom0.network.link import Link, UplinkError
from xenolith.dom0.network.port import Publication, VifPort

if TYPE_CHECKING:
    from xenolith.dom0.network.router import Router

MTU: Final = 65520
MAX_LENGTH: Final = 65535
ADDRESS: Final = IPv4Address("192.0.0.2")  # of a network for such links, which exists nowhere else (RFC 6333)
GATEWAY: Final = IPv4Address("192.0.0.1")
_READ_BYTES: Final = 512 << 10
_SOCKET_BYTES: Final = 2 << 20
_END_SECONDS: Final = 5.0
MISSING: Final = "passt is not installed (Debian, Ubuntu: apt install passt)"


class Passt(Link):
    """A running passt, that also listens on this host's ports that are published."""

    def __init__(self, router: Router, publications: Sequence[tuple[VifPort, Publication]] = ()) -> None:
        """Raises UplinkError."""
        program = shutil.which("passt")
        if program is None:
            raise UplinkError(MISSING)
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                end.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BYTES)
        self._socket: Final = ours
        self._messages: Final = tempfile.TemporaryFile()  # noqa: SIM115 (`end` closes it)
        self._rest = bytearray()
        self._view: Final = memoryview(bytearray(_READ_BYTES))
        with theirs:
            self._process: Final = subprocess.Popen(
                [program, *_arguments(theirs.fileno(), [each for _, each in publications])],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._messages,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # the terminal's Ctrl-C is not for it
            )
        super().__init__(router, "passt", int(ADDRESS), int(GATEWAY), MTU)
        self.start(publications)

    def read(self) -> list[bytearray]:
        rest = self._rest
        while True:
            size = self._socket.recv_into(self._view)
            if not size:
                return []
            rest += self._view[:size]
            frames = []
            at = 0
            while len(rest) - at >= 4:
                length = int.from_bytes(rest[at : at + 4], "big")
                if not ETHERNET_HEADER <= length <= MAX_LENGTH:
                    return []
                if len(rest) - at - 4 < length:
                    break
                frames.append(rest[at + 4 : at + 4 + length])
                at += 4 + length
            del rest[:at]
            if frames:
                return frames

    def write(self, frames: list[bytearray]) -> None:
        self._socket.sendall(b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames))

    def end(self) -> str:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        try:
            status = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self._socket.close()
        with self._messages as messages:
            messages.seek(0)
            lines = [line for line in messages.read().decode("utf-8", "replace").splitlines() if "syslog" not in line]
        return f"passt: {' '.join(lines[-2:])}" if status and lines else ""


def _arguments(descriptor: int, publications: Sequence[Publication]) -> list[str]:
    arguments = ["--foreground", "--quiet", "--stderr", "--fd", str(descriptor), "--ipv4-only", "--no-map-gw"]
    arguments += ["--no-dhcp", "--no-dhcpv6", "--no-ndp", "--no-ra", "--mtu", str(MTU)]
    arguments += ["--address", str(ADDRESS), "--netmask", "24", "--gateway", str(GATEWAY)]
    for option, tcp in (("--tcp-ports", True), ("--udp-ports", False)):
        ports = [each for each in publications if (each.protocol == TCP) is tcp]
        for each in ports:  # to the same port of ours: which of the domain's it is, the router knows
            arguments += [option, f"{each.host_address}/{each.host_port}"]
        if not ports:
            arguments += [option, "none"]
    return arguments
