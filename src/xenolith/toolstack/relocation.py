"""Relocation between two daemons: over an address of the other (`peers`), or over a UNIX socket at which somebody waits
who reaches it, as `xl migrate` does.

The sender's daemon connects to the socket and sends the domain; so does the receiver's, and receives it. Whoever
listens passes the bytes on, both ways, over whatever there is: ssh, socat, a pipe.

A domain runs here or there, never in both places. If the connection breaks when it is given away, whoever started the
relocation asks the receiver (`Arrivals.settle`), by a token that went along, and tells the sender.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from xenolith.dom0.migration import live
from xenolith.dom0.services import Dom0, GuestDomain
from xenolith.hypervisor.control import DomainCreateError, RecordError
from xenolith.toolstack.client import OnProgress, Progress, ToolstackError, Undetermined
from xenolith.toolstack.config.domain import DomainConfig
from xenolith.toolstack.daemon.codec import encode
from xenolith.toolstack.peers import HAS_COME, HAS_NOT_COME, PATIENCE_SECONDS, connected

MOST_ARRIVALS: Final = 1000  # that are remembered


def send_domain(
    dom0: Dom0,
    domain: GuestDomain,
    config: DomainConfig,
    to: str,
    token: str,
    on_ready: Callable[[], None],
    progress: OnProgress,
    limit: float = 0,
) -> live.Figures:
    """Send a domain. It is paused afterwards, to be ended; with a ToolstackError it goes on here.

    Raises Undetermined, whose cause is live.Undetermined, where nobody knows: it stays paused.
    """
    with connected(to, "relocate") as connection:
        try:
            return live.send(
                dom0,
                domain,
                connection.out,
                connection.source,
                {"config": encode(config), "token": token},
                lambda text: progress(Progress(text, 0, 0)),
                on_ready,
                connection.hang_up,
                limit,
            )
        except live.Refused as refusal:
            raise ToolstackError(f"The other side did not take the domain: {refusal or 'it went away'}.") from refusal
        except live.Undetermined as error:
            raise Undetermined(
                f"The connection broke when the domain was given away ({error}). The other side may run it: it stays "
                f"paused here as domain {domain.domid}. Look there before you unpause or destroy it."
            ) from error
        except RecordError as error:
            raise ToolstackError(f"Domain {domain.domid} cannot be relocated: {error}.") from error
        except DomainCreateError as error:
            raise ToolstackError(f"Domain {domain.domid} was not relocated, and cannot go on: {error}.") from error
        except OSError as error:
            raise ToolstackError(f"The connection broke: {error.strerror or error}.") from error


@dataclass
class Arrival:
    """A domain that comes, or came. It is let run once, or given up."""

    hang_up: Callable[[], None] = lambda: None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _arrived: bool | None = None
    over: threading.Event = field(default_factory=threading.Event)
    """What was made of it is gone, or runs."""

    def let_run(self, run: Callable[[], None]) -> None:
        """Raises ToolstackError where it was given up, and as `run` does."""
        with self._lock:
            if self._arrived is False:
                raise ToolstackError("the sender was told that it had not arrived")
            run()
            self._arrived = True

    def give_up(self) -> bool:
        """Whether it had been let run before."""
        with self._lock:
            self._arrived = bool(self._arrived)
            return self._arrived


class Arrivals:
    """The domains that came here lately, by the senders' tokens. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, Arrival] = {}

    def begin(self, token: str, hang_up: Callable[[], None]) -> Arrival:
        """One comes. Raises ToolstackError where its sender was told that it will not."""
        arrival = Arrival(hang_up)
        if token and self._remember(token, arrival) is not arrival:
            raise ToolstackError("a domain with this token has come, or was given up, before")
        return arrival

    def settle(self, token: str) -> bool:
        """Whether it was let run; if not, it never will be, and has let go of its disks when this returns."""
        arrival = self._remember(token, None)
        if arrival.give_up():
            return True
        arrival.hang_up()
        arrival.over.wait(PATIENCE_SECONDS)
        return False

    def _remember(self, token: str, arrival: Arrival | None) -> Arrival:
        with self._lock:
            if arrival is None:
                arrival = Arrival()
                arrival.over.set()
            known = self._known.setdefault(token, arrival)
            while len(self._known) > MOST_ARRIVALS:
                del self._known[next(iter(self._known))]
            return known


def ask_whether_arrived(address: str, token: str) -> bool:
    """Ask the daemon at an address, see Arrivals.settle. Raises ToolstackError."""
    with connected(address, f"settle {token}") as connection:
        try:
            connection.out.flush()
            answer = connection.source.readline(len(HAS_NOT_COME))
        except OSError as error:
            raise ToolstackError(f"{address} does not answer: {error.strerror or error}") from error
    if answer not in (HAS_COME, HAS_NOT_COME):
        raise ToolstackError(f"{address} does not answer")
    return answer == HAS_COME
