"""Waiting for descriptors: not by select(), which knows none from 1,024 on, and a machine of many domains has those."""

from __future__ import annotations

import select


def readable(*descriptors: int) -> set[int]:
    """Wait until one of these can be read, or has ended: which."""
    return _ready(select.POLLIN, descriptors, None)


def writable(descriptor: int, wait: bool = True) -> bool:
    """Whether a descriptor takes more, or is broken; with `wait`, once it does."""
    return bool(_ready(select.POLLOUT, (descriptor,), None if wait else 0))


def _ready(events: int, descriptors: tuple[int, ...], timeout_ms: int | None) -> set[int]:
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, events)
    return {descriptor for descriptor, _ in poll.poll(timeout_ms)}
