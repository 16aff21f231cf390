"""Event words that a guest changes while ring 0 links a port behind them (the FIFO event ABI)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from xenolith.abi.event_fifo import EVENT_ARRAY_PAGES
from xenolith.abi.hypercalls import DOMID_SELF, EVTCHNOP_reset
from xenolith.abi.x86 import PAGE_SIZE
from xenolith.hypervisor import audit, event_fifo
from xenolith.hypervisor.events import EventChannels
from xenolith.hypervisor.guest_memory import WRITE, translate
from xenolith.hypervisor.hypercalls.event_channel_op import do_event_channel_op
from xenolith.machine.memory import MachineMemory

from .bare import DATA, BareMachine, write

TAIL, PORT = 5, 9


@pytest.mark.parametrize("channels", [1023, 5000])
def test_a_domain_with_many_ports_may_leave_the_abi_and_enter_it_again(channels: int) -> None:
    machine = BareMachine()
    domain = machine.domain()
    domain.events = ports = EventChannels(domain, channels)
    control, words = (translate(domain.vcpus[0], DATA + page * PAGE_SIZE, WRITE) >> 12 for page in (1, 2))
    write(domain.vcpus[0], DATA, DOMID_SELF.to_bytes(2, "little"))
    with domain.lock:
        for _ in range(2):
            assert ports.init_control(0, control, 0) == 0
            assert ports.expand_array(words) == 0
            assert [ports.bind_ipi(0) for _ in range(channels)] == list(range(1, channels + 1))
            ports.set_pending(7)
            assert ports.pending(7)
            domain.work_left = 1 << 20
            assert do_event_channel_op(domain.vcpus[0], EVTCHNOP_reset, DATA) == 0
            assert all(not ports.pending(port) for port in range(channels + 1) if ports.valid(port))
            assert not ports.valid(4096)
            domain.memory.page(words)[:] = bytes(PAGE_SIZE)
    assert not audit.check(machine.hypervisor)
    machine.close()


@pytest.mark.parametrize("meanwhile", [[], ["masked"], ["masked", "unlinked"], ["masked"] * 9], ids=len)
def test_a_word_that_changes_meanwhile_is_not_left_busy(monkeypatch: pytest.MonkeyPatch, meanwhile: list[str]) -> None:
    """Linux clears MASKED only in a word that is not BUSY, and tries until it is so."""
    memory = MachineMemory(4)
    page = int(memory.allocate(1)[0]) << 12
    domain: Any = SimpleNamespace(memory=memory, event_pages=[page] + [0] * (EVENT_ARRAY_PAGES - 1))
    word = page + TAIL * 4 >> 2
    memory.d[word] = event_fifo.L | event_fifo.P
    changes = list(meanwhile)
    compare_exchange_32 = event_fifo.compare_exchange_32

    def exchange(address: int, expected: int, new: int) -> int:
        if changes:
            memory.d[word] ^= event_fifo.M if changes.pop(0) == "masked" else event_fifo.L
        return int(compare_exchange_32(address, expected, new))

    monkeypatch.setattr(event_fifo, "compare_exchange_32", exchange)
    linked = event_fifo._set_link(domain, TAIL, PORT)
    assert linked == (len(meanwhile) < 2)
    assert not memory.d[word] & event_fifo.BUSY
    if linked:
        assert memory.d[word] & 0x1FFFF == PORT
    memory.close()
