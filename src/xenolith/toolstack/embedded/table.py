"""The domains of a toolstack: what is known of each beside what dom0 knows, and whose turn it is with it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from xenolith.hypervisor.control import NoSuchDomain
from xenolith.toolstack.client import Closed, DomainEvent, DomainInfo, DomainNotFound, EventKind, InvalidRequest
from xenolith.toolstack.clone_disks import CloneDisks, clones_directory
from xenolith.toolstack.events import EventHub

if TYPE_CHECKING:
    from xenolith.dom0.console import Console
    from xenolith.dom0.services import Dom0, GuestDomain
    from xenolith.hypervisor.control import Control
    from xenolith.toolstack.agent.session import Session
    from xenolith.toolstack.checkpoints import CheckpointedDomain, Schedule
    from xenolith.toolstack.config.domain import DomainConfig
    from xenolith.toolstack.protection import ProtectedDomain

DEPARTED_SECONDS: Final = 30.0  # how long the console of a domain that went can still be read
DOM0_NAME: Final = "Domain-0"


@dataclass(slots=True)
class Record:
    """What is known of a domain."""

    domain: GuestDomain
    config: DomainConfig
    start_time: float = field(default_factory=time.time)
    lock: threading.RLock = field(default_factory=threading.RLock)  # what is done to it is done by one at a time
    waiters: set[threading.Event] = field(default_factory=set)  # set when it has ended
    leaving: threading.Event = field(default_factory=threading.Event)  # it is being destroyed
    agent_lock: threading.Lock = field(default_factory=threading.Lock)  # of what follows; taken after none of ours
    agent: Session | None = None
    agent_answers: bool = False  # it is known to be there: a clone of one that was
    newborn: Mapping[int, bytes] | None = None  # a clone that was not let run yet: the MACs that its guest knows
    last_seen: DomainInfo | None = None  # as it was when that began, which it is shown as until it is gone
    checkpointed: CheckpointedDomain | None = None
    schedule: Schedule | None = None  # of checkpoints
    stay: Callable[[], None] | None = None  # lets it go on: it was given away, and nobody knows whether it runs there
    protected: ProtectedDomain | None = None

    def end_checkpoints(self) -> None:
        """The domain goes, or somebody else follows what it writes."""
        if self.protected is not None:
            self.protected.stop()
        if self.schedule is not None:
            self.schedule.stop()
            self.schedule = None
        if self.checkpointed is not None:
            self.checkpointed.close()
            self.checkpointed = None


@dataclass(frozen=True, slots=True)
class Departed:
    """A domain that went."""

    info: DomainInfo
    console: Console
    time: float = field(default_factory=time.monotonic)


class DomainTable:
    """The guests of `dom0` by domid, the names that are taken, and the listeners who hear what happens. Any thread."""

    def __init__(self, dom0: Dom0) -> None:
        self.dom0 = dom0
        self.lock = threading.RLock()  # of all below; taken before anything of dom0's, and after a record's
        self.records: dict[int, Record] = {}
        self.hub = EventHub()
        self.clone_disks = CloneDisks(clones_directory())
        self._claimed: set[str] = set()
        self._departed: list[Departed] = []
        self.closed = False  # from then on nothing is answered
        dom0.shutdown_hooks.append(self._tell_shutdown)

    @property
    def control(self) -> Control:
        """Raises Closed."""
        self.check_open()
        return self.dom0.control

    def check_open(self) -> None:
        """Raises Closed."""
        if self.closed:
            raise Closed("This machine was closed; its domains are gone.")

    def close(self) -> None:
        """End all listeners, and who waits for a domain."""
        for record in list(self.records.values()):
            record.end_checkpoints()
            self.wake_waiters(record)
        self.hub.close()

    # --- a domain ----------------------------------------------------------------------------------------

    def record(self, domid: int) -> Record:
        """A guest by domid. Raises DomainNotFound, and InvalidRequest for dom0."""
        if not domid:
            raise InvalidRequest("Domain-0 is this toolstack's own domain; that cannot be done to it.")
        self.check_open()
        record = self.records.get(domid)
        if record is None or domid not in self.dom0.domains:
            raise DomainNotFound(domid)
        return record

    @contextlib.contextmanager
    def hold(self, domid: int) -> Iterator[Record]:
        """Do something to a guest, alone; raises as `record` does, also when the domain goes at that moment."""
        record = self.record(domid)
        with record.lock:
            self.record(domid)
            try:
                yield record
            except NoSuchDomain:
                raise DomainNotFound(domid) from None

    # --- coming and going --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[None]:
        """Nobody else may take a name meanwhile. Raises InvalidRequest where it is taken."""
        with self.lock:
            if name in {DOM0_NAME, *self._claimed, *(record.config.name for record in self.records.values())}:
                raise InvalidRequest(f'Domain with name "{name}" already exists.')
            self._claimed.add(name)
        try:
            yield
        finally:
            with self.lock:
                self._claimed.discard(name)

    def add(self, record: Record) -> int:
        """A domain that was made, whose name the caller has claimed; its domid."""
        domid = record.domain.domid
        with self.lock:
            self.records[domid] = record
        self.hub.publish(DomainEvent(EventKind.CREATED, domid))
        return domid

    def remove(self, record: Record) -> None:
        """A domain that is gone. The caller tells the listeners."""
        assert record.last_seen is not None
        with self.lock:
            del self.records[record.domain.domid]
            self._departed = [*self.departed(), Departed(record.last_seen, record.domain.console)]

    def departed(self) -> list[Departed]:
        """Those that went a moment ago."""
        with self.lock:
            since = time.monotonic() - DEPARTED_SECONDS
            self._departed = [each for each in self._departed if each.time > since]
            return list(self._departed)

    def wake_waiters(self, record: Record) -> None:
        with self.lock:
            for waiter in record.waiters:
                waiter.set()

    def _tell_shutdown(self, domain: GuestDomain) -> None:
        """On dom0's event thread."""
        assert domain.end is not None
        record = self.records.get(domain.domid)
        if record is not None:
            self.wake_waiters(record)
        self.hub.publish(DomainEvent(EventKind.SHUTDOWN, domain.domid, reason=domain.end.shutdown_reason))
