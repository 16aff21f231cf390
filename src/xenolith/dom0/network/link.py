"""A way to the outside: two threads that carry frames between the router and whatever leads there."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from xenolith.dom0.bell import Bell
from xenolith.dom0.network.fair import FRAME_BYTES, TURN_BYTES
from xenolith.dom0.network.frame import Frame
from xenolith.dom0.network.port import Publication, UplinkPort, VifPort

if TYPE_CHECKING:
    from xenolith.dom0.network.router import Router

START_SECONDS: Final = 10.0
MAC: Final = bytes.fromhex("02 58 65 6e 00 02")


class UplinkError(Exception):
    """There is no way to the outside of this kind; the text says why, and what to do."""


class Link(ABC):
    """Its ends are `port`, on the router, and what `read` and `write` reach."""

    def __init__(self, router: Router, name: str, address: int, gateway: int, mtu: int) -> None:
        self.router: Final = router
        self._bell: Final = Bell()
        self._stopping = False
        self.failed: Callable[[str], None] | None = None
        """Called once, on a thread of the link's, when it ends by itself."""
        with router.turns:
            self.port: Final = UplinkPort(
                router.number(), name, self._bell.ring, mac=MAC, address=address, gateway=gateway, mtu=mtu
            )
        self._answered: Final = threading.Event()
        self._reader: Final = threading.Thread(target=self._read_all, name=f"{name} in", daemon=True)
        self._writer: Final = threading.Thread(target=self._write_all, name=f"{name} out", daemon=True)

    @abstractmethod
    def read(self) -> list[bytearray]:
        """Wait for frames; none at the end. Raises OSError."""

    @abstractmethod
    def write(self, frames: list[bytearray]) -> None:
        """Raises OSError."""

    @abstractmethod
    def end(self) -> str:
        """Make `read` and `write` return; why they had ended before, if they had."""

    def start(self, publications: Iterable[tuple[VifPort, Publication]] = ()) -> None:
        """Begin. Raises UplinkError where the other end does not answer."""
        with self.router.turns:
            self.router.attach_uplink(self.port, publications)
            self.router.ask_for_gateway(self.port)
        self._reader.start()
        self._writer.start()
        if not self._answered.wait(START_SECONDS) or self._stopping:
            raise UplinkError(self.close() or f"{self.port.name}: nobody answers")

    def close(self) -> str:
        """End it; why it had ended before, if it had."""
        self._stopping = True
        reason = self.end()
        self._bell.ring()
        for thread in (self._reader, self._writer):
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join()
        with self.router.turns:
            self.router.detach(self.port)
        self._bell.close()
        return reason

    def _read_all(self) -> None:
        try:
            while frames := self.read():
                self._answered.set()
                self._hand_over(frames)
        except OSError:
            pass
        self._end_by_itself()

    def _hand_over(self, frames: list[bytearray]) -> None:
        at = 0
        while at < len(frames):
            credit = TURN_BYTES
            with self.router.turns:
                while at < len(frames) and credit > 0:
                    credit -= len(frames[at]) + FRAME_BYTES
                    self.router.receive(self.port, Frame(frames[at]))
                    at += 1

    def _write_all(self) -> None:
        queue, statistics = self.port.queue, self.port.statistics
        try:
            while not self._stopping:
                self._bell.wait()
                while not self._stopping:
                    batch: list[bytearray] = []
                    while len(batch) < 64 and (frame := queue.take()) is not None:
                        statistics.rx_packets += 1
                        statistics.rx_bytes += len(frame.data)
                        batch.append(frame.data)
                    if not batch:
                        break
                    self.write(batch)
        except OSError:
            self._end_by_itself()

    def _end_by_itself(self) -> None:
        first, self._stopping = not self._stopping, True
        self._answered.set()
        self._bell.ring()
        if first and self.failed is not None:
            self.failed(f"{self.port.name} has ended")
