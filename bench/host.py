"""The machine on which it was measured, and how much of it others took meanwhile."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

STAT_STEAL = 7  # the eighth number of /proc/stat's first line: proc(5)


def describe() -> dict[str, str]:
    """What a reader must know of the machine."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*: (.*)$", cpuinfo, re.MULTILINE)
    flags = set((re.search(r"^flags\s*: (.*)$", cpuinfo, re.MULTILINE) or [" ", ""])[1].split())
    memory = re.search(r"^MemTotal:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return {
        "cpu": model[1] if model else platform.machine(),
        "cpus": str(len(os.sched_getaffinity(0))),
        "memory": f"{int(memory[1]) >> 20} GiB" if memory else "unknown",
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", "unknown"),
        "kernel": platform.release(),
        "virtual machine": "yes" if "hypervisor" in flags else "no",
        "hardware virtualisation": "yes" if flags & {"vmx", "svm"} else "no",
        "/dev/kvm": "yes" if os.access("/dev/kvm", os.R_OK | os.W_OK) else "no",
        "python": platform.python_version(),
    }


@dataclass(frozen=True)
class CpuTimes:
    """Ticks of all CPUs since boot: in total, and those that the host of this virtual machine took away."""

    total: int
    steal: int

    @classmethod
    def read(cls) -> CpuTimes:
        """The counters now."""
        return cls.parse(Path("/proc/stat").read_text())

    @classmethod
    def parse(cls, stat: str) -> CpuTimes:
        """From the text of /proc/stat. guest and guest_nice are part of user and nice."""
        ticks = [int(word) for word in stat.splitlines()[0].split()[1:9]]
        return cls(sum(ticks), ticks[STAT_STEAL])

    def steal_percent_since(self, earlier: CpuTimes) -> float:
        """The share of CPU time stolen between two readings."""
        elapsed = self.total - earlier.total
        return 100 * (self.steal - earlier.steal) / elapsed if elapsed else 0.0


def load() -> float:
    """The one-minute load average."""
    return os.getloadavg()[0]
