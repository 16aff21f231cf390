"""What stands between a guest's 9P client and a folder's server: every message is checked, some are answered here.

The server resolves paths, so names are names alone: no "/", no "..", no "."; it is confined besides (`confined`), for a
guest can put a link where a directory was.  What a folder that is read-only must not get is answered with EROFS here,
whatever the server thinks.  A guest gets no file onto the host that would be more there than data: no set-user-ID, no
capability, no device.

The relay knows which fids are in use and which requests are not answered yet, a bounded number of each.  A request
that makes no sense is answered with an error; one that breaks the framing ends the connection (`ProtocolError`).
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from struct import Struct
from struct import error as StructError
from typing import Final

from xenolith.abi import p9
from xenolith.abi.errno import EBADF, EINVAL, ENAMETOOLONG, ENFILE, ENODATA, ENOENT, EPERM, EROFS

EOPNOTSUPP: Final = 95

MAX_MSIZE: Final = 64 << 10  # the most that diod takes
MIN_MSIZE: Final = 8192
MAX_FIDS: Final = 32768
MAX_IN_FLIGHT: Final = 64

_U16: Final = Struct("<H")
_U32: Final = Struct("<I")
_OWNER: Final = Struct("<II")
_SIZES: Final = {"1": Struct("<B"), "2": _U16, "4": _U32, "8": Struct("<Q")}
_FIELDS: Final = {kind: [field.partition(":")[::2] for field in fields.split()] for kind, fields in p9.FIELDS.items()}
_WRITES: Final = frozenset(
    (p9.TLCREATE, p9.TSYMLINK, p9.TMKNOD, p9.TRENAME, p9.TSETATTR, p9.TXATTRCREATE)
    + (p9.TLINK, p9.TMKDIR, p9.TRENAMEAT, p9.TUNLINKAT, p9.TWRITE)
)
_OPEN_FLAGS: Final = (
    (p9.P9_DOTL_ACCMODE | p9.P9_DOTL_CREATE | p9.P9_DOTL_EXCL | p9.P9_DOTL_TRUNC | p9.P9_DOTL_APPEND)
    | (p9.P9_DOTL_DSYNC | p9.P9_DOTL_LARGEFILE | p9.P9_DOTL_DIRECTORY | p9.P9_DOTL_NOATIME | p9.P9_DOTL_SYNC)
)  # fmt: skip
_OPEN_ALWAYS: Final = p9.P9_DOTL_NOFOLLOW | p9.P9_DOTL_NONBLOCK  # a FIFO must not hold the server up
_MODE_BITS: Final = 0o1777
_MADE: Final = (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, 0)
_MAX_NAME: Final = 255
_MAX_TARGET: Final = 4095
_NONUNAME: Final = 0xFFFFFFFF
_NOBODY: Final = 65534
_NOFID: Final = 0xFFFFFFFF


class ProtocolError(Exception):
    """The client breaks the protocol beyond an error answer; the text says how."""


class NewSession(Exception):
    """The client begins anew, and all that was is forgotten: this takes another relay, and a server that is as new."""


class ServerError(Exception):
    """The server does; the connection cannot go on."""


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, errno: int) -> None:
        super().__init__(errno)
        self.errno = errno


@dataclass(slots=True)
class _Pending:
    """A request that the server has not answered yet."""

    kind: int
    newfid: int | None = None  # that it makes, if it succeeds
    names: int = 0  # of a walk
    oldtag: int = 0  # of a flush
    answer_errno: int = 0  # instead of what the server says


Values = dict[str, int | bytes | list[bytes]]


class Relay:
    """One connection of a guest's. `tree` is what the server calls the folder.

    Where the server can be but one user, that is `owner`, its user and group ID: all that the guest does it does as
    that, and what belongs to it belongs to ID 0 in the guest.  Without, IDs are the same on both sides.
    """

    def __init__(self, tree: bytes, *, writable: bool, owner: tuple[int, int] | None) -> None:
        self.msize = 0  # not negotiated yet
        self.fids: Final[set[int]] = set()
        self._tree: Final = tree
        self._writable: Final = writable
        self._owner: Final = owner
        self._pending: Final[dict[int, _Pending]] = {}

    @property
    def in_flight(self) -> int:
        return len(self._pending)

    # --- from the guest ------------------------------------------------------------------------------------

    def request(self, message: bytes) -> tuple[bytes, bytes]:
        """What a whole message of the client's becomes: (for the server, for the client), one of which is empty.

        Raises ProtocolError and NewSession.
        """
        if len(message) < p9.HEADER.size or len(message) > (self.msize or MAX_MSIZE):
            raise ProtocolError(f"a message of {len(message)} bytes")
        size, kind, tag = p9.HEADER.unpack_from(message)
        if size != len(message):
            raise ProtocolError(f"a message of {len(message)} bytes that says {size}")
        if tag in self._pending:
            raise ProtocolError(f"two requests have the tag {tag}")
        if len(self._pending) >= MAX_IN_FLIGHT:
            raise ProtocolError("too many requests at once")
        if (kind == p9.TVERSION) != (tag == p9.NOTAG):
            raise ProtocolError(f"a request of type {kind} has the tag {tag}")
        pending = _Pending(kind)
        try:
            values = self._parsed(kind, message)
            answer = self._checked(kind, values, pending)
        except Refused as refusal:
            return b"", _error(tag, refusal.errno)
        if answer is not None:
            return b"", _packed(kind + 1, tag, answer)
        self._pending[tag] = pending
        return _packed(pending.kind, tag, _body(pending.kind, values)), b""

    def _parsed(self, kind: int, message: bytes) -> Values:
        if kind not in _FIELDS:
            raise Refused(EOPNOTSUPP)
        if not self.msize and kind != p9.TVERSION:
            raise Refused(EINVAL)
        values: Values = {}
        at = p9.HEADER.size
        try:
            for name, form in _FIELDS[kind]:
                if name == "names":
                    [count] = _U16.unpack_from(message, at)
                    at += 2
                    if count > p9.MAXWELEM:
                        raise Refused(EINVAL)
                    names: list[bytes] = []
                    for _ in range(count):
                        text, at = _counted(message, at, _U16)
                        names.append(_name(text))
                    values[name] = names
                elif name == "data":
                    values[name], at = _counted(message, at, _U32)
                elif name.endswith("name"):
                    text, at = _counted(message, at, _U16)
                    values[name] = _name(text)
                elif form == "s":
                    text, at = _counted(message, at, _U16)
                    if b"\0" in text:
                        raise Refused(EINVAL)
                    values[name] = text
                elif kind == p9.TFSYNC and name == "datasync" and at == len(message):
                    values[name] = 0  # as older clients leave it out
                else:
                    field = _SIZES[form or "4"]
                    [values[name]] = field.unpack_from(message, at)
                    at += field.size
        except StructError:
            raise Refused(EINVAL) from None
        if at != len(message):
            raise Refused(EINVAL)
        return values

    def _checked(self, kind: int, values: Values, pending: _Pending) -> bytes | None:
        """Check and change the fields; the body of an answer, where it is given here. Raises Refused."""
        number = _Numbers(values)
        for name in ("fid", "dfid"):
            if name in values and number[name] not in self.fids:
                raise Refused(EBADF)
        if "newfid" in values and number["newfid"] != values.get("fid"):
            pending.newfid = self._free_fid(number["newfid"])
        if not self._writable:
            if kind in _WRITES:
                raise Refused(EROFS)
            if kind in (p9.TLOCK, p9.TGETLOCK):
                return _lock_answer(kind, values)  # nobody writes here; and programs of the host must not wait
        match kind:
            case p9.TVERSION:
                return self._version(values)
            case p9.TATTACH:
                values["afid"] = _NOFID
                values["tree"] = self._tree
                values["user"] = b""
                if number["uid"] == _NONUNAME:  # Linux for the mount itself; each user then attaches, too
                    values["uid"] = _NOBODY
            case p9.TWALK:
                pending.names = len(values["names"])  # type: ignore[arg-type]
            case p9.TLOPEN:
                values["flags"] = self._flags(number["flags"]) & ~(p9.P9_DOTL_CREATE | p9.P9_DOTL_EXCL)
            case p9.TLCREATE:
                values["flags"] = self._flags(number["flags"])
            case p9.TMKNOD:
                if stat.S_IFMT(number["mode"]) not in _MADE:
                    raise Refused(EPERM)
            case p9.TSYMLINK:
                if not 0 < len(values["target"]) <= _MAX_TARGET:  # type: ignore[arg-type]
                    raise Refused(ENAMETOOLONG)
            case p9.TXATTRWALK:
                if values["attribute"] and not _harmless(values["attribute"]):
                    raise Refused(ENODATA)
            case p9.TXATTRCREATE:
                if not _harmless(values["attribute"]) or number["size"] > 0xFFFF:
                    raise Refused(EOPNOTSUPP)
            case p9.TREAD | p9.TREADDIR:
                values["count"] = min(number["count"], self.msize - p9.IOHDRSZ)
            case p9.TFLUSH:
                pending.oldtag = number["oldtag"]
            case p9.TCLUNK | p9.TREMOVE:
                self.fids.discard(number["fid"])
                if kind == p9.TREMOVE and not self._writable:
                    pending.kind, pending.answer_errno = p9.TCLUNK, EROFS  # the fid goes in any case
        if "mode" in values:
            values["mode"] = number["mode"] & (stat.S_IFMT(0xFFFF) | _MODE_BITS)
        for name, ours in zip(("uid", "gid"), self._owner or (), strict=False):
            if name in values and (kind != p9.TSETATTR or not values[name]):
                values[name] = ours
        return None

    def _version(self, values: Values) -> bytes:
        """A session begins; the server has one already and never hears of it."""
        if self.msize:
            raise NewSession
        msize = _Numbers(values)["msize"]
        version = p9.VERSION if values["version"] == p9.VERSION and msize >= MIN_MSIZE else b"unknown"
        if version == p9.VERSION:
            self.msize = min(msize, MAX_MSIZE)
        return _U32.pack(min(msize, MAX_MSIZE)) + _string(version)

    def _free_fid(self, fid: int) -> int:
        reserved = {pending.newfid for pending in self._pending.values()}
        if fid in self.fids or fid in reserved or fid == _NOFID:
            raise Refused(EBADF)
        if len(self.fids) + len(reserved) >= MAX_FIDS:
            raise Refused(ENFILE)
        return fid

    def _flags(self, flags: int) -> int:
        access = flags & p9.P9_DOTL_ACCMODE
        if access == p9.P9_DOTL_ACCMODE:
            raise Refused(EINVAL)
        if not self._writable and (access or flags & (p9.P9_DOTL_TRUNC | p9.P9_DOTL_APPEND | p9.P9_DOTL_CREATE)):
            raise Refused(EROFS)
        return flags & _OPEN_FLAGS | _OPEN_ALWAYS

    # --- from the server -----------------------------------------------------------------------------------

    def response(self, message: bytes) -> bytes:
        """What the client is told; nothing, if it is empty. Raises ServerError."""
        if not p9.HEADER.size <= len(message) <= self.msize:
            raise ServerError(f"an answer of {len(message)} bytes")
        _, kind, tag = p9.HEADER.unpack_from(message)
        pending = self._pending.pop(tag, None)
        if pending is None or kind not in (pending.kind + 1, p9.RLERROR):
            raise ServerError(f"an answer of type {kind} to no such request")
        if pending.newfid is not None and kind != p9.RLERROR:
            made = pending.kind != p9.TWALK or _U16.unpack_from(message, p9.HEADER.size)[0] == pending.names
            if made:
                self.fids.add(pending.newfid)
        if pending.kind == p9.TFLUSH:
            forgotten = self._pending.pop(pending.oldtag, None)
            if forgotten is not None and forgotten.newfid is not None:
                self.fids.add(forgotten.newfid)  # it may exist
        if pending.answer_errno:
            return _error(tag, pending.answer_errno)
        return self._owned_by_root(message) if kind == p9.TGETATTR + 1 and self._owner is not None else message

    def _owned_by_root(self, attributes: bytes) -> bytes:
        owner = list(_OWNER.unpack_from(attributes, p9.RGETATTR_OWNER))
        shown = [0 if each == ours else each for each, ours in zip(owner, self._owner or (), strict=True)]
        at = p9.RGETATTR_OWNER
        return attributes[:at] + _OWNER.pack(*shown) + attributes[at + _OWNER.size :]


class _Numbers:
    """The fields that are numbers."""

    def __init__(self, values: Values) -> None:
        self._values = values

    def __getitem__(self, name: str) -> int:
        value = self._values[name]
        assert isinstance(value, int)
        return value


def _counted(message: bytes, at: int, length: Struct) -> tuple[bytes, int]:
    [size] = length.unpack_from(message, at)
    at += length.size
    if at + size > len(message):
        raise Refused(EINVAL)
    return message[at : at + size], at + size


def _name(text: bytes) -> bytes:
    """A name of a file in a directory. Raises Refused."""
    if len(text) > _MAX_NAME:
        raise Refused(ENAMETOOLONG)
    if text in (b"", b".", b"..") or b"/" in text or b"\0" in text:
        raise Refused(ENOENT)
    return text


def _harmless(attribute: object) -> bool:
    """An extended attribute that is nothing but data to the host."""
    assert isinstance(attribute, bytes)
    return attribute.startswith(b"user.") and len(attribute) <= _MAX_NAME


def _lock_answer(kind: int, values: Values) -> bytes:
    if kind == p9.TLOCK:
        return bytes([p9.P9_LOCK_SUCCESS])
    return _body(kind, {**values, "type": p9.P9_LOCK_TYPE_UNLCK})[4:]


def _string(text: bytes) -> bytes:
    return _U16.pack(len(text)) + text


def _body(kind: int, values: Values) -> bytes:
    parts = []
    for name, form in _FIELDS[kind]:
        value = values[name]
        if isinstance(value, int):
            parts.append(_SIZES[form or "4"].pack(value))
        elif isinstance(value, list):
            parts.append(_U16.pack(len(value)) + b"".join(map(_string, value)))
        else:
            parts.append((_U32.pack(len(value)) + value) if name == "data" else _string(value))
    return b"".join(parts)


def _packed(kind: int, tag: int, body: bytes) -> bytes:
    return p9.HEADER.pack(p9.HEADER.size + len(body), kind, tag) + body


def _error(tag: int, errno: int) -> bytes:
    return _packed(p9.RLERROR, tag, _U32.pack(errno))
