"""Dataclasses as JSON and back, checked.

What travels over the daemon's socket is declared once, as dataclasses with types; this module turns them into JSON
values and, on the way back, checks every value against the declared type. Nothing that a peer sends can make an object
that the types do not allow: a wrong type, a missing or an unknown field is a `CodecError` that says where.

    str, int, float, bool, None   themselves (a bool is no int)
    bytes                         base64
    UUID, Path, enumerations      their text or number
    list, tuple, frozenset        arrays
    dict[str, T]                  objects
    dataclasses                   objects; fields with defaults may be missing
    A | None                      either
"""

from __future__ import annotations

import base64
import dataclasses
import types
from collections.abc import Callable
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, NewType, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints
from uuid import UUID

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"

T = TypeVar("T")


class CodecError(ValueError):
    """A value is not what its type asks for; the text says where and what."""


def encode(value: Any) -> Json:
    """The JSON for a value made of the types above."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return encode(value.value)
    if isinstance(value, UUID | Path):
        return str(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, frozenset):
        return [encode(item) for item in sorted(value)]
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {str(key): encode(item) for key, item in value.items()}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"{type(value).__name__} cannot be encoded")


def decode(expected: type[T], value: Json) -> T:
    """The value of type `expected` that the JSON stands for. Raises CodecError."""
    decoded: T = _decode(expected, value, "value")
    return decoded


def _decode(expected: Any, value: Json, where: str) -> Any:
    if isinstance(expected, NewType):
        expected = expected.__supertype__
    origin = get_origin(expected)
    if origin in (Union, types.UnionType):
        return _decode_optional(expected, value, where)
    if origin in (list, tuple, frozenset):
        return _decode_array(expected, origin, value, where)
    if origin is dict:
        item_type = get_args(expected)[1]
        members = _checked(dict, value, where)
        return {key: _decode(item_type, item, f"{where}.{key}") for key, item in members.items()}
    if dataclasses.is_dataclass(expected):
        return _decode_dataclass(expected, value, where)
    if expected in _SPECIAL:
        return _SPECIAL[expected](value, where)
    if isinstance(expected, type) and issubclass(expected, Enum):
        return _decode_enum(expected, value, where)
    return _checked(expected, value, where)


def _decode_optional(expected: Any, value: Json, where: str) -> Any:
    alternatives = [alternative for alternative in get_args(expected) if alternative is not type(None)]
    if value is None:
        return None
    (alternative,) = alternatives  # the protocol has no other unions
    return _decode(alternative, value, where)


def _decode_array(expected: Any, origin: Any, value: Json, where: str) -> Any:
    items = _checked(list, value, where)
    arguments = get_args(expected)
    if origin is tuple and arguments[-1] is not Ellipsis:
        if len(items) != len(arguments):
            raise CodecError(f"{where} must have {len(arguments)} elements, not {len(items)}")
        pairs = zip(arguments, items, strict=True)
        return tuple(_decode(kind, item, f"{where}[{index}]") for index, (kind, item) in enumerate(pairs))
    return origin(_decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(items))


@cache
def _hints(expected: type) -> dict[str, Any]:
    return get_type_hints(expected)


def _decode_dataclass(expected: Any, value: Json, where: str) -> Any:
    members = _checked(dict, value, where)
    fields = {field.name: field for field in dataclasses.fields(expected)}
    unknown = members.keys() - fields.keys()
    if unknown:
        raise CodecError(f"{where} has no field {', '.join(sorted(map(repr, unknown)))}")
    given = {}
    for name, field in fields.items():
        if name in members:
            given[name] = _decode(_hints(expected)[name], members[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise CodecError(f"{where} lacks the field '{name}'")
    return expected(**given)


def _decode_enum(expected: type[Enum], value: Json, where: str) -> Enum:
    try:
        return expected(value)
    except ValueError:
        choices = ", ".join(str(member.value) for member in expected)
        raise CodecError(f"{where} must be one of {choices}, not {_shown(value)}") from None


def _checked(expected: type, value: Json, where: str) -> Any:
    if expected is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise CodecError(f"{where} is out of range") from None
    if type(value) is not expected:
        raise CodecError(f"{where} must be of type {expected.__name__}, not {_shown(value)}")
    return value


def _decode_bytes(value: Json, where: str) -> bytes:
    try:
        return base64.b64decode(_checked(str, value, where), validate=True)
    except ValueError:  # binascii's, too
        raise CodecError(f"{where} must be base64") from None


def _decode_uuid(value: Json, where: str) -> UUID:
    try:
        return UUID(_checked(str, value, where))
    except ValueError:
        raise CodecError(f"{where} must be a UUID, not {_shown(value)}") from None


def _decode_path(value: Json, where: str) -> Path:
    text: str = _checked(str, value, where)
    if "\0" in text or not text:
        raise CodecError(f"{where} must be a path, not {_shown(value)}")
    return Path(text)


_SPECIAL: dict[Any, Callable[[Json, str], Any]] = {bytes: _decode_bytes, UUID: _decode_uuid, Path: _decode_path}


def _shown(value: Json) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
