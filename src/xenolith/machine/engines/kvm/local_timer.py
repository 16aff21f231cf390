"""The local APIC's timer of one vCPU, which interrupts its programs for the fast path's ticks.

`start_ticks` in run.c sets it; here it is set up, and stopped whenever the guest has stopped.
"""

from __future__ import annotations

from struct import pack_into

from xenolith.machine.engines.kvm import api, area, processor, run_page
from xenolith.machine.engines.kvm.api import ioctl
from xenolith.machine.engines.kvm.native_run import KvmFields
from xenolith.machine.engines.kvm.run_page import RunPage
from xenolith.machine.native import buffer_address


class LocalTimer:
    def __init__(self, fd: int, page: RunPage, shared: KvmFields) -> None:
        self._fd = fd
        self._page = page
        self._shared = shared
        self._lapic = lapic = bytearray(api.LAPIC_SIZE)
        ioctl(fd, api.KVM_SET_MP_STATE, bytearray(4))  # runs: only vCPU 0 does by itself
        ioctl(fd, api.KVM_GET_LAPIC, lapic)
        for register, value in (
            (api.LAPIC_SPURIOUS, api.LAPIC_ENABLED),
            (api.LAPIC_TIMER, api.LAPIC_PERIODIC | area.VECTOR_TICK),
            (api.LAPIC_DIVIDE, api.LAPIC_DIVIDE_BY_1),
        ):
            pack_into("<I", lapic, register, value)
        self.set(0, 0)
        shared.lapic = buffer_address(lapic)

    def set(self, first: int, length: int) -> None:
        """An interrupt in `first` ns and then every `length` ns; off if `length` is 0."""
        for register, value in ((api.LAPIC_INITIAL_COUNT, length), (api.LAPIC_CURRENT_COUNT, first)):
            pack_into("<I", self._lapic, register, value)
        ioctl(self._fd, api.KVM_SET_LAPIC, self._lapic)

    def stop(self) -> None:
        """The guest has stopped: no interrupt may be left."""
        self._shared.ticking = False
        self.set(0, 0)
        page = self._page.b
        page[run_page.INTERRUPTS] = bytes(run_page.INTERRUPTS.stop - run_page.INTERRUPTS.start)
        if page[run_page.EVENTS][api.EVENTS_INTERRUPT_INJECTED]:
            processor.clear_events(self._fd, api.EVENTS_INTERRUPT_INJECTED)
