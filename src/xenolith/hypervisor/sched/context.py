"""An execution context: the thread of one `Cpu` of an engine, and the vCPUs that run on it.

Waking and kicking come from any thread, in the middle of anything, so they take no lock: a context sleeps on a binary
semaphore, and whoever wakes it releases that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from threading import get_ident
from typing import TYPE_CHECKING

from xenolith.hypervisor import traps
from xenolith.hypervisor.time import Timer

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Domain, Vcpu
    from xenolith.machine.engines.protocol import Cpu, TrapHandler


class Context:
    """The thread of one `Cpu` and the vCPUs that run on it."""

    def __init__(
        self, domain: Domain, cpu: Cpu, run: Callable[[Context], None], quantum_over: Callable[[Context], None]
    ) -> None:
        """`run` is its thread's work; `quantum_over` is called when the time is up of who runs on it."""
        self.domain = domain
        self.cpu = cpu
        self.vcpus: list[Vcpu] = []
        self.running: Vcpu | None = None  # holds a pCPU
        self.pinned = -1  # the pCPU to whose host CPU its thread is pinned
        self.wanted: Vcpu | None = None  # waits for one
        self.loaded: Vcpu | None = None
        self.preempt = False  # leave the pCPU at the next chance
        self.stopping = False
        self.to_store: threading.Event | None = None  # somebody waits for the loaded vCPU's state
        self.quantum_timer = Timer(lambda: quantum_over(self))
        self._handlers: dict[Vcpu, TrapHandler] = {}
        # Binary semaphores, taken until somebody releases them.
        self._wakeup = threading.Lock()
        self._wakeup.acquire()
        self.granted = threading.Lock()
        self.granted.acquire()
        self.thread = threading.Thread(target=run, args=(self,), name=f"d{domain.domid}", daemon=True)

    def wake(self) -> None:
        """End the thread's sleep, or keep its next one from beginning. Takes no lock."""
        with suppress(RuntimeError):  # it is awake already
            self._wakeup.release()

    def sleep(self) -> None:
        """Wait for `wake`."""
        self._wakeup.acquire()

    def handler(self, vcpu: Vcpu) -> TrapHandler:
        handler = self._handlers.get(vcpu)
        if handler is None:
            handler = self._handlers[vcpu] = traps.trap_handler(vcpu, self.cpu)
        return handler

    def leave_guest(self) -> None:
        """Make whoever runs here leave the guest, and the thread look. From any thread; takes no lock."""
        self.wake()
        running = self.running
        if running is not None and self.thread.ident != get_ident():
            running.kicked = True
            self.cpu.kick()

    def leave_pcpu(self) -> None:
        """Make whoever runs here give up its pCPU. From any thread; takes no lock."""
        self.preempt = True
        running = self.running
        if running is not None:
            running.kicked = True
            self.cpu.kick()


def contexts_of(domain: Domain) -> list[Context]:
    """Each once; none where the domain has not begun."""
    return list({id(vcpu.context): vcpu.context for vcpu in domain.vcpus if vcpu.context is not None}.values())
