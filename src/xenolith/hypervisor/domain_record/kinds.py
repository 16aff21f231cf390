"""Values of a record: how each kind is written as plain data, and what may be read back.

What is read may have been written by anybody.
"""

from __future__ import annotations

from typing import Any, Final

from xenolith.abi.x86 import is_canonical
from xenolith.hypervisor.guest_memory import address_ok

Plain = Any  # what JSON can say


class RecordError(Exception):
    """A domain cannot travel, or a record is none; the text says why."""


class Kind:
    """How a field is written, and what may be read back."""

    def pack(self, value: Any) -> Plain:
        """As plain data."""
        return value

    def unpack(self, plain: Plain, where: str) -> Any:
        """The value. Raises RecordError where it is none of this kind."""
        return plain


class Number(Kind):
    """least <= value < limit."""

    def __init__(self, limit: int = 1 << 64, least: int = 0) -> None:
        self.limit = limit
        self.least = least

    def unpack(self, plain: Plain, where: str) -> int:
        if type(plain) is not int or not self.least <= plain < self.limit:
            raise RecordError(f"{where} is no number from {self.least} and below {self.limit:#x}")
        return plain


class Address(Number):
    """A linear address that the processor would accept."""

    def unpack(self, plain: Plain, where: str) -> int:
        value = super().unpack(plain, where)
        if not is_canonical(value):
            raise RecordError(f"{where} is no address: {value:#x}")
        return value


class GuestAddress(Number):
    """A linear address that is the guest's own."""

    def unpack(self, plain: Plain, where: str) -> int:
        value = super().unpack(plain, where)
        if not address_ok(value):
            raise RecordError(f"{where} is no address of a guest's: {value:#x}")
        return value


class Mask(Number):
    """Some of these bits."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def unpack(self, plain: Plain, where: str) -> int:
        value = super().unpack(plain, where)
        if value & ~self.bits:
            raise RecordError(f"{where} has bits that it cannot have: {value:#x}")
        return value


class Flag(Kind):
    def pack(self, value: Any) -> bool:
        return bool(value)

    def unpack(self, plain: Plain, where: str) -> bool:
        if type(plain) is not bool:
            raise RecordError(f"{where} is neither true nor false")
        return plain


class Array(Kind):
    """So many values of a kind."""

    def __init__(self, kind: Kind, count: int) -> None:
        self.kind = kind
        self.count = count

    def pack(self, value: Any) -> list[Plain]:
        return [self.kind.pack(each) for each in value]

    def unpack(self, plain: Plain, where: str) -> list[Any]:
        if type(plain) is not list or len(plain) != self.count:
            raise RecordError(f"{where} is no list of {self.count}")
        return [self.kind.unpack(each, where) for each in plain]


class Listing(Array):
    """At most so many values of a kind."""

    def unpack(self, plain: Plain, where: str) -> list[Any]:
        if type(plain) is not list or len(plain) > self.count:
            raise RecordError(f"{where} is no list of {self.count} at most")
        return [self.kind.unpack(each, where) for each in plain]


class Octets(Kind):
    """At most so many bytes, in hexadecimal digits."""

    def __init__(self, least: int, most: int) -> None:
        self.least, self.most = least, most

    def pack(self, value: Any) -> str:
        return bytes(value).hex()

    def unpack(self, plain: Plain, where: str) -> bytes:
        if type(plain) is not str or not 2 * self.least <= len(plain) <= 2 * self.most:
            raise RecordError(f"{where} is not {self.least} to {self.most} bytes")
        try:
            value = bytes.fromhex(plain)
        except ValueError:
            raise RecordError(f"{where} is not in hexadecimal digits") from None
        if not self.least <= len(value) <= self.most:
            raise RecordError(f"{where} is not {self.least} to {self.most} bytes")
        return value


class Text(Kind):
    """At most so many characters, which stand for bytes: UTF-8, and others as surrogates (PEP 383)."""

    def __init__(self, most: int) -> None:
        self.most = most

    def unpack(self, plain: Plain, where: str) -> str:
        if type(plain) is not str or len(plain) > self.most:
            raise RecordError(f"{where} is no text of {self.most} characters at most")
        try:
            plain.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raise RecordError(f"{where} has characters that no bytes stand for") from None
        return plain


class Optional(Kind):
    """A value of a kind, or none."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def pack(self, value: Any) -> Plain:
        return None if value is None else self.kind.pack(value)

    def unpack(self, plain: Plain, where: str) -> Any:
        return None if plain is None else self.kind.unpack(plain, where)


U64: Final = Number()
U32: Final = Number(1 << 32)
U16: Final = Number(1 << 16)
FLAG: Final = Flag()
ADDRESS: Final = Address()


class Record:
    """A dictionary that somebody wrote."""

    def __init__(self, plain: Plain, where: str) -> None:
        if type(plain) is not dict:
            raise RecordError(f"{where} is no record")
        self._plain = plain
        self.where = where

    def get(self, name: str, kind: Kind) -> Any:
        """A value of this kind. Raises RecordError."""
        if name not in self._plain:
            raise RecordError(f"{self.where} has no {name}")
        return kind.unpack(self._plain[name], f"{self.where}: {name}")

    def any(self, name: str) -> Plain:
        """What is there, unchecked. Raises RecordError where nothing is."""
        return self.get(name, Kind())

    def has(self, name: str) -> bool:
        return name in self._plain

    def record(self, name: str) -> Record:
        return Record(self._plain.get(name), f"{self.where}: {name}")

    def records(self, name: str, least: int, most: int) -> list[Record]:
        plain = self._plain.get(name)
        if type(plain) is not list or not least <= len(plain) <= most:
            raise RecordError(f"{self.where}: {name} is no list of {least} to {most}")
        return [Record(each, f"{self.where}: {name} {number}") for number, each in enumerate(plain)]
