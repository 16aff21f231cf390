"""The one assembler: listings of machine code, as text that says its encoding.

A line is a label (`slow:`), or an encoding and, after two blanks or more, its text.  An encoding has bytes and names:
`{name}` is a constant of 4 bytes, least significant first (`{name:8}`: of 8), `{.name}` the distance from the end of
its instruction to a label, `{@name}` that to a place which the caller gives.
No listing needs a compiler, and a test decodes each and compares the instructions with the text.
"""

from __future__ import annotations

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
    labels: dict[str, int] = {}
    instructions: list[tuple[int, list[re.Match[str]]]] = []
    offset = 0
    for encoding, _ in encodings(listing):
        if encoding.endswith(":"):
            labels[encoding[:-1]] = offset
        else:
            tokens = list(_TOKEN.finditer(encoding))
            offset += sum(_size(token) for token in tokens)
            instructions.append((offset, tokens))
    code = bytearray()
    for end, tokens in instructions:
        for token in tokens:
            kind, name, _, byte = token.groups()
            if byte:
                code += bytes.fromhex(byte)
            elif kind:
                value = (labels if kind == "." else places or {})[name] - end
                try:
                    code += value.to_bytes(_size(token), "little", signed=True)
                except OverflowError:
                    raise ValueError(f"{name} is too far away for {_size(token)} byte") from None
            else:
                code += (constants[name] & (1 << 8 * _size(token)) - 1).to_bytes(_size(token), "little")
    return Code(bytes(code), labels)


def _size(token: re.Match[str]) -> int:
    return 1 if token[4] else int(token[3] or 4)
