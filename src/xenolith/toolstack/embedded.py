"""The toolstack in one's own process: `Client` on top of a dom0 that runs here (design decision 9).

A program that imports xenolith uses this directly; the daemon serves the same object to others.  What a request asks of
dom0 is asked at once, in the caller's thread; what happens to domains is told by dom0's event thread through an
`EventHub`, so that no listener is ever waited for.
"""

from __future__ import annotations

import contextlib
import copy
import platform
import threading
import time
import uuid as uuids
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from xenolith.abi import layout
from xenolith.abi.hypercalls import RUNSTATE_blocked, RUNSTATE_offline, RUNSTATE_runnable
from xenolith.dom0 import domain_tree
from xenolith.dom0.backends.block_native import BlockStatistics
from xenolith.dom0.console import Console, ConsoleClosed, Overflow
from xenolith.dom0.image import ImageError, load_image
from xenolith.dom0.migration import live
from xenolith.dom0.migration.clone import FrozenDomain, freeze
from xenolith.dom0.migration.protect import Standby
from xenolith.dom0.migration.restore import Received
from xenolith.dom0.network.port import PortStatistics
from xenolith.dom0.services import Dom0, DomainSpec, GuestDomain
from xenolith.hypervisor.control import USUAL, Control, DomainCreateError, Limits, NoSuchDomain, RecordError
from xenolith.hypervisor.control import DomainInfo as XenDomainInfo
from xenolith.toolstack import devices, networks
from xenolith.toolstack.agent.frames import identity
from xenolith.toolstack.agent.session import AgentUnavailable, Session
from xenolith.toolstack.checkpoints import (
    CheckpointedDomain,
    Schedule,
    check_complete,
    checkpoints_in,
    put_disks_back,
)
from xenolith.toolstack.client import (
    DOM0_UUID,
    AfterSave,
    Checkpoint,
    Client,
    Closed,
    ConsoleStream,
    CpupoolInfo,
    DiskInfo,
    DomainEvent,
    DomainInfo,
    DomainNotFound,
    DomainStatistics,
    EventKind,
    EventStream,
    Execution,
    HostInfo,
    InvalidRequest,
    NetworkInfo,
    NewDomid,
    NotAcknowledged,
    NotSupported,
    OnProgress,
    ProcessStream,
    Progress,
    ProtectionInfo,
    RelocationInfo,
    RelocationRound,
    ShutdownRequest,
    TemplateInfo,
    ToolstackError,
    Trigger,
    Undetermined,
    VcpuInfo,
    no_progress,
)
from xenolith.toolstack.config.disk import Disk
from xenolith.toolstack.config.domain import DomainConfig
from xenolith.toolstack.config.vif import Nic
from xenolith.toolstack.dump import dump_domain
from xenolith.toolstack.events import EventHub
from xenolith.toolstack.peers import HAS_COME, HAS_NOT_COME, Connection, Listener, connected
from xenolith.toolstack.protection import ProtectedDomain, patiently, stand_by, standby_directory
from xenolith.toolstack.relocation import Arrivals, ask_whether_arrived, send_domain
from xenolith.toolstack.saving import Arriving, open_saved, save_domain
from xenolith.toolstack.templates import Templates

ACKNOWLEDGE_SECONDS: Final = 60.0  # as libxl
DEPARTED_SECONDS: Final = 30.0  # how long the console of a domain that went can still be read
AGENT_SECONDS: Final = 120.0  # that a guest may take to boot until its agent answers
TYPING_SECONDS: Final = 1.0  # how long input waits for a guest that does not read
DOM0_NAME: Final = "Domain-0"
MAPPINGS_PER_MAPTRACK_FRAME: Final = 256  # a page of Xen's struct grant_mapping


@dataclass(slots=True)
class _Record:
    """What is known of a domain beside what dom0 knows."""

    config: DomainConfig
    start_time: float
    lock: threading.RLock = field(default_factory=threading.RLock)  # what is done to it is done by one at a time
    waiters: set[threading.Event] = field(default_factory=set)  # set when it has ended
    leaving: threading.Event = field(default_factory=threading.Event)  # it is being destroyed
    agent_lock: threading.Lock = field(default_factory=threading.Lock)  # of what follows; taken after none of ours
    agent: Session | None = None
    agent_answers: bool = False  # it is known to be there: a clone of one that was
    newborn: bool = False  # a clone that was not let run yet
    last_seen: DomainInfo | None = None  # as it was when that began, which it is shown as until it is gone
    checkpointed: CheckpointedDomain | None = None
    schedule: Schedule | None = None  # of checkpoints
    stay: Callable[[], None] | None = None  # lets it go on: it was given away, and nobody knows whether it runs there

    protected: ProtectedDomain | None = None

    def end_checkpoints(self) -> None:
        """The domain goes, or somebody else follows what it writes."""
        if self.protected is not None:
            self.protected.stop()
        if self.schedule is not None:
            self.schedule.stop()
            self.schedule = None
        if self.checkpointed is not None:
            self.checkpointed.close()
            self.checkpointed = None


@dataclass(frozen=True, slots=True)
class _Departed:
    """A domain that went."""

    info: DomainInfo
    console: Console
    time: float  # of time.monotonic


class EmbeddedToolstack(Client):
    """A Client for the domains of `dom0`. Closing it destroys them; dom0 is closed with it."""

    def __init__(
        self,
        dom0: Dom0,
        acknowledge_seconds: float = ACKNOWLEDGE_SECONDS,
        xenstore_socket: Path | None = None,
    ) -> None:
        """`xenstore_socket` is where xenstore is to listen for tools, if it is."""
        self.dom0 = dom0
        self._acknowledge_seconds = acknowledge_seconds
        self._store = dom0.xenstore
        self._lock = threading.RLock()  # the tables below; taken before anything of dom0's, and after a record's
        self._records: dict[int, _Record] = {}
        self._power_on_time = time.time()
        self._creating: set[str] = set()
        self._departed: list[_Departed] = []
        self._closed = False
        self._hub = EventHub()
        self._templates = Templates(self)
        self._arrivals = Arrivals()
        self._listeners: list[Listener] = []
        self.on_arrival: Callable[[int], None] = lambda domid: None  # of a domain that another daemon sent
        self.standby_directory = standby_directory()
        self._xenstore_socket = xenstore_socket
        if xenstore_socket is not None:
            try:
                dom0.xenstore.listen(xenstore_socket)
            except OSError as error:
                raise ToolstackError(f"xenstore cannot listen on {xenstore_socket}: {error.strerror}") from error
        dom0.shutdown_hooks.append(self._tell_shutdown)

    @property
    def _control(self) -> Control:
        self._check_open()
        return self.dom0.control

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("This machine was closed; its domains are gone.")

    def close(self) -> None:
        """End all domains and listeners."""
        if self._closed:
            return
        self._templates.close()
        self._closed = True
        while self._listeners:
            self._listeners.pop().close()
        for record in list(self._records.values()):
            record.end_checkpoints()
            self._wake_waiters(record)
        self._hub.close()
        self.dom0.close()

    # --- looking ---------------------------------------------------------------------------------------

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
        with self._lock:
            living = {info.domid: info for info in self._control.list()}
            found = [self._dom0_info()]
            for domid, record in sorted(self._records.items()):
                if record.last_seen is not None:
                    found.append(record.last_seen)
                elif domid in living:
                    found.append(self._info(living[domid], record))
            return found

    def departed(self) -> list[DomainInfo]:
        return [each.info for each in reversed(self._recently_departed())]

    def _recently_departed(self) -> list[_Departed]:
        with self._lock:
            since = time.monotonic() - DEPARTED_SECONDS
            self._departed = [each for each in self._departed if each.time > since]
            return list(self._departed)

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

    def _info(self, info: XenDomainInfo, record: _Record) -> DomainInfo:
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
        with self._of_domain(domid):
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
        with self._lock:
            if not domid:
                return DomainConfig(DOM0_NAME, DOM0_UUID)
            self._guest(domid)
            return copy.deepcopy(self._records[domid].config)

    def set_config(self, domid: int, config: DomainConfig) -> None:
        with self._lock:
            self._guest(domid)
            self._records[domid].config = copy.deepcopy(config)

    def dmesg(self) -> str:
        return self._control.log_text()

    def clear_dmesg(self) -> None:
        self._control.clear_log()

    # --- life ------------------------------------------------------------------------------------------

    def create(self, config: DomainConfig, progress: OnProgress = no_progress) -> NewDomid:
        config = copy.deepcopy(config)
        self._claim_name(config.name)
        try:
            for nic in config.nics:
                nic.mac = nic.mac or networks.random_mac()  # the domain's as long as it is built again
            spec = self._scheduled(_spec(config, progress), config)
            progress(Progress("building the domain", 1, 2))
            domain = self.dom0.create(spec)
            with self._lock:
                self._records[domain.domid] = _Record(config, time.time())
            self._hub.publish(DomainEvent(EventKind.CREATED, domain.domid))
            progress(Progress("building the domain", 2, 2))
            return NewDomid(domain.domid)
        except DomainCreateError as error:
            raise ToolstackError(str(error)) from error
        except (OSError, MemoryError) as error:
            why = (error.strerror if isinstance(error, OSError) else None) or "the host has no memory left"
            wanted = config.memory_kib >> 10
            raise ToolstackError(f"a domain with {wanted} MiB of memory cannot be made: {why}") from error
        finally:
            with self._lock:
                self._creating.discard(config.name)

    def _described(self, config: DomainConfig) -> DomainSpec:
        return self._scheduled(_described(config), config)

    def _scheduled(self, spec: DomainSpec, config: DomainConfig) -> DomainSpec:
        """With its cpupool, affinities, and of the parameters those that the pool's algorithm has."""
        first, *_ = pools = self.cpupools()
        pool = next((each for each in pools if each.name == config.pool), first)
        given = config.scheduler.given()
        return replace(
            spec,
            scheduling={name: given[name] for name in pool.scheduler_parameters if name in given},
            cpupool=config.pool or "",
            hard_affinity=config.hard_affinity or (),
            soft_affinity=config.soft_affinity or (),
        )

    def _claim_name(self, name: str) -> None:
        """Names are unique, of domains that are being made too. The caller discards the claim."""
        with self._lock:
            taken = {DOM0_NAME, *self._creating, *(record.config.name for record in self._records.values())}
            if name in taken:
                raise InvalidRequest(f'Domain with name "{name}" already exists.')
            self._creating.add(name)

    def pause(self, domid: int) -> None:
        with self._of_domain(domid):
            self._control.pause(domid)

    def unpause(self, domid: int) -> None:
        with self._of_domain(domid) as domain:
            record = self._records[domid]
            try:
                if record.stay is not None:
                    record.stay()
                    record.stay = None
                elif record.newborn:
                    self._bring_to_life(domain, record)
                else:
                    self.dom0.start(domain)
            except DomainCreateError as error:
                raise ToolstackError(f"domain {domid} cannot go on here: {error}") from error
            except RuntimeError as error:  # Python's, for a thread that the host does not give
                raise ToolstackError(f"domain {domid} cannot be started: {error}") from error

    def destroy(self, domid: int) -> None:
        with self._lock:
            domain, record = self._guest(domid), self._records[domid]
            record.last_seen = next(info for info in self.domains() if info.domid == domid)
            record.leaving.set()  # who is busy with it gives up
        with record.lock:
            if domid not in self._records:
                return  # somebody else was quicker
            record.end_checkpoints()
            self.dom0.destroy(domain)
            with self._lock:
                del self._records[domid]
                self._departed = [
                    *self._recently_departed(),
                    _Departed(record.last_seen, domain.console, time.monotonic()),
                ]
        if record.protected is not None:
            record.protected.join()  # the other side knows that it is not wanted any more
        self._wake_waiters(record)
        self._hub.publish(DomainEvent(EventKind.DESTROYED, domid))

    def _wake_waiters(self, record: _Record) -> None:
        with self._lock:
            for waiter in record.waiters:
                waiter.set()

    def rename(self, domid: int, name: str) -> None:
        with self._of_domain(domid):
            with self._lock:
                config = self._records[domid].config
                if name != config.name:
                    self._claim_name(name)
                    self._creating.discard(name)
                    config.name = name
            for path in (f"{domain_tree.home(domid)}/name", f"/vm/{config.uuid}/name"):
                self._store.write(path, name)

    def request_shutdown(self, domid: int, request: ShutdownRequest) -> None:
        if self._guest(domid).end is None:
            self._ask_guest(domid, "shutdown", str(request))
        elif request is ShutdownRequest.REBOOT:
            raise InvalidRequest(f"Domain {domid} has shut down already and cannot be asked to reboot.")

    # --- resources ---------------------------------------------------------------------------------------

    def scheduling(self, domid: int) -> dict[str, int]:
        with self._of_domain(domid):
            return self._control.scheduling(domid)

    def set_scheduling(self, domid: int, parameters: dict[str, int]) -> None:
        with self._of_domain(domid), _refusals():
            self._control.set_scheduling(domid, parameters)
            self._records[domid].config.scheduler.update(parameters)

    def set_affinity(
        self, domid: int, vcpu: int | None, hard: frozenset[int] | None = None, soft: frozenset[int] | None = None
    ) -> None:
        with self._of_domain(domid), _refusals():
            self._control.set_affinity(domid, vcpu, hard, soft)
            config, now = self._records[domid].config, self.vcpus(domid)
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
        with self._lock, _refusals():
            self._control.rename_cpupool(name, new_name)
            for record in self._records.values():
                if record.config.pool == name:
                    record.config.pool = new_name

    def add_to_cpupool(self, name: str, cpus: frozenset[int]) -> None:
        with _refusals():
            self._control.add_to_cpupool(name, cpus)

    def remove_from_cpupool(self, name: str, cpus: frozenset[int]) -> None:
        with _refusals():
            self._control.remove_from_cpupool(name, cpus)

    def move_to_cpupool(self, domid: int, name: str) -> None:
        with self._of_domain(domid), _refusals():
            self._control.move_to_cpupool(domid, name)
            config = self._records[domid].config
            config.pool, config.hard_affinity, config.soft_affinity = name, None, None

    def set_schedparam(self, name: str, parameters: dict[str, int]) -> None:
        with _refusals():
            self._control.set_schedparam(name, parameters)

    def set_vcpus(self, domid: int, count: int) -> None:
        with self._of_domain(domid):
            config = self._records[domid].config
            most = config.vcpus_ceiling
            if not 1 <= count <= most:
                raise InvalidRequest(f"Requested {count} VCPUs, however maxcpus is {most}.")
            config.vcpus, config.max_vcpus = count, most
            for number in range(most):
                availability = "online" if number < count else "offline"
                self._store.write(f"{domain_tree.home(domid)}/cpu/{number}/availability", availability)

    def set_memory_target(self, domid: int, kib: int) -> None:
        with self._of_domain(domid), _refusals():
            config = self._records[domid].config
            most = config.memory_ceiling_kib
            if kib > most:
                raise InvalidRequest(f"{kib} KiB are more than the {most} KiB that the domain was made for (maxmem).")
            self._control.set_max_pages(domid, kib // 4)
            config.target_memory_kib, config.max_memory_kib = kib, most
            self._store.write(f"{domain_tree.home(domid)}/memory/target", str(kib))

    def set_max_memory(self, domid: int, kib: int) -> None:
        with self._of_domain(domid), _refusals():
            target = self._records[domid].config.memory_kib
            if kib < target:
                raise InvalidRequest(f"{kib} KiB are less than the domain's target of {target} KiB (see mem-set).")
            self._control.set_max_pages(domid, kib // 4)

    def sysrq(self, domid: int, key: str) -> None:
        with self._of_domain(domid):
            self._store.write(f"{domain_tree.home(domid)}/control/sysrq", key)

    def _ask_guest(self, domid: int, node: str, value: str) -> None:
        """Write a control node and wait until the guest has emptied it, or has ended."""
        path = f"{domain_tree.home(domid)}/control/{node}"
        done = threading.Event()

        def look(_: str) -> None:
            if not self._store.get(path):
                done.set()

        with self._of_domain(domid) as domain:
            record = self._records[domid]
            with self._lock:
                record.waiters.add(done)
            self._store.write(path, value)
        watch = self._store.watch(path, look)
        try:
            if domain.end is None and not done.wait(self._acknowledge_seconds) and domain.end is None:
                with self._of_domain(domid):
                    self._store.write(path, "")
                raise NotAcknowledged(f"Domain {domid} did not acknowledge control/{node} = {value}.")
        finally:
            watch.cancel()
            with self._lock:
                record.waiters.discard(done)

    def soft_reset(self, domid: int) -> None:
        self._guest(domid)
        raise NotSupported("Soft reset is not supported.")

    def trigger(self, domid: int, trigger: Trigger, vcpu: int = 0) -> None:
        with self._of_domain(domid):
            if trigger is not Trigger.NMI:
                raise InvalidRequest(f"Trigger {trigger} is for HVM domains; a PV domain can be sent nmi.")
            try:
                self._control.send_nmi(domid, vcpu)
            except ValueError as error:
                raise InvalidRequest(str(error)) from error

    def dump_core(self, domid: int, path: Path, progress: OnProgress = no_progress) -> None:
        if not path.is_absolute():
            raise InvalidRequest(f"The path of a core must be absolute: {path}.")
        with self._of_domain(domid) as domain:
            leaving = self._records[domid].leaving

            def report(done: Progress) -> None:
                if leaving.is_set():
                    raise ToolstackError(f"Domain {domid} is being destroyed.")
                progress(done)

            self._control.pause(domid)
            try:
                dump_domain(self._control, domid, domain.spec.name, path, report)
            finally:
                self._control.unpause(domid)

    # --- disks -------------------------------------------------------------------------------------------

    def disks(self, domid: int) -> list[DiskInfo]:
        if not domid:
            return []
        with self._of_domain(domid) as domain:
            return devices.disk_infos(self.dom0, domain)

    def networks(self, domid: int) -> list[NetworkInfo]:
        if not domid:
            return []
        with self._of_domain(domid) as domain:
            return networks.network_infos(self.dom0, domain)

    def attach_network(self, domid: int, nic: Nic) -> None:
        with self._of_domain(domid) as domain:
            networks.attach_network(self.dom0, domain, self._records[domid].config, copy.deepcopy(nic))

    def detach_network(self, domid: int, devid: int, force: bool = False) -> None:
        with self._of_domain(domid) as domain:
            networks.detach_network(self.dom0, domain, self._records[domid].config, devid, force)

    def set_network_rules(self, domid: int, devid: int, rules: str) -> None:
        with self._of_domain(domid) as domain:
            networks.set_network_rules(self.dom0, domain, self._records[domid].config, devid, rules)

    def capture_network(self, domid: int, devid: int) -> ConsoleStream:
        with self._of_domain(domid) as domain:
            return networks.Capturing(self.dom0, domain, devid)

    def attach_disk(self, domid: int, disk: Disk) -> None:
        with self._of_domain(domid) as domain:
            devices.attach_disk(self.dom0, domain, self._records[domid].config, copy.deepcopy(disk))

    def detach_disk(self, domid: int, vdev: str, force: bool = False) -> None:
        with self._of_domain(domid) as domain:
            devices.detach_disk(self.dom0, domain, self._records[domid].config, vdev, force)

    def change_medium(self, domid: int, vdev: str, target: str) -> None:
        with self._of_domain(domid) as domain:
            devices.change_medium(self.dom0, domain, self._records[domid].config, vdev, target)

    def measure_disk(self, domid: int, vdev: str) -> None:
        with self._of_domain(domid) as domain:
            devices.measure_disk(self.dom0, domain, vdev)

    def snapshot_disk(self, domid: int, vdev: str, path: Path) -> None:
        with self._of_domain(domid) as domain:
            devices.snapshot_disk(self.dom0, domain, vdev, path)

    # --- travelling ------------------------------------------------------------------------------------

    def save(
        self,
        domid: int,
        path: Path,
        after: AfterSave = AfterSave.DESTROY,
        compress: bool = False,
        progress: OnProgress = no_progress,
    ) -> None:
        if not path.is_absolute():
            raise InvalidRequest(f"The path of a saved domain must be absolute: {path}.")
        with self._of_domain(domid) as domain:
            save_domain(self.dom0, domain, self.config(domid), path, compress, progress)
        if after is AfterSave.DESTROY:
            self.destroy(domid)
        elif after is AfterSave.RUN:
            self._control.unpause(domid)

    def restore(self, path: Path, config: DomainConfig | None = None, progress: OnProgress = no_progress) -> NewDomid:
        if not path.is_absolute():
            raise InvalidRequest(f"The path of a saved domain must be absolute: {path}.")
        with open_saved(path) as source:
            progress(Progress("restoring the domain", 0, 1))
            arriving = Arriving(self.dom0, source, lambda name: open_saved(path.with_name(name)))
            if arriving.series is not None and arriving.series.disks:
                raise ToolstackError("This is a checkpoint with disks: `xenolith rollback` brings these back too.")
            domid = self._receive(arriving, config)
        progress(Progress("restoring the domain", 1, 1))
        return NewDomid(domid)

    def _receive(self, arriving: Arriving, config: DomainConfig | None = None) -> int:
        """Make a domain that comes in a stream, paused; its domid."""
        return self._make(config or arriving.config, arriving.receive)

    def _make(self, config: DomainConfig, receive: Callable[[], Received]) -> int:
        """Make a domain of what comes from elsewhere, paused; its domid."""
        config = copy.deepcopy(config)
        self._claim_name(config.name)
        try:
            with self._lock:
                if config.uuid in {record.config.uuid for record in self._records.values()}:
                    config.uuid = uuids.uuid4()  # the domain that was saved is still there
            _check_supported(config)
            domain = self.dom0.restore(self._described(config), receive())
            with self._lock:
                self._records[domain.domid] = _Record(config, time.time())
            self._hub.publish(DomainEvent(EventKind.CREATED, domain.domid))
            return domain.domid
        except (DomainCreateError, RecordError) as error:
            raise ToolstackError(f"The domain cannot be restored: {error}.") from error
        finally:
            with self._lock:
                self._creating.discard(config.name)

    def checkpoint(self, domid: int, directory: Path, keep: int) -> Checkpoint:
        if not directory.is_absolute() or keep < 1:
            raise InvalidRequest("Checkpoints need a directory with an absolute path, and at least one is kept.")
        with self._of_domain(domid) as domain:
            record = self._records[domid]
            if record.checkpointed is None or record.checkpointed.directory != directory:
                if record.checkpointed is not None:
                    record.checkpointed.close()
                record.checkpointed = CheckpointedDomain(self.dom0, domain, directory)
            return record.checkpointed.take(self.config(domid), keep)

    def checkpoint_every(self, domid: int, directory: Path, seconds: float, keep: int) -> None:
        def take() -> None:
            self.checkpoint(domid, directory, keep)

        def give_up(why: str) -> None:
            self.dom0.domain.log(f"d{domid}: no more checkpoints: {why}")

        with self._of_domain(domid):
            record = self._records[domid]
            record.end_checkpoints()
        if seconds > 0:
            self.checkpoint(domid, directory, keep)  # whether that is possible
            record.schedule = Schedule(seconds, take, give_up)

    def checkpoints(self, directory: Path) -> list[Checkpoint]:
        return checkpoints_in(directory)

    def rollback(self, path: Path) -> NewDomid:
        if not path.is_absolute():
            raise InvalidRequest(f"The path of a checkpoint must be absolute: {path}.")
        with open_saved(path) as source:
            arriving = Arriving(self.dom0, source, lambda name: open_saved(path.with_name(name)))
            config = arriving.config
            series = check_complete(path, config)
            with self._lock:
                found = [domid for domid, record in self._records.items() if record.config.name == config.name]
            for domid in found:
                self.destroy(domid)
            put_disks_back(path, series, config)
            return NewDomid(self._receive(arriving))

    def send(
        self, domid: int, to: str, token: str = "", limit: float = 0, progress: OnProgress = no_progress
    ) -> RelocationInfo:
        with self._of_domain(domid) as domain:
            config, record = self.config(domid), self._records[domid]
            record.end_checkpoints()

            def step_aside() -> None:
                self.rename(domid, config.name + "--migratedaway")

            def come_back() -> None:
                with contextlib.suppress(ToolstackError):
                    self.rename(domid, config.name)

            try:
                figures = send_domain(self.dom0, domain, config, to, token, step_aside, progress, limit)
            except Undetermined as error:
                assert isinstance(error.__cause__, live.Undetermined)
                disks = error.__cause__.disks

                def stay() -> None:
                    live.keep(self.dom0, domain, disks)
                    come_back()

                record.stay = stay
                raise
            except ToolstackError:
                come_back()
                raise
        self.destroy(domid)
        return RelocationInfo(
            rounds=tuple(RelocationRound(**vars(each)) for each in figures.rounds),
            last_pages=figures.last_pages,
            down_ns=figures.down_ns,
            took_ns=figures.took_ns,
        )

    def receive(self, path: Path, paused: bool = False) -> NewDomid:
        with connected(str(path), "") as connection:
            return NewDomid(self._take(connection, paused))

    def _take(self, connection: Connection, paused: bool) -> int:
        """Receive a domain; its domid."""
        domid = 0
        arrival = None
        try:
            arriving = Arriving(self.dom0, connection.source)
            arrival = self._arrivals.begin(arriving.token, connection.hang_up)
            config = copy.deepcopy(arriving.config)
            config.name += "--incoming"
            domid = self._receive(arriving, config)
            connection.answer(live.READY)
            arriving.wait_for_word()
            arrival.let_run(lambda: None if paused else self.unpause(domid))
        except (ToolstackError, OSError) as error:
            if domid:
                self.destroy(domid)
            with contextlib.suppress(OSError):
                connection.answer(f"{error}\n".encode())
            raise ToolstackError(f"The domain did not come: {error}") from error
        finally:
            if arrival is not None:
                arrival.give_up()
                arrival.over.set()
        with contextlib.suppress(OSError):  # the sender asks, if it does not hear it
            connection.answer(live.STARTED)
        with contextlib.suppress(ToolstackError):
            self.rename(domid, arriving.config.name)
        return domid

    def settle(self, token: str, at: str = "") -> bool:
        return ask_whether_arrived(at, token) if at else self._arrivals.settle(token)

    def listen(self, address: str) -> None:
        with self._lock:
            if not address:
                while self._listeners:
                    self._listeners.pop().close()
            else:
                self._listeners.append(Listener(address, self._serve_peer, self.dom0.domain.log))

    def _serve_peer(self, greeting: str, connection: Connection) -> None:
        """What another daemon asks for, on a thread of its own."""
        verb, _, token = greeting.partition(" ")
        if verb == "relocate":
            self.on_arrival(self._take(connection, False))
        elif verb == "settle":
            connection.answer(HAS_COME if self._arrivals.settle(token) else HAS_NOT_COME)
        elif verb == "protect":
            stand_by(self.dom0, connection, self.standby_directory, self._take_over, self.on_arrival)
        else:
            connection.answer(b"this daemon does not know what is wanted\n")

    def _take_over(self, config: DomainConfig, standby: Standby) -> int:
        """Go on with a domain whose daemon has died."""
        received = standby.take_over()
        domid = patiently(lambda: self._make(config, lambda: received))
        self.unpause(domid)
        self.dom0.domain.log(f"d{domid}: {config.name} goes on here from epoch {standby.epoch}")
        return domid

    def protect(self, domid: int, to: str, seconds: float) -> None:
        with self._of_domain(domid) as domain:
            record = self._records[domid]
            record.end_checkpoints()
            config = self.config(domid)
        if seconds <= 0:
            with self._lock:
                protected, record.protected = record.protected, None
            if protected is not None:
                protected.stop()
                protected.join()
            return
        if record.protected is not None and not record.protected.info().failure:
            raise InvalidRequest(f"Domain {domid} is protected by {record.protected.to} already.")
        record.protected = ProtectedDomain(self.dom0, domain, config, to, seconds, record.lock)

    def protections(self) -> list[ProtectionInfo]:
        with self._lock:
            return [record.protected.info() for record in self._records.values() if record.protected is not None]

    def clone(self, domid: int, names: list[str], progress: OnProgress = no_progress) -> list[int]:
        self._guest(domid)
        config, answers = self.config(domid), self._records[domid].agent_answers
        frozen = self.freeze(domid)
        made: list[int] = []
        try:
            for number, name in enumerate(names, 1):
                made.append(self.make_clone(config, frozen, name, number, answers))
                progress(Progress("cloning the domain", number, len(names)))
        except BaseException:
            for each in made:
                with contextlib.suppress(ToolstackError):
                    self.destroy(each)
            raise
        finally:
            frozen.close()
        return made

    def freeze(self, domid: int) -> FrozenDomain:
        """What a domain is at this moment, which goes on. Raises ToolstackError."""
        with self._of_domain(domid) as domain:
            _check_clonable(self.config(domid))
            try:
                return freeze(self.dom0, domain)
            except RecordError as error:
                raise ToolstackError(f"Domain {domid} cannot be cloned: {error}.") from error

    def make_clone(
        self, config: DomainConfig, frozen: FrozenDomain, name: str, number: int, agent_answers: bool
    ) -> int:
        """Make a clone, paused; whether its guest's agent is known to answer. Raises ToolstackError."""
        config = copy.deepcopy(config)
        config.name, config.uuid = name, uuids.uuid4()
        self._claim_name(name)
        try:
            domain = self.dom0.clone(self._described(config), frozen, number)
            with self._lock:
                record = _Record(config, time.time(), agent_answers=agent_answers, newborn=True)
                self._records[domain.domid] = record
            self._hub.publish(DomainEvent(EventKind.CREATED, domain.domid))
            return domain.domid
        except (DomainCreateError, RecordError, OSError, MemoryError) as error:
            raise ToolstackError(f"{name} cannot be made: {error}.") from error
        finally:
            with self._lock:
                self._creating.discard(name)

    def suspend(self, domid: int) -> None:
        domain = self._guest(domid)
        self._ask_guest(domid, "shutdown", "suspend")
        if domain.wait(self._acknowledge_seconds) is None:
            raise NotAcknowledged(f"Domain {domid} did not suspend itself.")

    def resume(self, domid: int) -> None:
        try:
            with self._of_domain(domid) as domain:
                self.dom0.resume(domain)
        except ValueError as error:
            raise InvalidRequest(str(error)) from error

    # --- consoles and events -------------------------------------------------------------------------------

    def open_console(self, domid: int, number: int = 0) -> ConsoleStream:
        if number:
            raise InvalidRequest(f"Domain {domid} has no console {number}.")
        return _Attachment(self._console(domid))

    def _console(self, domid: int) -> Console:
        """Its primary console, also of a domain that went a moment ago."""
        departed = {each.info.domid: each.console for each in self._recently_departed()}
        return departed[domid] if domid in departed else self._guest(domid).console

    def console_history(self, domid: int) -> bytes:
        return self._console(domid).scrollback

    def execute(self, domid: int, execution: Execution) -> ProcessStream:
        return self._agent(domid).execute(execution)

    def create_template(
        self,
        name: str,
        config: DomainConfig,
        warm_up: Execution | None = None,
        ready: int = 4,
        progress: OnProgress = no_progress,
    ) -> None:
        self._check_open()
        self._templates.create(name, config, warm_up, ready, progress)

    def templates(self) -> list[TemplateInfo]:
        return self._templates.infos()

    def remove_template(self, name: str) -> None:
        self._templates.remove(name)

    def run_template(self, name: str, execution: Execution) -> ProcessStream:
        self._check_open()
        return self._templates.run(name, execution)

    def _bring_to_life(self, domain: GuestDomain, record: _Record) -> None:
        """Let a clone run for the first time. The first that it hears is who it is, if it has an agent."""
        told = identity(record.config.name)
        console = domain.channel.open(0) if domain.channel else None
        session = Session(console) if console is not None else None
        if session is not None and console is not None and console.input_room > 2 * len(told.body):
            session.greet(told)
            self.dom0.start(domain)
        else:
            self.dom0.start(domain)
            if session is not None:
                session.greet(told)
        record.newborn, record.agent = False, session

    def _agent(self, domid: int) -> Session:
        """The conversation with a guest's agent. Raises AgentUnavailable."""
        domain = self._guest(domid)
        with self._lock:
            record = self._records.get(domid)
        if record is None:
            raise DomainNotFound(domid)
        info = self._control.info(domid)
        if info.paused or info.shutdown:
            raise AgentUnavailable(
                f"Nothing runs in domain {domid}: it {'has shut down' * info.shutdown or 'is paused'}."
            )
        with record.agent_lock:
            if record.agent is not None and not record.agent.ended:
                if not record.agent_answers:
                    record.agent.wait(AGENT_SECONDS)
                return record.agent
            deadline = time.monotonic() + AGENT_SECONDS
            console = domain.channel.open(AGENT_SECONDS) if domain.channel else None
            if console is None:
                raise AgentUnavailable(f"The guest of domain {domid} does not use the channel of an agent.")
            session = Session(console)
            try:
                session.greet()
                session.wait(max(1.0, deadline - time.monotonic()))
            except AgentUnavailable:
                session.close()
                raise
            record.agent, record.agent_answers = session, True
            return session

    def subscribe(self) -> EventStream:
        self._check_open()
        return self._hub.subscribe()

    def _tell_shutdown(self, domain: GuestDomain) -> None:
        """On dom0's event thread."""
        assert domain.end is not None
        with self._lock:
            record = self._records.get(domain.domid)
        if record is not None:
            self._wake_waiters(record)
        self._hub.publish(DomainEvent(EventKind.SHUTDOWN, domain.domid, reason=domain.end.shutdown_reason))

    def _guest(self, domid: int) -> GuestDomain:
        """A guest by domid. Raises DomainNotFound, and InvalidRequest for dom0."""
        if not domid:
            raise InvalidRequest("Domain-0 is this toolstack's own domain; that cannot be done to it.")
        self._check_open()
        domain = self.dom0.domains.get(domid)
        if domain is None or domid not in self._records:
            raise DomainNotFound(domid)
        return domain

    @contextlib.contextmanager
    def _of_domain(self, domid: int) -> Iterator[GuestDomain]:
        """Do something to a guest, alone; raises as `_guest` does, also when the domain goes at that moment."""
        self._guest(domid)
        with self._lock:
            record = self._records.get(domid)
        if record is None:
            raise DomainNotFound(domid)
        with record.lock:
            domain = self._guest(domid)
            try:
                yield domain
            except NoSuchDomain:
                raise DomainNotFound(domid) from None


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """A value that the hypervisor refuses is an InvalidRequest."""
    try:
        yield
    except ValueError as error:
        raise InvalidRequest(f"{error}.") from error


class _Attachment:
    """A terminal on a console: it may fall behind, and may type more than the guest takes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._reader = console.open_reader(Overflow.DROP_OLDEST)

    def read(self, timeout: float | None = None) -> bytes | None:
        return self._reader.read(timeout)

    def write(self, data: bytes) -> None:
        with contextlib.suppress(ConsoleClosed):
            while data and (taken := self._console.write(data, TYPING_SECONDS)):
                data = data[taken:]

    def close(self) -> None:
        self._reader.close()


def _check_supported(config: DomainConfig) -> None:
    """Raises NotSupported where a domain would be given what there is not."""
    lacking = config.unsupported()
    if config.bootloader:
        lacking.append("bootloader")
    if lacking:
        raise NotSupported(f"A domain cannot be given: {', '.join(lacking)}.")


def _check_clonable(config: DomainConfig) -> None:
    """Raises NotSupported."""
    if config.nics:
        raise NotSupported("A domain with a vif cannot be cloned: its clones would have the same address.")
    writable = [disk.vdev for disk in config.disks if disk.writable and not disk.is_cdrom]
    if writable:
        raise NotSupported(f"A domain with a disk that it can write to ({writable[0]}) cannot be cloned.")


def _spec(config: DomainConfig, progress: OnProgress) -> DomainSpec:
    """What dom0 is to make. Raises NotSupported and ToolstackError."""
    _check_supported(config)
    if config.kernel is None:
        raise InvalidRequest("The configuration names no kernel.")
    progress(Progress("loading the kernel", 0, 2))
    try:
        image = load_image(Path(config.kernel))
        ramdisk = Path(config.ramdisk).read_bytes() if config.ramdisk else b""
    except ImageError as error:
        raise ToolstackError(str(error)) from error
    except OSError as error:
        raise ToolstackError(f"cannot read {error.filename}: {error.strerror}") from error
    return replace(_described(config), image=image, ramdisk=ramdisk)


def _described(config: DomainConfig) -> DomainSpec:
    """A domain without what is loaded into a new one."""
    return DomainSpec(
        name=config.name,
        image=None,
        kernel=config.kernel or "",
        cmdline=config.cmdline or "",
        memory_kib=config.memory_kib,
        max_memory_kib=config.memory_ceiling_kib,
        vcpus=config.vcpus_online,
        max_vcpus=config.vcpus_ceiling,
        disks=tuple(devices.virtual_block_device(disk) for disk in config.disks),
        nets=tuple(networks.virtual_interface(nic) for nic in config.nics),
        shares=tuple(devices.shared_folder(share, number) for number, share in enumerate(config.p9_shares)),
        limits=_limits(config),
        time_offset=_time_offset(config),
        uuid=config.uuid,
    )


def _time_offset(config: DomainConfig) -> int:
    """Seconds; the key has 32 bits and a sign."""
    offset = (config.rtc_timeoffset + (1 << 31)) % (1 << 32) - (1 << 31)
    return offset + (time.localtime().tm_gmtoff if config.localtime else 0)


def _limits(config: DomainConfig) -> Limits:
    given: dict[str, int] = {}
    if config.max_event_channels:
        given["event_channel_port"] = config.max_event_channels
    if config.max_grant_frames is not None:
        given["grant_frames"] = config.max_grant_frames
    if config.max_maptrack_frames is not None:
        given["mappings"] = config.max_maptrack_frames * MAPPINGS_PER_MAPTRACK_FRAME
    return replace(USUAL, **given)
