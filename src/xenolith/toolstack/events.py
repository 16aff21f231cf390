"""Telling many listeners what happens to domains, without ever waiting for one of them."""

from __future__ import annotations

import threading
from collections import deque

from xenolith.toolstack.client import DomainEvent

QUEUE_EVENTS = 1024


class EventQueue:
    """One listener's events (the EventStream that subscribers get)."""

    def __init__(self, hub: EventHub) -> None:
        self._hub = hub
        self._events = deque[DomainEvent](maxlen=QUEUE_EVENTS)
        self._changed = threading.Condition()
        self._closed = False

    def put(self, event: DomainEvent) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()

    def get(self, timeout: float | None = None) -> DomainEvent | None:
        """The next event; None when `timeout` seconds passed or the queue was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._events or self._closed, timeout)
            return self._events.popleft() if self._events else None

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """No more events; whoever waits in `get` gets what is left, then None."""
        self._hub.forget(self)
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class EventHub:
    """Hands each event to every listener."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queues: list[EventQueue] = []

    def subscribe(self) -> EventQueue:
        queue = EventQueue(self)
        with self._lock:
            self._queues.append(queue)
        return queue

    def publish(self, event: DomainEvent) -> None:
        with self._lock:
            queues = list(self._queues)
        for queue in queues:
            queue.put(event)

    def forget(self, queue: EventQueue) -> None:
        with self._lock:
            if queue in self._queues:
                self._queues.remove(queue)

    def close(self) -> None:
        """End all listeners."""
        with self._lock:
            queues = list(self._queues)
        for queue in queues:
            queue.close()
