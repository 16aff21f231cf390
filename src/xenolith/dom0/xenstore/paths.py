"""Names of xenstore nodes: which are well formed, whose home they are under, which lies below which.

A node's name is an absolute path of components from ``[A-Za-z0-9_@-]``; a name without a leading ``/`` is relative to
the caller's home ``/local/domain/<domid>``; one that begins with ``@`` is an event (``@introduceDomain``), not a node.
Source: docs/misc/xenstore.txt; the length rule (the home prefix is free) is observed on Xen 4.17.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

from xenolith.abi.xs_wire import REL_PATH_MAX

_WELL_FORMED: Final = re.compile(rb"/|(?:/[A-Za-z0-9_@-]+)+")
_HOME: Final = re.compile(rb"/local/domain/[0-9]{1,5}/")


def home(domid: int) -> bytes:
    """The directory which a domain's relative names start from."""
    return b"/local/domain/%d" % domid


def is_valid(path: bytes, longest: int = REL_PATH_MAX) -> bool:
    """Whether ``path`` names a node; at most ``longest`` bytes, not counting a leading ``/local/domain/<n>/``."""
    if len(path) > longest:
        prefix = _HOME.match(path)
        if prefix is None or len(path) - prefix.end() > longest:
            return False
    return _WELL_FORMED.fullmatch(path) is not None


def absolute(path: bytes, home_path: bytes) -> bytes:
    """``path`` itself when it is absolute or an event, else the node it names below ``home_path``."""
    if path[:1] in (b"/", b"@"):
        return path
    return home_path + b"/" + path


_OWN: Final = re.compile(rb"(/local/domain/0/backend/[A-Za-z0-9_@-]+/|/local/domain/)([0-9]{1,5})(?=/|\Z)")


def renumbered(path: bytes, former: Collection[int], domid: int) -> bytes:
    """``path`` as it is now, of a domain that calls itself by one of its ``former`` numbers."""
    if not former:
        return path
    found = _OWN.match(path)
    if found is None or int(found[2]) not in former:
        return path
    return b"%b%d%b" % (found[1], domid, path[found.end() :])


def parent(path: bytes) -> bytes:
    """The directory that holds ``path``; the root holds itself."""
    return path[: path.rfind(b"/")] or b"/"


def split(path: bytes) -> tuple[bytes, bytes]:
    """The directory that holds ``path`` and the name it has there; not for the root."""
    cut = path.rfind(b"/")
    return path[:cut] or b"/", path[cut + 1 :]


def join(directory: bytes, name: bytes) -> bytes:
    """The path of the child ``name`` of ``directory``."""
    return b"/" + name if directory == b"/" else directory + b"/" + name


def components(path: bytes) -> list[bytes]:
    """The names from the root down; none for the root."""
    return path[1:].split(b"/") if path != b"/" else []


def upwards(path: bytes) -> list[bytes]:
    """``path`` and every directory above it: the places where a watch sees an event at ``path``."""
    found = [path]
    cut = path.rfind(b"/")
    while cut > 0:
        path = path[:cut]
        found.append(path)
        cut = path.rfind(b"/")
    if found[-1] != b"/":
        found.append(b"/")
    return found
