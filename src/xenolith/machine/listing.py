"""The one assembler: listings of machine code, as text that says its encoding.

A line is a label (`slow:`), or an encoding and, after two blanks or more, its text.  An encoding has bytes and names:
`{name}` is a constant of 4 bytes, least significant first (`{name:8}`: of 8), `{.name}` the distance from the end of
its instruction to a label, `{@name}` that to a place which the caller gives.
No listing needs a compiler, and a test decodes each and compares the instructions with the text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import NamedTuple

_TOKEN = re.compile(r"\{([.@]?)(\w+)(?::(\d))?\}|\b([0-9a-f]{2})\b")


class Code(NamedTuple):
    """A listing, assembled: its bytes, and the offsets of its labels."""

    code: bytes
    labels: dict[str, int]


def encodings(listing: str) -> list[tuple[str, str]]:
    """The lines of a listing: encoding and text; of a label its name and nothing."""
    lines = (line.strip() for line in listing.splitlines())
    return [(encoding, text.strip()) for line in lines if line for encoding, _, text in [line.partition("  ")]]


def assemble(listing: str, constants: Mapping[str, int], places: Mapping[str, int] | None = None) -> Code:
    """`places`: by name, their distance in bytes from the start of the code.

    Raises KeyError for a name that has no value, ValueError for a distance that does not fit.
    """
    labels, parts = _parse(listing)
    code = bytearray()
    for part in parts:
        if isinstance(part, bytes):
            code += part
            continue
        kind, name, size, end = part
        if kind:
            value = (labels if kind == "." else places or {})[name] - end
            try:
                code += value.to_bytes(size, "little", signed=True)
            except OverflowError:
                raise ValueError(f"{name} is too far away for {size} byte") from None
        else:
            code += (constants[name] & (1 << 8 * size) - 1).to_bytes(size, "little")
    return Code(bytes(code), dict(labels))


class _Name(NamedTuple):
    kind: str
    name: str
    size: int  # bytes
    end: int  # offset behind its instruction


@functools.cache
def _parse(listing: str) -> tuple[dict[str, int], list[bytes | _Name]]:
    """The labels, and what the code consists of. Engines are made often, of the same listings."""
    labels: dict[str, int] = {}
    parts: list[bytes | _Name] = []
    offset = 0
    for encoding, _ in encodings(listing):
        if encoding.endswith(":"):
            labels[encoding[:-1]] = offset
            continue
        tokens = [token.groups() for token in _TOKEN.finditer(encoding)]
        sizes = [1 if byte else int(size or 4) for *_, size, byte in tokens]
        offset += sum(sizes)
        for (kind, name, _, byte), size in zip(tokens, sizes, strict=True):
            parts.append(bytes.fromhex(byte) if byte else _Name(kind, name, size, offset))
    return labels, parts
