"""The hypervisor object: the machine's resources and the domains on it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from xenolith.hypervisor.domain import Domain
from xenolith.hypervisor.frames import FrameTable
from xenolith.hypervisor.scheduler import Scheduler
from xenolith.hypervisor.time import TimerQueue
from xenolith.machine.clock import Clock, RealClock
from xenolith.machine.engines.protocol import Engine
from xenolith.machine.memory import MachineMemory

LOG_LINES = 2048


class Hypervisor:
    """One machine under Xenolith's control.

    `memory` all machine memory, `engine_factory` makes the engine of a new domain, `pcpus` how many vCPUs run at once.
    """

    def __init__(
        self,
        memory: MachineMemory,
        engine_factory: Callable[[MachineMemory], Engine],
        clock: Clock | None = None,
        pcpus: int = 2,
    ) -> None:
        self.memory = memory
        self.clock: Clock = clock or RealClock()
        self.engine_factory = engine_factory
        self.lock = threading.RLock()  # protects `domains`; taken before any domain's lock
        self.domains: dict[int, Domain] = {}
        self._log: deque[str] = deque(maxlen=LOG_LINES)
        self.frames = FrameTable(memory)
        self.timers = TimerQueue(self.clock)
        self.scheduler = Scheduler(self, pcpus)

    def log(self, text: str) -> None:
        """Add a line to the hypervisor's log (`xl dmesg`)."""
        self._log.append(text)

    @property
    def log_text(self) -> str:
        return "".join(line + "\n" for line in self._log)

    def domain(self, domid: int) -> Domain | None:
        """The domain with this id, dying ones included."""
        return self.domains.get(domid)
