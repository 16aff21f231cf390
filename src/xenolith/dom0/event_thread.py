"""The thread on which dom0's back-ends do their work.

An event for dom0 calls its handler on the thread of whoever sent it, in the middle of a guest's hypercall
(hypervisor/events.py).  A back-end must not work there: it would hold up the guest, and take its locks in any order.
So the handler only notes that there is work, and this thread does it, one piece after the other, as an interrupt
handler leaves its work to a kernel thread.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from queue import SimpleQueue

Work = Callable[[], None]


class EventThread:
    """A thread that does what was asked for, once for any number of requests that came before it got to it.

    Work that raises is reported to `log` and does not keep other work from being done.
    """

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._queue: SimpleQueue[Work | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="dom0", daemon=True)
        self._thread.start()

    def on_event(self, work: Work) -> Callable[[int], None]:
        """A handler for an event port that has `work` done soon. It may be called anywhere and never waits."""
        requested = False
        put = self._queue.put

        def do() -> None:
            nonlocal requested
            requested = False  # first, so that an event which comes during the work has it done once more
            work()

        def handler(port: int) -> None:
            nonlocal requested
            if not requested:
                requested = True
                put(do)

        return handler

    def stop(self) -> None:
        """Do what was asked for so far, then end."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                work()
            except Exception:
                self._log(f"dom0: a back-end failed:\n{traceback.format_exc()}")
