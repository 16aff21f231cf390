"""What a back-end has of its front-end's domain: an event channel, and the frames it was granted (paper 3.4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class GrantError(Exception):
    """Xen refused to map a grant; the front-end named one that it has not given us."""


class Peer(Protocol):
    """The domain at the other end of a split device. Any thread may call any method."""

    @property
    def domid(self) -> int: ...

    def bind(self, remote_port: int, handler: Callable[[], None]) -> int:
        """Connect to an unbound port of the domain's: our port, or a negative errno.

        `handler` is called for each event by the thread that sent it and must do no more than hand on.
        """

    def close_port(self, port: int) -> None: ...

    def notify(self, port: int) -> None: ...

    def map(self, ref: int, writable: bool) -> tuple[int, memoryview]:
        """Map a granted frame: a handle for `unmap`, and the frame. Raises GrantError."""

    def unmap(self, handle: int) -> None:
        """Give a frame back. It must not be touched any more."""
