"""Who may do what with a node: the permission list.

A node carries a list of (domid, access). The first entry names the **owner**, who may do everything, and the access of
every domain not listed; the others give single domains their access. Domain 0 (and every tool on the socket) may do
everything. On the wire an entry is a letter and a domid: ``n`` none, ``r`` read, ``w`` write, ``b`` both.
Source: docs/misc/xenstore.txt (GET_PERMS); number syntax as Xen 4.17 accepts it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, TypeAlias

from xenolith.dom0.xenstore.errors import XsError

NONE: Final = 0
READ: Final = 1
WRITE: Final = 2
OWNER: Final = 4
EVERYTHING: Final = READ | WRITE | OWNER

_ACCESS: Final = {b"n": NONE, b"r": READ, b"w": WRITE, b"b": READ | WRITE}
_LETTER: Final = {access: letter for letter, access in _ACCESS.items()}
_DOMID: Final = re.compile(rb"0[xX][0-9a-fA-F]{1,8}|[0-9]{1,10}")
_DOMID_LIMIT: Final = 1 << 32


@dataclass(frozen=True, slots=True)
class Permission:
    """One entry of a node's list."""

    domid: int
    access: int


Permissions: TypeAlias = tuple[Permission, ...]

DOM0_ONLY: Final[Permissions] = (Permission(0, NONE),)


def parse(text: bytes) -> Permission:
    """``b"r5"`` -> read for domain 5; raises :class:`XsError` EINVAL for anything else than a letter and a domid."""
    access = _ACCESS.get(text[:1])
    number = text[1:]
    if access is None or _DOMID.fullmatch(number) is None:
        raise XsError("EINVAL", f"permission {text!r} is not one of n, r, w, b and a domain number")
    domid = _c_integer(number)
    if domid >= _DOMID_LIMIT:
        raise XsError("EINVAL", f"permission {text!r} names no possible domain")
    return Permission(domid, access)


def _c_integer(number: bytes) -> int:
    """C's strtoul with base 0: hexadecimal after 0x, octal after 0, else decimal."""
    try:
        if number[:2] in (b"0x", b"0X"):
            return int(number, 16)
        return int(number, 8 if number[:1] == b"0" else 10)
    except ValueError:
        raise XsError("EINVAL", f"{number!r} is no number") from None


def format_list(permissions: Permissions) -> bytes:
    """The list as GET_PERMS sends it: each entry ended by NUL."""
    return b"".join([b"%b%d\0" % (_LETTER[entry.access], entry.domid) for entry in permissions])


def access_of(permissions: Permissions, domid: int, target: int | None) -> int:
    """What an unprivileged ``domid`` may do; ``target`` is the domain it acts for (SET_TARGET), if any."""
    owner = permissions[0]
    if owner.domid == domid or owner.domid == target:
        return EVERYTHING
    for entry in permissions[1:]:
        if entry.domid == domid or entry.domid == target:
            return entry.access
    return owner.access
