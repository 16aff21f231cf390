"""Looking: the host, the domains and their vCPUs, what they did, their configurations, Xen's messages."""

from __future__ import annotations

import contextlib
import copy
import platform
import time
from typing import TYPE_CHECKING

from xenolith.abi import layout
from xenolith.abi.hypercalls import RUNSTATE_blocked, RUNSTATE_offline, RUNSTATE_runnable
from xenolith.dom0.backends.block_native import BlockStatistics
from xenolith.dom0.network.port import PortStatistics
from xenolith.hypervisor.control import NoSuchDomain
from xenolith.toolstack.client import DOM0_UUID, DomainInfo, DomainNotFound, DomainStatistics, HostInfo, VcpuInfo
from xenolith.toolstack.config.domain import DomainConfig
from xenolith.toolstack.embedded.part import Part
from xenolith.toolstack.embedded.table import DOM0_NAME, DomainTable, Record

if TYPE_CHECKING:
    from pathlib import Path

    from xenolith.hypervisor.control import DomainInfo as XenDomainInfo


class Looking(Part):
    """What there is."""

    def __init__(self, table: DomainTable) -> None:
        super().__init__(table)
        self._power_on_time = time.time()
        self._xenstore_socket: Path | None = None

    def host(self) -> HostInfo:
        machine = self._control.machine()
        return HostInfo(
            host=platform.node(),
            release=platform.release(),
            version=platform.version(),
            machine=platform.machine(),
            nr_cpus=machine.pcpus,
            cores_per_socket=machine.pcpus,
            cpu_khz=machine.tsc_hz // 1000,
            hw_caps=machine.features,
            virt_caps=("pv",),
            total_memory_kib=machine.total_pages * 4,
            free_memory_kib=machine.free_pages * 4,
            xen_major=machine.version[0],
            xen_minor=machine.version[1],
            xen_extra=machine.extra_version,
            xen_caps=tuple(machine.capabilities.split()),
            scheduler=machine.scheduler,
            scheduler_parameters=machine.scheduler_parameters,
            free_cpus=len(machine.unassigned_pcpus),
            virt_start=layout.HYPERVISOR_VIRT_START,
            engine=self.dom0.engine,
            xenstore_socket=str(self._xenstore_socket) if self._xenstore_socket else None,
        )

    def domains(self) -> list[DomainInfo]:
        with self._table.lock:
            living = {info.domid: info for info in self._control.list()}
            found = [self._dom0_info()]
            for domid, record in sorted(self._table.records.items()):
                if record.last_seen is not None:
                    found.append(record.last_seen)
                elif domid in living:
                    found.append(_info(living[domid], record))
            return found

    def departed(self) -> list[DomainInfo]:
        return [each.info for each in reversed(self._table.departed())]

    def _dom0_info(self) -> DomainInfo:
        return DomainInfo(
            domid=0,
            name=DOM0_NAME,
            uuid=DOM0_UUID,
            running=True,
            memory_kib=0,
            max_memory_kib=0,
            vcpus_online=1,
            cpu_time_ns=time.process_time_ns(),
            pool=self._control.cpupools()[0].name,
            start_time=self._power_on_time,
        )

    def vcpus(self, domid: int) -> list[VcpuInfo]:
        everywhere = frozenset(range(self._control.machine().pcpus))
        if not domid:
            return [
                VcpuInfo(
                    vcpu=0,
                    online=True,
                    cpu=0,
                    running=True,
                    cpu_time_ns=time.process_time_ns(),
                    hard_affinity=everywhere,
                    soft_affinity=everywhere,
                )
            ]
        with self._table.hold(domid):
            vcpus = self._control.vcpus(domid)
        return [
            VcpuInfo(
                vcpu=vcpu.vcpu_id,
                online=vcpu.online,
                cpu=vcpu.pcpu,
                running=vcpu.running,
                blocked=vcpu.blocked,
                cpu_time_ns=vcpu.cpu_time,
                runnable_ns=vcpu.times[RUNSTATE_runnable],
                blocked_ns=vcpu.times[RUNSTATE_blocked],
                offline_ns=vcpu.times[RUNSTATE_offline],
                hard_affinity=everywhere if vcpu.hard_affinity is None else vcpu.hard_affinity,
                soft_affinity=everywhere if vcpu.soft_affinity is None else vcpu.soft_affinity,
            )
            for vcpu in vcpus
        ]

    def statistics(self) -> list[DomainStatistics]:
        found = []
        for info in self.domains():
            with contextlib.suppress(DomainNotFound):  # it may have gone by now
                found.append(self._statistics(info))
        return found

    def _statistics(self, info: DomainInfo) -> DomainStatistics:
        vcpu_times = tuple(vcpu.cpu_time_ns for vcpu in self.vcpus(info.domid))
        try:
            counters = self._control.counters(info.domid)
        except NoSuchDomain:
            raise DomainNotFound(info.domid) from None
        domain = self.dom0.domains.get(info.domid)
        disks = domain.disk_statistics() if domain else BlockStatistics()
        nets = domain.net_statistics() if domain else PortStatistics()
        return DomainStatistics(
            domid=info.domid,
            cpu_time_ns=info.cpu_time_ns,
            vcpu_times_ns=vcpu_times,
            traps=counters.total_traps,
            hypercalls=sum(counters.hypercalls.values()),
            network_received_bytes=nets.rx_bytes,
            network_sent_bytes=nets.tx_bytes,
            disk_read_bytes=disks.read_bytes,
            disk_written_bytes=disks.written_bytes,
            disk_reads=disks.reads,
            disk_writes=disks.writes,
        )

    def config(self, domid: int) -> DomainConfig:
        with self._table.lock:
            if not domid:
                return DomainConfig(DOM0_NAME, DOM0_UUID)
            return copy.deepcopy(self._table.record(domid).config)

    def set_config(self, domid: int, config: DomainConfig) -> None:
        with self._table.lock:
            self._table.record(domid).config = copy.deepcopy(config)

    def dmesg(self) -> str:
        return self._control.log_text()

    def clear_dmesg(self) -> None:
        self._control.clear_log()


def _info(info: XenDomainInfo, record: Record) -> DomainInfo:
    config = record.config
    return DomainInfo(
        domid=info.domid,
        name=config.name,
        uuid=config.uuid,
        running=info.running,
        blocked=info.blocked,
        paused=info.paused,
        shutdown=info.shutdown,
        shutdown_reason=info.shutdown_reason,
        dying=info.dying,
        memory_kib=info.total_pages * 4,
        max_memory_kib=info.max_pages * 4,
        vcpus_online=info.online_vcpus,
        cpu_time_ns=info.cpu_time,
        pool=info.cpupool,
        start_time=record.start_time,
    )
