"""What clones may write: the machine's memory, where copies share what none of them has written yet.

The host copies a page when a clone first writes to it, and asks nobody.  So that no domain can find the host out of
memory, a clone (and what clones were made of) is charged for what it has of its own and RESERVE frames ahead while it
runs, and its charge follows what it writes, every INTERVAL_S.  One for which there is no memory any more is paused
where it is; it goes on by `unpause`, when there is.  A clone that does not run is charged for its own frames and
`memory.COPY_RESERVE`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from xenolith.hypervisor.control import Control, DomainCreateError, NoSuchDomain

RESERVE: Final = 4096  # frames: 16 MiB
INTERVAL_S: Final = 1.0


class Copies:
    """Follows the clones that run. Methods may be called by any thread."""

    def __init__(self, control: Control, log: Callable[[str], None]) -> None:
        self._control = control
        self._log = log
        self._lock = threading.Lock()
        self._running: set[int] = set()
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()

    def attend(self, domid: int) -> None:
        """A domain is let run: if it is a clone, or some were made of it, charge it ahead. Raises DomainCreateError."""
        if not self._control.reserve(domid, RESERVE):
            return
        with self._lock:
            self._running.add(domid)
            if self._thread is None:
                self._thread = threading.Thread(target=self._follow, name="copies", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def _follow(self) -> None:
        while not self._stopping.wait(INTERVAL_S):
            self.look()

    def look(self) -> None:
        """Charge each for what it has written, and pause those that there is no memory for."""
        with self._lock:
            running = list(self._running)
        for domid in running:
            try:
                if self._control.info(domid).paused:
                    continue
                self._control.reserve(domid, RESERVE)
            except NoSuchDomain:
                with self._lock:
                    self._running.discard(domid)
            except DomainCreateError as error:
                self._control.pause(domid)
                self._log(f"d{domid}: paused, as the machine has no memory for what it may write: {error}")
