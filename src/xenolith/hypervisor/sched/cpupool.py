"""A cpupool: pCPUs, the algorithm that gives them out, and which unit holds each (Xen: common/sched/cpupool.c).

A unit may be held to pCPUs by *hard* affinity, and prefer some by *soft*.  Hard affinity that names none of the pool's
pCPUs does not count.

No pCPU stands idle while somebody waits whom an exchange would serve: who runs is moved from one pCPU that it may use
to another, as often as it takes (an augmenting path of the bipartite graph of units and pCPUs).  That is cheap, for a
pCPU is a token: the vCPU goes on executing while it is moved.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from xenolith.hypervisor.sched.policy import Policy, Unit


class Cpupool:
    """The pCPUs of these numbers under `policy`."""

    def __init__(self, name: str, policy: Policy, pcpus: Iterable[int]) -> None:
        self.name = name
        self.policy = policy
        self.members: set[Unit] = set()  # of all domains in the pool
        self.holders: dict[int, Unit | None] = dict.fromkeys(pcpus)
        self.waiting: list[Unit] = []

    @property
    def running(self) -> list[Unit]:
        return [unit for unit in self.holders.values() if unit is not None]

    @property
    def free(self) -> list[int]:
        return [pcpu for pcpu, unit in self.holders.items() if unit is None]

    def usable(self, unit: Unit) -> list[int]:
        """The pCPUs that it may use."""
        hard = unit.hard
        return [pcpu for pcpu in self.holders if hard is None or pcpu in hard] or list(self.holders)

    def reach(self, unit: Unit) -> dict[int, int]:
        """The pCPUs any of which would let the unit run, were it free, the nearest first.

        For each the pCPU whose holder would be moved to it; -1 where the unit itself may use it.
        """
        reached = dict.fromkeys(self.usable(unit), -1)
        to_do = list(reached)
        for pcpu in to_do:
            holder = self.holders[pcpu]
            if holder is not None and len(reached) < len(self.holders):
                found = [other for other in self.usable(holder) if other not in reached]
                reached.update(dict.fromkeys(found, pcpu))
                to_do += found
        return reached

    def could_use(self, pcpu: int, units: Iterable[Unit]) -> list[Unit]:
        """Those whom this pCPU would let run."""
        return [unit for unit in units if unit.hard is None or pcpu in self.reach(unit)]

    def place(self, unit: Unit) -> list[Unit] | None:
        """Give the unit a pCPU; those that were moved to that end. None: there is none for it."""
        free = [pcpu for pcpu in self.usable(unit) if self.holders[pcpu] is None]
        if free:
            self._give(min(free, key=lambda pcpu: (not _likes(unit, pcpu), pcpu != unit.pcpu)), unit)
            return []
        if None not in self.holders.values():
            return None
        reached = self.reach(unit)
        end = next((pcpu for pcpu in reached if self.holders[pcpu] is None), None)
        if end is None:
            return None
        path = [end]
        while reached[path[-1]] >= 0:
            path.append(reached[path[-1]])
        moved = []
        for target, source in pairwise(path):
            holder = self.holders[source]
            assert holder is not None
            self._give(target, holder)
            moved.append(holder)
        self._give(path[-1], unit)
        return moved

    def attract(self, pcpu: int) -> Unit | None:
        """Nobody waits for a free pCPU: let one have it who runs on another and prefers this."""
        for unit in self.running:
            if unit.soft is not None and pcpu in unit.soft and unit.pcpu not in unit.soft and pcpu in self.usable(unit):
                self.holders[unit.pcpu] = None
                self._give(pcpu, unit)
                return unit
        return None

    def release(self, unit: Unit) -> None:
        """The unit leaves its pCPU, which may have left the pool meanwhile."""
        if self.holders.get(unit.pcpu) is unit:
            self.holders[unit.pcpu] = None

    def _give(self, pcpu: int, unit: Unit) -> None:
        self.holders[pcpu] = unit
        unit.pcpu = pcpu


def _likes(unit: Unit, pcpu: int) -> bool:
    return unit.soft is None or pcpu in unit.soft
