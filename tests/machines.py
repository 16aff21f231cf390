"""A machine under test: what the fixtures of conftest.py hand out."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest

from xenolith.dom0.power import power_on
from xenolith.dom0.services import Dom0, DomainSpec, GuestDomain
from xenolith.hypervisor import audit
from xenolith.hypervisor.control import DomainInfo
from xenolith.machine.engines.protocol import EngineError
from xenolith.machine.engines.select import choose
from xenolith.machine.engines.unicorn.user import host
from xenolith.machine.memory import MachineMemory

DEADLINE_SECONDS = 200


def unicorn_with_stubs(monkeypatch: pytest.MonkeyPatch) -> str:
    """The engine's name: Unicorn, with all user mode in stubs, which domains with one vCPU have."""
    if reason := host.missing():
        pytest.skip(f"no stub processes here: {reason}")
    monkeypatch.setenv(host.SETTING, host.FORCE)
    return "unicorn"


@functools.cache
def missing(engine: str) -> str:
    """Why an engine does not work here; empty if it does."""
    memory = MachineMemory(1024)
    try:
        choose(engine).factory(memory).close()
    except EngineError as error:
        return str(error)
    finally:
        memory.close()
    return ""


@dataclass(frozen=True)
class Ending:
    """How a domain ended."""

    info: DomainInfo
    console: str
    log: str  # the hypervisor's

    @property
    def shutdown_reason(self) -> int | None:
        return self.info.shutdown_reason


class Machine:
    """A machine under test."""

    def __init__(self, mib: int, engine: str) -> None:
        self.dom0: Dom0 = power_on([mib], engine)

    def finish(self, domain: GuestDomain) -> Ending:
        """Wait for a started domain's end. Prints its console, which pytest shows when the test fails."""
        end = domain.wait(DEADLINE_SECONDS)
        console = domain.console.scrollback.decode("utf-8", "replace")
        log = self.dom0.hypervisor.log_text
        print(f"--- console of {domain.spec.name} ---\n{console}\n--- the hypervisor's log ---\n{log}")
        if end is None:
            info = self.dom0.control.info(domain.domid)
            pytest.fail(f"{domain.spec.name} has not ended after {DEADLINE_SECONDS} s: {info}")
        print(end)
        return Ending(end, console, log)

    def run(self, spec: DomainSpec) -> Ending:
        """Make a domain and run it to its end."""
        domain = self.dom0.create(spec)
        self.dom0.start(domain)
        return self.finish(domain)

    def check_invariants(self) -> None:
        """Recount every type and reference of the frame table, with all domains stopped."""
        for domain in self.dom0.domains.values():
            self.dom0.control.pause(domain.domid)
        problems = audit.check(self.dom0.hypervisor)
        for domain in self.dom0.domains.values():
            self.dom0.control.unpause(domain.domid)
        assert not problems, "the frame table is inconsistent:\n" + "\n".join(problems[:20])
