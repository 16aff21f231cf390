"""A verb is written once: what is derived from the signature of an abstract method.

`client.Client` and `client.Supervision` define what can be asked of a toolstack. Each of their abstract methods is a
verb, and its signature says all there is to say: the arguments by name and type, what comes back, whether progress is
told (a parameter `progress`), whether the answer is a stream (`-> ConsoleStream`, `-> EventStream`). From that come the
requests of the daemon's protocol and how they are checked, the methods of the client at the other end of the socket
(`forwarding`), and the table in docs/control-protocol.md, with the first sentence of the docstring.
"""

from __future__ import annotations

import abc
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, Final, TypeVar, get_type_hints

PROGRESS: Final = "progress"  # the parameter of a verb that takes long; a function to report to

T = TypeVar("T", bound=type)


@dataclass(frozen=True, slots=True)
class Verb:
    """One thing that can be asked for."""

    name: str
    interface: type  # the class that defines it
    arguments: Mapping[str, Any]  # types by name, in order
    optional: frozenset[str]  # the arguments with a default
    result: Any
    reports_progress: bool
    summary: str
    signature: inspect.Signature

    def bind(self, *values: Any, **named: Any) -> tuple[dict[str, Any], Any]:
        """The arguments of a call by name, the defaults too, and where to report progress (None if nowhere).

        Raises TypeError, as a call with these arguments would.
        """
        bound = self.signature.bind(*values, **named)
        bound.apply_defaults()
        given = dict(bound.arguments)
        return given, given.pop(PROGRESS, None)


@cache
def verbs_of(interface: type) -> dict[str, Verb]:
    """The verbs that an interface defines, in the order in which it does."""
    return {
        name: _verb(interface, name, function)
        for name, function in vars(interface).items()
        if getattr(function, "__isabstractmethod__", False)
    }


def _verb(interface: type, name: str, function: Callable[..., Any]) -> Verb:
    hints = get_type_hints(function)
    result = hints.pop("return")
    signature = inspect.signature(function)
    signature = signature.replace(parameters=list(signature.parameters.values())[1:])  # without self
    reports_progress = hints.pop(PROGRESS, None) is not None
    optional = {key for key in hints if signature.parameters[key].default is not inspect.Parameter.empty}
    summary = " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())
    return Verb(name, interface, hints, frozenset(optional), result, reports_progress, summary, signature)


def forwarding(cls: T) -> T:
    """A class decorator: verbs that the class inherits and does not define are handed to its method `ask`.

    `ask(verb, arguments, progress)` gets the arguments by name and returns what the verb returns.
    """
    for interface in cls.__mro__[1:]:
        for verb in verbs_of(interface).values():
            if getattr(getattr(cls, verb.name), "__isabstractmethod__", False):
                setattr(cls, verb.name, _forwarder(verb))
    abc.update_abstractmethods(cls)
    return cls


def _forwarder(verb: Verb) -> Callable[..., Any]:
    @wraps(getattr(verb.interface, verb.name), updated=())  # all but the mark of an abstract method
    def forward(self: Any, *values: Any, **named: Any) -> Any:
        return self.ask(verb, *verb.bind(*values, **named))

    return forward
