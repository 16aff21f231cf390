"""The tiny guests of ``guests/``: how each is run and what its console and its end must be.

Each guest exercises one mechanism of the PV interface and prints a line for every check, ``ok N - what``
or ``not ok N - what: got X expected Y``, then ``done PASSED=n FAILED=m``, and powers off. What a check
expects is what was observed on Xen 4.17; where this hypervisor differs on purpose, the command line of
the entry below says so to the guest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

PREBUILT = Path(__file__).resolve().parents[2] / "guests" / "prebuilt"

# Shutdown reasons of Xen's public sched.h.
POWEROFF, REBOOT, SUSPEND, CRASH, WATCHDOG = range(5)

PASSED = re.compile(r"^done PASSED=[1-9]\d* FAILED=0$", re.MULTILINE)
FAILED_CHECK = re.compile(r"^not ok .*$", re.MULTILINE)


@dataclass(frozen=True)
class Guest:
    """One run of one guest: how to build its domain, and what must come of it."""

    name: str  # of this run; also the test's id
    file: str  # in guests/prebuilt
    cmdline: str = ""
    vcpus: int = 1
    memory_mib: int = 32
    shutdown_reason: int = POWEROFF
    console: tuple[re.Pattern[str], ...] = (PASSED,)  # each must be found in the console's output
    # Checks by unprivileged instructions that read descriptor tables (LAR, a load of a selector that the host has too).
    # They cannot be trapped, and on KVM they see the engine's table, or where it is paravirtual the host's; nor can
    # reads of CS and SS, which are always the same there, for a vCPU that is not alone and so cannot go elsewhere.
    of_descriptor_tables: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The prebuilt ELF."""
        return PREBUILT / self.file

    def complaints(self, console: str, shutdown_reason: int | None, sees_host_tables: bool = False) -> list[str]:
        """What is wrong with this ending (``None``: it did not end); empty if all is as it must be."""
        if sees_host_tables:
            for check in self.of_descriptor_tables:
                console = re.sub(rf"^not (ok \d+ -  *{re.escape(check)}): .*$", r"\1", console, flags=re.MULTILINE)
            failed = len(FAILED_CHECK.findall(console))
            console = re.sub(r"(?<=FAILED=)\d+$", str(failed), console, flags=re.MULTILINE)
        found = FAILED_CHECK.findall(console)
        found += [f"the console never showed {p.pattern!r}" for p in self.console if not p.search(console)]
        if shutdown_reason != self.shutdown_reason:
            found.append(f"shutdown reason {shutdown_reason}, expected {self.shutdown_reason}")
        return found


def checks(name: str, file: str | None = None, *, cmdline: str = "", vcpus: int = 1, memory_mib: int = 32) -> Guest:
    """A guest that must pass all its checks and power off."""
    return Guest(name, file or f"{name}.elf", cmdline, vcpus, memory_mib)


def ending(how: str, reason: int) -> Guest:
    """A run of crash.elf: it says how it will end, and ends that way."""
    said = re.compile(rf"^ending: {re.escape(how)}$", re.MULTILINE)
    return Guest("ending-" + how.replace(" reason=", "-"), "crash.elf", how, 1, 32, reason, (said,))


def fuzz(seed: int, calls: int) -> Guest:
    """Random hypercalls from a seed, after which the guest must find itself and its machine sane."""
    return checks(f"fuzz-{seed}-{calls}", "fuzz.elf", cmdline=f"seed={seed} calls={calls}")


CATALOGUE: tuple[Guest, ...] = (
    checks("hello", cmdline="console_io"),
    checks("hello-page", cmdline="console_io"),
    checks("exceptions"),
    checks("paging"),
    checks("paging-abuse"),
    replace(checks("descriptors"), of_descriptor_tables=("lar sees the code segment", "its last entry")),
    checks("selectors"),
    checks("iopl"),
    checks("m2p"),
    checks("m2p-smp", "m2p.elf", vcpus=2),
    checks("mini"),
    replace(checks("mini-smp", "mini.elf", vcpus=2), of_descriptor_tables=("cs", "ss")),
    checks("edges"),
    checks("user"),
    checks("user-page"),
    checks("privileged"),
    checks("events"),
    checks("fifo"),
    checks("fifo-smp", "fifo.elf", cmdline="others=3 rounds=1000", vcpus=4),
    checks("nmi"),
    checks("multicall"),
    checks("version"),
    checks("timers"),
    checks("memory"),
    checks("smp", vcpus=3),
    checks("smp-paging", vcpus=2),
    checks("grants"),
    checks("grants2"),
    checks("debug"),
    checks("strays", cmdline="seed=3 runs=500"),
    checks("strays-gates", "strays.elf", cmdline="seed=3 runs=500 gates"),
    checks("packets", cmdline="seed=1 packets=1000 last"),
    *(fuzz(seed, calls=2000) for seed in (1, 2, 3)),
    ending("shutdown reason=0", POWEROFF),
    ending("shutdown reason=1", REBOOT),
    ending("shutdown reason=3", CRASH),
    ending("shutdown reason=7", 7),
    ending("shutdown reason=256", POWEROFF),  # the reason is one byte
    ending("no-handler", CRASH),
    ending("no-stack", CRASH),
    ending("read-only-stack", CRASH),
    ending("no-iret-frame", CRASH),
    ending("no-callback", CRASH),
    ending("recursion", CRASH),
    ending("no-user-tables", CRASH),
    ending("watchdog", WATCHDOG),
    ending("reset", 7),
)

# These need devices; see test_blkfront.py and test_netfront.py.
WITH_DEVICES: tuple[Guest, ...] = (
    checks("blkfront"),
    checks("blkfront-abuse"),
    checks("blkfront-records"),
    checks("netfront"),
    checks("p9front"),
)

# In no run of their own; see test_isolation.py and test_endless.py.
PARTS_OF_TESTS: tuple[str, ...] = ("reach.elf", "endless.elf", "load.elf")  # the last is of bench

# For a test marked slow.
LONG_RUNS: tuple[Guest, ...] = (fuzz(4, calls=100_000),)
