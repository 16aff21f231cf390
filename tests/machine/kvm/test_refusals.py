"""What KVM refuses ends the domain that is in that state, with the reason, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

import xenolith
from xenolith.machine.engines.kvm import host
from xenolith.machine.engines.kvm.cpu import KvmCpu
from xenolith.machine.engines.kvm.traits import Counter
from xenolith.machine.engines.protocol import EngineError, TrapHandler

SHUTDOWN_CRASH = 3
PREBUILT = Path(__file__).parents[3] / "guests" / "prebuilt"


def guest(machine: xenolith.Machine, name: str) -> xenolith.Domain:
    kernel = str(PREBUILT / "hello.elf")
    return machine.create(xenolith.DomainConfig(name, kernel=kernel, cmdline="console_io", target_memory_kib=16 << 10))


def test_an_entry_that_kvm_refuses_ends_its_domain_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    run = KvmCpu.run
    refused: list[KvmCpu] = []

    def refuses_first(cpu: KvmCpu, on_trap: TrapHandler) -> None:
        refused.append(cpu)
        if cpu is refused[0]:
            raise EngineError("KVM_RUN failed: Invalid argument")
        run(cpu, on_trap)

    monkeypatch.setattr(KvmCpu, "run", refuses_first)
    with xenolith.power_on(64, engine="kvm") as machine:
        first, second = guest(machine, "first"), guest(machine, "second")
        for domain in (first, second):
            domain.unpause()
            assert domain.wait(timeout=60) is xenolith.State.SHUTDOWN
        assert (first.info.shutdown_reason, second.info.shutdown_reason) == (SHUTDOWN_CRASH, 0)
        assert "engine cannot go on: KVM_RUN failed: Invalid argument" in machine.client.dmesg()
        assert len(refused) > 1


@pytest.mark.parametrize("counter", [Counter.OFFSET, Counter.WRITTEN])
def test_a_host_whose_own_counter_is_no_clock_is_refused(monkeypatch: pytest.MonkeyPatch, counter: Counter) -> None:
    """KVM gives guests another one then, by the kernel's time, whatever offset was set."""
    monkeypatch.setattr(host, "_counter", lambda machine: counter)
    monkeypatch.setattr(host, "is_usable", lambda: False)
    with pytest.raises(EngineError, match="time stamp counter unusable"):
        host.host_traits.__wrapped__()
