"""Xenolith, a Xen virtual machine monitor. `docs/api.md` shows what can be done with what is named here.

Everything is imported when it is first used, so that `import xenolith` costs nothing.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # typing's, whose import would take longer than all of this
if TYPE_CHECKING:
    from xenolith.toolstack.api import Domain, Machine, State, Timeout, connect, debian, load_config, power_on
    from xenolith.toolstack.client import EventKind
    from xenolith.toolstack.config.domain import Action, DomainConfig
    from xenolith.toolstack.config.grammar import ConfigError
    from xenolith.toolstack.errors import Closed, DomainNotFound, EngineUnavailable, RunError, ToolstackError
    from xenolith.toolstack.foreground import Completed, run
    from xenolith.toolstack.xenstore_client import XenstoreConflict, XenstoreError

__all__ = [
    "Action",
    "Closed",
    "Completed",
    "ConfigError",
    "Domain",
    "DomainConfig",
    "DomainNotFound",
    "EngineUnavailable",
    "EventKind",
    "Machine",
    "RunError",
    "State",
    "Timeout",
    "ToolstackError",
    "XenstoreConflict",
    "XenstoreError",
    "connect",
    "debian",
    "load_config",
    "power_on",
    "run",
]

_ELSEWHERE = {
    "Action": "config.domain",
    "Closed": "errors",
    "ConfigError": "config.grammar",
    "DomainConfig": "config.domain",
    "DomainNotFound": "errors",
    "EngineUnavailable": "errors",
    "EventKind": "client",
    "ToolstackError": "errors",
    "Completed": "foreground",
    "RunError": "errors",
    "XenstoreConflict": "xenstore_client",
    "XenstoreError": "xenstore_client",
    "run": "foreground",
}


class CallablePackage(type(sys)):  # type: ignore[misc]
    """The package `xenolith.debian`, which as an attribute hides the function of that name: it does what that does."""

    def __call__(self, *values: object, **named: object) -> object:
        from xenolith.toolstack.api import debian

        return debian(*values, **named)  # type: ignore[arg-type]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    if name == "debian":
        return import_module(f"{__name__}.debian")
    return getattr(import_module(f"{__name__}.toolstack.{_ELSEWHERE.get(name, 'api')}"), name)
