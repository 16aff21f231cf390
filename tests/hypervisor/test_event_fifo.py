"""Event words that a guest changes while ring 0 links a port behind them (the FIFO event ABI)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from xenolith.abi.event_fifo import EVENT_ARRAY_PAGES
from xenolith.hypervisor import event_fifo
from xenolith.machine.memory import MachineMemory

TAIL, PORT = 5, 9


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
