"""CONTROL: questions about the daemon itself (``xenstore-control``), answered as Xen 4.17's xenstored does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from xenolith.dom0.xenstore.errors import XsError

if TYPE_CHECKING:
    from xenolith.dom0.xenstore.xenstored import Xenstored

_log: Final = logging.getLogger(__name__)


def run_control(daemon: Xenstored, payload: bytes) -> bytes:
    """The answer to a CONTROL message; raises XsError."""
    words = payload.split(b"\0")[:-1]
    if not words:
        raise XsError("EINVAL", "CONTROL needs a command ended by NUL")
    command = _COMMANDS.get(words[0])
    if command is None:
        raise XsError("EINVAL", f"no control command {words[0]!r}")
    return command(daemon, words[1:])


def _help(daemon: Xenstored, words: list[bytes]) -> bytes:
    return b"\n".join(_COMMANDS) + b"\n\0"


def _check(daemon: Xenstored, words: list[bytes]) -> bytes:
    return b"OK\0"


def _print(daemon: Xenstored, words: list[bytes]) -> bytes:
    if not words:
        raise XsError("EINVAL", "print needs a text")
    _log.info("control: %s", words[0].decode("utf-8", "backslashreplace"))
    return b"OK\0"


_COMMANDS: Final[dict[bytes, Callable[[Xenstored, list[bytes]], bytes]]] = {
    b"check": _check,
    b"print": _print,
    b"help": _help,
}
