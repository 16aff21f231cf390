"""Following domains through their lives: the part of `xl create` that stays behind.

xl leaves one process per domain waiting for it to end. Here one thread waits for all of them: it hears of every
shutdown from the client, asks `lifecycle` what to do and does it. What is slow about that (a core dump, a rebuild) is
done by a thread of its own, so that no domain waits for another.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from xenolith.toolstack.client import Client, DomainEvent, EventKind, EventStream, Supervision, ToolstackError
from xenolith.toolstack.config.domain import DomainConfig
from xenolith.toolstack.events import EventHub, EventQueue
from xenolith.toolstack.lifecycle import RESTART_PAUSE_S, Lifecycle, Plan, State, Step

_NO_DOMAIN = -1


class Supervisor(Supervision):
    """Follows the domains of a Client. Closing it ends the supervision and leaves the domains as they are."""

    def __init__(self, client: Client, dump_directory: Path, now: Callable[[], datetime] | None = None) -> None:
        self._client = client
        self._dump_directory = dump_directory
        self._now = now or (lambda: datetime.now(UTC))
        self._closing = threading.Event()
        self.pause_between_lives: Callable[[float], bool] = self._closing.wait  # True: closed meanwhile
        self._lock = threading.Lock()
        self._lives: dict[int, Lifecycle] = {}
        self._workers: set[threading.Thread] = set()
        self._hub = EventHub()
        self._events = client.subscribe()
        self._thread = threading.Thread(target=self._follow, name="supervisor", daemon=True)
        self._thread.start()

    def supervise(self, domid: int) -> None:
        life = Lifecycle(self._client.config(domid), domid)
        with self._lock:
            self._lives.setdefault(domid, life)
        # It may have ended before anybody looked.
        info = next((domain for domain in self._client.domains() if domain.domid == domid), None)
        if info is None:
            self._lose(domid)
        elif info.shutdown:
            self._ended(DomainEvent(EventKind.SHUTDOWN, domid, reason=info.shutdown_reason))

    def watch(self, domid: int) -> EventStream:
        watch = _Watch(self._hub.subscribe(), domid)
        with self._lock:
            supervised = domid in self._lives
        if not supervised:
            watch.close()
            raise ToolstackError(f"Domain {domid} is not supervised.")
        return watch

    def abandon(self, name: str) -> bool:
        alive = {domain.domid for domain in self._client.domains()}
        with self._lock:
            found = [
                life
                for life in self._lives.values()
                if life.config.name == name and (life.state is State.WAITING or life.domid not in alive)
            ]
            for life in found:
                life.destroyed()
        for life in found:
            self._release(life, f"Domain {name} is not built again.")
        return bool(found)

    def close(self) -> None:
        """Stop following; returns when no thread of the supervisor is left."""
        self._closing.set()
        self._events.close()
        self._thread.join()
        for worker in list(self._workers):
            worker.join()
        self._hub.close()

    def _follow(self) -> None:
        while (event := self._events.get()) is not None:
            if event.kind is EventKind.SHUTDOWN:
                self._ended(event)
            elif event.kind is EventKind.DESTROYED:
                self._lose(event.domid)

    def _ended(self, event: DomainEvent) -> None:
        """A domain has shut down: decide, and let a thread do it."""
        with self._lock:
            life = self._lives.get(event.domid)
            if life is None or event.reason is None:
                return
            life.config = self._current_config(life)
            names = [domain.name for domain in self._client.domains()]
            plan = life.shut_down(event.reason, self._now(), names)
            if not plan.messages:
                return  # it was known already
            worker = threading.Thread(target=self._carry_out, args=(life, plan), name=f"domain {event.domid}")
            self._workers.add(worker)
        self._hub.publish(event)
        try:
            worker.start()
        except RuntimeError:  # Python's, for a thread that the host does not give: other domains have to wait
            self._workers.discard(worker)
            self._carry_out(life, plan)

    def _current_config(self, life: Lifecycle) -> DomainConfig:
        """What the domain would be built from now; config-update and rename may have changed it."""
        try:
            return self._client.config(life.domid)
        except ToolstackError:
            return life.config

    def _lose(self, domid: int) -> None:
        """A domain was destroyed; if not by its own plan, nobody needs to follow it any more."""
        with self._lock:
            life = self._lives.get(domid)
            if life is None or life.state is not State.RUNNING:
                return
            del self._lives[domid]
            life.destroyed()
        self._hub.publish(DomainEvent(EventKind.DESTROYED, domid))

    def _carry_out(self, life: Lifecycle, plan: Plan) -> None:
        try:
            for message in plan.messages:
                self._say(life.domid, message)
            for step in plan.steps:
                if not self._step(life, step, again=not plan.ends):
                    break
            if plan.ends:
                self._release(life, "Done. Exiting now")
        finally:
            self._workers.discard(threading.current_thread())

    def _step(self, life: Lifecycle, step: Step, again: bool) -> bool:
        """Do one step of a plan, after which the domain is built again or not; False if the rest makes no sense."""
        domid = life.domid
        try:
            if step is Step.DUMP_CORE:
                self._dump_core(life)
            elif step is Step.DESTROY:
                self._say(domid, f"Domain {domid} needs to be cleaned up: destroying the domain")
                self._client.destroy(domid, again)
            elif step is Step.RENAME:
                self._client.rename(domid, life.corpses[-1])
            elif step is Step.SOFT_RESET:
                self._client.soft_reset(domid)
                self._say(domid, "Done. Rebooting now")
            elif step is Step.PAUSE:
                self._say(domid, "Done. Rebooting now")
                return not self.pause_between_lives(RESTART_PAUSE_S)
            elif step is Step.REBUILD:
                return self._rebuild(life)
        except ToolstackError as error:
            self._say(domid, f"{step} failed: {error}")
            life.destroyed()
            self._release(life, "Giving up on this domain.")
            return False
        return True

    def _dump_core(self, life: Lifecycle) -> None:
        """Write a core; a failure is reported and changes nothing, as with xl."""
        path = self._dump_directory / life.config.name.replace("/", "_")
        self._say(life.domid, f"dumping core to {path}")
        try:
            self._dump_directory.mkdir(parents=True, exist_ok=True)
            self._client.dump_core(life.domid, path)
        except (ToolstackError, OSError) as error:
            self._say(life.domid, f"core dump failed: {error}")

    def _rebuild(self, life: Lifecycle) -> bool:
        """The next life, unless the domain was abandoned."""
        before = life.domid
        with self._lock:
            if life.state is not State.WAITING:
                return False
        domid = self._client.create(life.config)
        with self._lock:
            wanted = life.state is State.WAITING
            if wanted:
                self._lives.pop(before, None)
                life.rebuilt(domid)
                self._lives[domid] = life
        if not wanted:
            self._client.destroy(domid)
            return False
        self._hub.publish(DomainEvent(EventKind.REBUILT, before, successor=domid))
        self._client.unpause(domid)
        return True

    def _release(self, life: Lifecycle, message: str) -> None:
        with self._lock:
            self._lives.pop(life.domid, None)
        self._say(life.domid, message)
        self._hub.publish(DomainEvent(EventKind.RELEASED, life.domid))

    def _say(self, domid: int, text: str) -> None:
        self._hub.publish(DomainEvent(EventKind.MESSAGE, domid, text=text))


class _Watch:
    """The events of one domain and of those that are built in its place (the EventStream of `watch`)."""

    def __init__(self, queue: EventQueue, domid: int) -> None:
        self._queue = queue
        self._domid = domid

    def get(self, timeout: float | None = None) -> DomainEvent | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            event = self._queue.get(left)
            if event is None or event.domid == self._domid:
                break
        if event is None:
            return None
        if event.kind is EventKind.REBUILT and event.successor is not None:
            self._domid = event.successor
        elif event.kind in (EventKind.RELEASED, EventKind.DESTROYED):
            self._queue.close()
            self._domid = _NO_DOMAIN
        return event

    def close(self) -> None:
        self._queue.close()
