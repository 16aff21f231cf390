"""How a xenstore request fails: with one of the error names that the wire protocol knows (``xsd_errors``)."""

from __future__ import annotations

from xenolith.abi.xs_wire import ERROR_NAMES


class XsError(Exception):
    """A refused xenstore request; ``name`` is the errno name which travels to the client, such as ``"ENOENT"``."""

    def __init__(self, name: str, detail: str = "") -> None:
        if name not in ERROR_NAMES:
            raise ValueError(f"{name!r} is no error that xenstore's protocol can carry")
        super().__init__(f"{name}: {detail}" if detail else name)
        self.name = name
