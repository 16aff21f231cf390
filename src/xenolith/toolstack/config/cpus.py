"""CPU sets: the values of `cpus` and `cpus_soft`, and of `xl vcpu-pin`.

A set is a comma separated list of CPUs ("3"), ranges ("0-3"), NUMA nodes ("node:0", "nodes:0-1"), "all", and any of
these but "all" taken away again with "^". Source: xl.cfg(5), keys `cpus` and `cpus_soft`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass


class CpuSetError(ValueError):
    """The text is no CPU set; the message is the one of xl."""


@dataclass(frozen=True, slots=True)
class HostTopology:
    """The pCPUs of the host: how many there are and which belong to each NUMA node."""

    pcpus: int
    nodes: tuple[frozenset[int], ...]

    @classmethod
    def uniform(cls, pcpus: int) -> HostTopology:
        """`pcpus` CPUs on one node."""
        return cls(pcpus, (frozenset(range(pcpus)),))

    @classmethod
    def of_this_machine(cls) -> HostTopology:
        return cls.uniform(os.cpu_count() or 1)

    @property
    def map_bits(self) -> int:
        """The width of a CPU map. libxl's are whole bytes, which is why "all" may name more CPUs than there are."""
        return (self.pcpus + 7) // 8 * 8


def parse_cpu_set(text: str, host: HostTopology) -> frozenset[int]:
    """The pCPUs that `text` names; those beyond the CPU map are dropped."""
    chosen: set[int] = set()
    for word in filter(None, text.split(",")):
        range_text, removed = word.removeprefix("^"), word.startswith("^")
        node_text = re.sub(r"^nodes?:", "", range_text, count=1)
        if node_text == "all":
            if removed:
                raise CpuSetError('Can\'t combine "^" and "all".')
            chosen = set(range(host.map_bits))
            continue
        first, last = _range(node_text)
        if node_text is not range_text and node_text != range_text:
            named = frozenset().union(*host.nodes[first : last + 1])
        else:
            named = frozenset(range(first, min(last + 1, host.map_bits)))
        chosen = chosen - named if removed else chosen | named
    return frozenset(chosen)


def _range(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"[ \t]*\+?([0-9]{1,18})(?:-[ \t]*\+?([0-9]{1,18}))?", text)
    if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
        raise CpuSetError(f"Invalid pcpu range: {text}.")
    return int(match[1]), int(match[2] or match[1])


def format_cpu_set(cpus: Collection[int], pcpus: int) -> str:
    """The set as xl prints it: "all", "none", or ranges such as "0-2,5"."""
    present = sorted(cpu for cpu in cpus if cpu < pcpus)
    if len(present) == pcpus:
        return "all"
    if not present:
        return "none"
    ranges: list[list[int]] = []
    for cpu in present:
        if ranges and ranges[-1][1] == cpu - 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
