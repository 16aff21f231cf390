"""The hypervisor object: the machine's resources and the domains on it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from xenolith.abi.hypercalls import DOMID_FIRST_RESERVED
from xenolith.hypervisor.domain import Domain
from xenolith.hypervisor.hypercalls import version
from xenolith.hypervisor.sched.algorithms import ALGORITHMS, DEFAULT
from xenolith.hypervisor.sched.core import Scheduler
from xenolith.hypervisor.sched.policy import MakePolicy
from xenolith.hypervisor.time import TimerQueue
from xenolith.machine.clock import Clock
from xenolith.machine.engines.protocol import Engine
from xenolith.machine.memory import MachineMemory, MemoryBudget
from xenolith.machine.tsc import frequency, host_clock

LOG_LINES: Final = 2048
DEFAULT_POLICY: Final[MakePolicy] = ALGORITHMS[DEFAULT]


class Hypervisor:
    """One machine under Xenolith's control.

    `memory` what all domains may use together, `engine_factory` makes the engine of a new domain on its memory, `pcpus`
    how many vCPUs run at once, `host_cpus` what those are pinned to, see sched.core.  Each domain's memory is its own,
    see `view`.
    """

    def __init__(
        self,
        memory: MemoryBudget,
        engine_factory: Callable[[MachineMemory], Engine],
        clock: Clock | None = None,
        pcpus: int = 2,
        policy: MakePolicy = DEFAULT_POLICY,
        host_cpus: Sequence[int] = (),
    ) -> None:
        self.memory = memory
        self.clock: Clock = clock or host_clock()
        self.engine_factory = engine_factory
        self.lock = threading.RLock()  # protects `domains`; taken before any domain's lock
        self.domains: dict[int, Domain] = {}
        self._last_domid = 0
        self._log: deque[str] = deque(maxlen=LOG_LINES)
        self.tsc_hz = frequency()
        self.timers = TimerQueue(self.clock)
        if host_cpus:
            self.timers.start()  # by a thread that is not pinned
        self.scheduler = Scheduler(self.clock, self.timers, pcpus, policy, host_cpus)
        self.log(f"Xenolith {version.MAJOR}.{version.MINOR}{version.EXTRAVERSION.decode()}")
        self.log(f"machine memory: {memory.frames >> 8} MiB, {memory.free_frames >> 8} MiB free for domains")
        name = self.scheduler.pools.first.policy.name
        self.log(f"{pcpus} pCPUs, scheduler {name}, TSC {self.tsc_hz // 1_000_000} MHz")

    def next_domid(self) -> int:
        """A domain id that was not in use lately. The caller holds `lock`."""
        for step in range(1, DOMID_FIRST_RESERVED):
            domid = 1 + (self._last_domid + step - 1) % (DOMID_FIRST_RESERVED - 1)
            if domid not in self.domains:
                self._last_domid = domid
                return domid
        return DOMID_FIRST_RESERVED

    def log(self, text: str) -> None:
        """Add a line to the hypervisor's log (`xl dmesg`)."""
        self._log.append(text)

    @property
    def log_text(self) -> str:
        return "".join(line + "\n" for line in self._log)

    def clear_log(self) -> None:
        """Forget the log."""
        self._log.clear()

    def close(self) -> None:
        """Switch the machine off. No domain but dom0 is left."""
        self.timers.stop()

    def domain(self, domid: int) -> Domain | None:
        """The domain with this id, dying ones included."""
        return self.domains.get(domid)


__all__ = ["DEFAULT_POLICY", "Hypervisor", "MakePolicy"]
