"""CONTROL: questions to the daemon itself (``xenstore-control``), answered as Xen 4.17's xenstored does.

``live-update``, ``logfile`` and ``quota-soft`` of Xen's daemon, about its process and its log, are refused as unknown
commands are. ``memreport`` is answered with figures of this store, where Xen's writes a list of its heap to a file.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from xenolith.dom0.xenstore.errors import XsError

if TYPE_CHECKING:
    from xenolith.dom0.xenstore.xenstored import Xenstored

_log: Final = logging.getLogger(__name__)
_OK: Final = b"OK\0"

# Xen's name for a quota, our field, what it means.
_QUOTAS: Final = (
    ("nodes", "nodes", "Nodes per domain"),
    ("watches", "watches", "Watches per domain"),
    ("transactions", "transactions", "Transactions per domain"),
    ("outstanding", "outstanding", "Outstanding requests per domain"),
    ("transaction-nodes", "transaction_nodes", "Max. number of accessed nodes per transaction"),
    ("memory", "unread_bytes", "Unread answers and events per domain in bytes"),
    ("node-size", "node_size", "Max. size of a node"),
    ("path-max", "path_length", "Max. length of a node path"),
    ("permissions", "permissions", "Max. number of permissions per node"),
)


def run_control(daemon: Xenstored, payload: bytes) -> bytes:
    """The answer to a CONTROL message; raises XsError."""
    words = payload.split(b"\0")[:-1]
    command = _COMMANDS.get(words[0]) if words else None
    if command is None or not command.fewest <= len(words) - 1 <= command.most:
        raise XsError("EINVAL", f"no control command {payload[:40]!r}")
    return command.run(daemon, words[1:])


def _help(daemon: Xenstored, words: list[bytes]) -> bytes:
    return b"".join([b"%b\t%b\n" % (name, command.arguments) for name, command in _COMMANDS.items()]) + b"\0"


def _check(daemon: Xenstored, words: list[bytes]) -> bytes:
    return _OK


def _print(daemon: Xenstored, words: list[bytes]) -> bytes:
    _log.info("control: %s", words[0].decode("utf-8", "backslashreplace"))
    return _OK


def _switch_log(daemon: Xenstored, words: list[bytes]) -> bytes:
    if words[0] not in (b"on", b"off"):
        raise XsError("EINVAL", f"log {words[0]!r} is neither on nor off")
    logging.getLogger("xenolith.dom0.xenstore").setLevel(logging.DEBUG if words[0] == b"on" else logging.INFO)
    return _OK


def _quota(daemon: Xenstored, words: list[bytes]) -> bytes:
    if not words:
        lines = [f"{name:<17}: {getattr(daemon.quota, field):8d} {what}" for name, field, what in _QUOTAS]
        return "\n".join(["Quota settings:", *lines, "\0"]).encode()
    if len(words) == 1:
        return _domain_usage(daemon, words[0])
    field = {name: field for name, field, _ in _QUOTAS}.get(words[1].decode("ascii", "replace"))
    if words[0] != b"set" or len(words) != 3 or field is None or not words[2].isdigit() or len(words[2]) > 9:
        raise XsError("EINVAL", f"quota {words!r}")
    daemon.quota = dataclasses.replace(daemon.quota, **{field: int(words[2])})
    return _OK


def _domain_usage(daemon: Xenstored, word: bytes) -> bytes:
    if not word.isdigit() or len(word) > 9:
        raise XsError("EINVAL", f"{word!r} is no domain")
    domid = int(word)
    caller = daemon.domains.get(domid)
    if caller is None and domid:
        raise XsError("ENOENT", f"domain {domid} is not introduced")
    outstanding, unread_bytes = caller.unfetched if caller else (0, 0)
    usage = {
        "nodes": daemon.store.owned_by(domid),
        "watches": len(caller.watches) if caller else 0,
        "transactions": len(caller.transactions) if caller else 0,
        "outstanding": outstanding,
        "memory": unread_bytes,
    }
    lines = [f"{name:<16}: {used:8d}" for name, used in usage.items()]
    return "\n".join([f"Domain {domid}:", *lines, "\0"]).encode()


def _report_memory(daemon: Xenstored, words: list[bytes]) -> bytes:
    domains = daemon.domains.values()
    figures = {
        "nodes": daemon.store.size(),
        "bytes of values": daemon.store.value_bytes(),
        "watches": len(daemon.watches),
        "domains": len(domains),
        "transactions of domains": sum(len(caller.transactions) for caller in domains),
        "bytes unread by domains": sum(caller.unfetched[1] for caller in domains),
    }
    return "\n".join([*(f"{name:<24}: {figure:8d}" for name, figure in figures.items()), "\0"]).encode()


@dataclass(frozen=True)
class _Command:
    run: Callable[[Xenstored, list[bytes]], bytes]
    arguments: bytes
    fewest: int
    most: int


_COMMANDS: Final = {
    b"check": _Command(_check, b"", 0, 0),
    b"log": _Command(_switch_log, b"on|off", 1, 1),
    b"memreport": _Command(_report_memory, b"", 0, 0),
    b"print": _Command(_print, b"<string>", 1, 1),
    b"quota": _Command(_quota, b"[set <name> <val>|<domid>]", 0, 3),
    b"help": _Command(_help, b"", 0, 0),
}
