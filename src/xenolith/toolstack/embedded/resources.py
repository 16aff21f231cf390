"""What a domain may use: the processors, by scheduling parameters, affinities and cpupools, and the memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from xenolith.dom0 import domain_tree
from xenolith.toolstack.client import CpupoolInfo, InvalidRequest
from xenolith.toolstack.embedded.part import Part


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """A value that the hypervisor refuses is an InvalidRequest."""
    try:
        yield
    except ValueError as error:
        raise InvalidRequest(f"{error}.") from error


class Resources(Part):
    """What a domain gets."""

    def scheduling(self, domid: int) -> dict[str, int]:
        with self._table.hold(domid):
            return self._control.scheduling(domid)

    def set_scheduling(self, domid: int, parameters: dict[str, int]) -> None:
        with self._table.hold(domid) as record, _refusals():
            self._control.set_scheduling(domid, parameters)
            record.config.scheduler.update(parameters)

    def set_affinity(
        self, domid: int, vcpu: int | None, hard: frozenset[int] | None = None, soft: frozenset[int] | None = None
    ) -> None:
        with self._table.hold(domid) as record, _refusals():
            self._control.set_affinity(domid, vcpu, hard, soft)
            config, now = record.config, self.vcpus(domid)
            if hard is not None:
                config.hard_affinity = [each.hard_affinity for each in now]
            if soft is not None:
                config.soft_affinity = [each.soft_affinity for each in now]

    def cpupools(self) -> list[CpupoolInfo]:
        return [
            CpupoolInfo(
                name=pool.name,
                scheduler=pool.scheduler,
                scheduler_parameters=pool.scheduler_parameters,
                schedparam=dict(pool.schedparam),
                cpus=frozenset(pool.pcpus),
                domains=pool.domains,
            )
            for pool in self._control.cpupools()
        ]

    def create_cpupool(self, name: str, scheduler: str, cpus: frozenset[int]) -> None:
        with _refusals():
            self._control.create_cpupool(name, scheduler, cpus)

    def destroy_cpupool(self, name: str) -> None:
        with _refusals():
            self._control.destroy_cpupool(name)

    def rename_cpupool(self, name: str, new_name: str) -> None:
        with self._table.lock, _refusals():
            self._control.rename_cpupool(name, new_name)
            for record in self._table.records.values():
                if record.config.pool == name:
                    record.config.pool = new_name

    def add_to_cpupool(self, name: str, cpus: frozenset[int]) -> None:
        with _refusals():
            self._control.add_to_cpupool(name, cpus)

    def remove_from_cpupool(self, name: str, cpus: frozenset[int]) -> None:
        with _refusals():
            self._control.remove_from_cpupool(name, cpus)

    def move_to_cpupool(self, domid: int, name: str) -> None:
        with self._table.hold(domid) as record, _refusals():
            self._control.move_to_cpupool(domid, name)
            config = record.config
            config.pool, config.hard_affinity, config.soft_affinity = name, None, None

    def set_schedparam(self, name: str, parameters: dict[str, int]) -> None:
        with _refusals():
            self._control.set_schedparam(name, parameters)

    def set_vcpus(self, domid: int, count: int) -> None:
        with self._table.hold(domid) as record:
            config = record.config
            most = config.vcpus_ceiling
            if not 1 <= count <= most:
                raise InvalidRequest(f"Requested {count} VCPUs, however maxcpus is {most}.")
            config.vcpus, config.max_vcpus = count, most
            for number in range(most):
                availability = "online" if number < count else "offline"
                self.dom0.xenstore.write(f"{domain_tree.home(domid)}/cpu/{number}/availability", availability)

    def set_memory_target(self, domid: int, kib: int) -> None:
        with self._table.hold(domid) as record, _refusals():
            config = record.config
            most = config.memory_ceiling_kib
            if kib > most:
                raise InvalidRequest(f"{kib} KiB are more than the {most} KiB that the domain was made for (maxmem).")
            self._control.set_max_pages(domid, kib // 4)
            config.target_memory_kib, config.max_memory_kib = kib, most
            self.dom0.xenstore.write(f"{domain_tree.home(domid)}/memory/target", str(kib))

    def set_max_memory(self, domid: int, kib: int) -> None:
        with self._table.hold(domid) as record, _refusals():
            target = record.config.memory_kib
            if kib < target:
                raise InvalidRequest(f"{kib} KiB are less than the domain's target of {target} KiB (see mem-set).")
            self._control.set_max_pages(domid, kib // 4)
