"""The errors of the toolstack: whatever goes wrong is one of them, with a text for people."""

from __future__ import annotations


class ToolstackError(Exception):
    """Something that was asked for cannot be done; the text says why. `rc` is libxl's error number for it."""

    rc = -3  # ERROR_FAIL


class DomainNotFound(ToolstackError):
    """There is no domain with this domid."""

    rc = -21  # ERROR_DOMAIN_NOTFOUND

    def __init__(self, domid: int) -> None:
        super().__init__(f"Domain {domid} does not exist.")
        self.domid = domid


class InvalidRequest(ToolstackError):
    """The request makes no sense for this domain, or at all."""

    rc = -6  # ERROR_INVAL


class NotAcknowledged(ToolstackError):
    """The guest did not react to a request in time."""

    rc = -9  # ERROR_TIMEDOUT


class NotSupported(ToolstackError):
    """This toolstack cannot do that (yet)."""

    rc = -4  # ERROR_NI


class ConnectionLost(ToolstackError):
    """The daemon went away, or speaks another language."""


class Undetermined(ToolstackError):
    """Nobody knows yet whether a domain runs where it was sent to. It is paused here."""


class EngineUnavailable(ToolstackError):
    """The engine that was asked for cannot run here."""


class Closed(ToolstackError):
    """The machine, or the connection to it, was closed before."""


class RunError(ToolstackError):
    """A foreground run's domain could not be made; nothing was run."""


class UsageError(RunError):
    """What was asked for does not go together."""
