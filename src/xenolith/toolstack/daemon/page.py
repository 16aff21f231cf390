"""The table of requests in docs/control-protocol.md, made from the definitions of the verbs.

`make docs` puts it there.
"""

from __future__ import annotations

import dataclasses
import types
from enum import Enum
from pathlib import Path
from typing import Any, Final, NewType, Union, get_args, get_origin
from uuid import UUID

from xenolith.toolstack.client import ConsoleStream, EventStream, ProcessStream
from xenolith.toolstack.daemon.protocol import METHODS
from xenolith.toolstack.verbs import Verb

BEGIN: Final = "<!-- made by `make docs` from the methods of toolstack/client.py -->\n"
END: Final = "<!-- end -->\n"

_WORDS: Final = {
    type(None): "null",
    str: "text",
    int: "number",
    float: "number",
    bool: "true or false",
    bytes: "base64",
    Path: "absolute path",
    UUID: "UUID",
    ConsoleStream: "null, then a console",
    EventStream: "null, then events",
    ProcessStream: "null, then a process",
}


def requests_table() -> str:
    """One row for each request."""
    rows = ["| request | arguments | result | |\n|---|---|---|---|\n"]
    for verb in METHODS.values():
        arguments = ", ".join(_argument(verb, name) for name in verb.arguments)
        result = _in_words(verb.result) + ("; tells progress" if verb.reports_progress else "")
        rows.append(f"| `{verb.name}` | {arguments} | {result} | {verb.summary} |\n")
    return "".join(rows)


def _argument(verb: Verb, name: str) -> str:
    words = _in_words(verb.arguments[name])
    return f"`{name}`: {words}" + (" (may be left out)" if name in verb.optional else "")


def _in_words(kind: Any) -> str:
    """A type as people who write a client in another language know it."""
    if isinstance(kind, NewType):
        return _in_words(kind.__supertype__)
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_in_words(alternative) for alternative in get_args(kind))
    if origin is dict:
        return f"object of {_in_words(get_args(kind)[1])}"
    if origin is not None:
        return f"array of {_in_words(get_args(kind)[0])}"
    if dataclasses.is_dataclass(kind):
        return f"`{getattr(kind, '__name__', kind)}`"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " or ".join(f'"{member.value}"' for member in kind)
    return _WORDS[kind]


def with_table(page: str) -> str:
    """The page with the table as it should be between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + requests_table() + "\n" + END + after
