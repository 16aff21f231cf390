"""A machine in memory: a Client whose guests do what a test tells them."""

from __future__ import annotations

import copy
import threading
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID

from xenolith.toolstack.client import (
    Client,
    ConsoleStream,
    CpupoolInfo,
    DomainEvent,
    DomainInfo,
    DomainNotFound,
    DomainStatistics,
    EventKind,
    EventStream,
    Execution,
    HostInfo,
    InvalidRequest,
    NotAcknowledged,
    OnProgress,
    ProcessEnd,
    ProcessOutput,
    ProcessStream,
    Progress,
    ShutdownRequest,
    ToolstackError,
    Trigger,
    VcpuInfo,
    no_progress,
)
from xenolith.toolstack.config.domain import DomainConfig
from xenolith.toolstack.events import EventHub
from xenolith.toolstack.verbs import Verb, forwarding

HOST = HostInfo(
    host="lab",
    release="6.1.0",
    version="#1 SMP",
    machine="x86_64",
    nr_cpus=4,
    cores_per_socket=4,
    cpu_khz=2445431,
    hw_caps=(0x1FCBF3FD, 0xF6D8320B, 0xEC500800, 0x77, 5, 0x1884329, 0x20C, 0),
    virt_caps=("pv", "gnttab-v1"),
    total_memory_kib=767 * 1024,
    free_memory_kib=212 * 1024,
    xen_major=4,
    xen_minor=17,
    xen_extra=".0-xenolith",
    xen_caps=("xen-3.0-x86_64",),
    scheduler="credit",
    virt_start=0xFFFF800000000000,
    engine="fake",
    xenstore_socket="/run/fake/xenstore",
)

DOM0 = DomainInfo(
    domid=0,
    name="Domain-0",
    uuid=UUID(int=0),
    running=True,
    memory_kib=384 * 1024,
    max_memory_kib=384 * 1024,
    vcpus_online=2,
    cpu_time_ns=65_100_000_000,
    start_time=1_000_000.0,
)

UNREADABLE = "/nope"  # a kernel or core of this path cannot be opened


@dataclass
class FakeConsole:
    """One attachment: the test puts output in and sees what was typed."""

    output: deque[bytes] = field(default_factory=deque)
    typed: bytearray = field(default_factory=bytearray)
    changed: threading.Condition = field(default_factory=threading.Condition)
    closed: bool = False

    def print(self, data: bytes) -> None:
        with self.changed:
            self.output.append(data)
            self.changed.notify_all()

    def read(self, timeout: float | None = None) -> bytes | None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.output or self.closed, timeout):
                return None
            return self.output.popleft() if self.output else b""

    def write(self, data: bytes) -> None:
        with self.changed:
            self.typed += data
            self.changed.notify_all()

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()


@dataclass
class FakeProcess:
    """A command that prints its words as errors, then its input in capitals, and ends with the number of signals."""

    execution: Execution
    items: deque[ProcessOutput | ProcessEnd] = field(default_factory=deque)
    changed: threading.Condition = field(default_factory=threading.Condition)
    signals: list[int] = field(default_factory=list)
    size: tuple[int, int] | None = None
    closed: bool = False

    def __post_init__(self) -> None:
        self.items.append(ProcessOutput(" ".join(self.execution.command).encode(), errors=True))

    def _put(self, item: ProcessOutput | ProcessEnd) -> None:
        with self.changed:
            self.items.append(item)
            self.changed.notify_all()

    def read(self, timeout: float | None = None) -> ProcessOutput | ProcessEnd | None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.items or self.closed, timeout):
                return None
            return self.items.popleft() if self.items else ProcessEnd(125)

    def write(self, data: bytes) -> None:
        self._put(ProcessOutput(data.upper()))

    def end_input(self) -> None:
        self._put(ProcessEnd(len(self.signals), message=f"{self.size}"))

    def signal(self, number: int) -> None:
        self.signals.append(number)

    def resize(self, rows: int, columns: int) -> None:
        self.size = rows, columns

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()


@dataclass
class FakeDomain:
    info: DomainInfo
    config: DomainConfig
    acknowledges: bool = True
    console: FakeConsole = field(default_factory=FakeConsole)


@forwarding
class FakeClient(Client):
    """Keeps domains in a dictionary; calls that change something, and verbs not simulated, are noted in `calls`."""

    def __init__(self) -> None:
        self.guests: dict[int, FakeDomain] = {}
        self.calls: list[tuple[object, ...]] = []
        self.log = "(XEN) first line\n(XEN) second line\n"
        self.now = 1_000_100.0
        self.gone: list[DomainInfo] = []
        self._next = 1
        self._lock = threading.RLock()
        self._hub = EventHub()

    # What a test tells the guests.

    def end(self, domid: int, reason: int) -> None:
        """The guest shuts itself down."""
        with self._lock:
            guest = self._guest(domid)
            guest.info = replace(guest.info, shutdown=True, shutdown_reason=reason, running=False, blocked=False)
        self._hub.publish(DomainEvent(EventKind.SHUTDOWN, domid, reason=reason))

    def _guest(self, domid: int) -> FakeDomain:
        if domid not in self.guests:
            raise DomainNotFound(domid)
        return self.guests[domid]

    def _note(self, *call: object) -> None:
        self.calls.append(call)

    def ask(self, verb: Verb, arguments: dict[str, Any], progress: OnProgress | None) -> Any:
        """Any verb that is not defined below."""
        self._note(verb.name, *arguments.values())

    # Client.

    def host(self) -> HostInfo:
        return HOST

    def domains(self) -> list[DomainInfo]:
        with self._lock:
            return [DOM0, *(guest.info for guest in self.guests.values())]

    def departed(self) -> list[DomainInfo]:
        return self.gone

    def cpupools(self) -> list[CpupoolInfo]:
        return [
            CpupoolInfo(
                name="Pool-0",
                scheduler=HOST.scheduler,
                scheduler_parameters=HOST.scheduler_parameters,
                schedparam={},
                cpus=frozenset(range(HOST.nr_cpus)),
                domains=1 + len(self.guests),
            )
        ]

    def vcpus(self, domid: int) -> list[VcpuInfo]:
        everywhere = frozenset(range(HOST.nr_cpus))
        if domid == 0:
            vcpu = VcpuInfo(
                vcpu=0,
                online=True,
                cpu=1,
                running=True,
                cpu_time_ns=38_100_000_000,
                hard_affinity=everywhere,
                soft_affinity=everywhere,
            )
            return [vcpu]
        guest = self._guest(domid)
        hard = guest.config.hard_affinity or []
        return [
            VcpuInfo(
                vcpu=number,
                online=number < guest.config.vcpus_online,
                cpu=0,
                hard_affinity=hard[number] if number < len(hard) else everywhere,
                soft_affinity=everywhere,
            )
            for number in range(guest.config.vcpus_ceiling)
        ]

    def statistics(self) -> list[DomainStatistics]:
        with self._lock:
            return [
                DomainStatistics(
                    domid=info.domid,
                    cpu_time_ns=info.cpu_time_ns,
                    vcpu_times_ns=(info.cpu_time_ns,) * info.vcpus_online,
                    traps=1000 * info.domid,
                    hypercalls=10 * info.domid,
                )
                for info in self.domains()
            ]

    def config(self, domid: int) -> DomainConfig:
        if domid == 0:
            return DomainConfig("Domain-0", UUID(int=0), max_memory_kib=DOM0.memory_kib)
        return copy.deepcopy(self._guest(domid).config)

    def set_config(self, domid: int, config: DomainConfig) -> None:
        self._note("set_config", domid, config.name)
        self._guest(domid).config = config

    def create(self, config: DomainConfig, progress: OnProgress = no_progress) -> int:
        with self._lock:
            if any(domain.name == config.name for domain in self.domains()):
                raise InvalidRequest(f'Domain with name "{config.name}" already exists.')
            if config.kernel == UNREADABLE:
                raise ToolstackError(f"failed to open file '{UNREADABLE}': No such file or directory")
            for done in range(3):
                progress(Progress("loading the kernel", done, 2))
            domid = self._next
            self._next += 1
            info = DomainInfo(
                domid=domid,
                name=config.name,
                uuid=config.uuid,
                paused=True,
                memory_kib=config.memory_kib,
                max_memory_kib=config.memory_ceiling_kib,
                vcpus_online=config.vcpus_online,
                start_time=self.now,
            )
            self.guests[domid] = FakeDomain(info, copy.deepcopy(config))
            self._note("create", config.name)
        self._hub.publish(DomainEvent(EventKind.CREATED, domid))
        return domid

    def _change(self, domid: int, **fields: object) -> None:
        with self._lock:
            guest = self._guest(domid)
            guest.info = replace(guest.info, **fields)  # type: ignore[arg-type]

    def pause(self, domid: int) -> None:
        self._change(domid, paused=True, running=False, blocked=False)
        self._note("pause", domid)

    def unpause(self, domid: int) -> None:
        self._change(domid, paused=False, blocked=True)
        self._note("unpause", domid)

    def request_shutdown(self, domid: int, request: ShutdownRequest) -> None:
        guest = self._guest(domid)
        self._note("request_shutdown", domid, str(request))
        if guest.info.shutdown:
            if request is ShutdownRequest.REBOOT:
                raise InvalidRequest(f"Domain {domid} has shut down already and cannot be asked to reboot.")
            return
        if not guest.acknowledges:
            raise NotAcknowledged("the guest did not acknowledge the control request")
        self.end(domid, 0 if request is ShutdownRequest.POWEROFF else 1)

    def soft_reset(self, domid: int) -> None:
        self._change(domid, shutdown=False, shutdown_reason=None)
        self._note("soft_reset", domid)

    def destroy(self, domid: int, again: bool = False) -> None:
        with self._lock:
            self._guest(domid).console.close()
            del self.guests[domid]
            self._note("destroy", domid)
        self._hub.publish(DomainEvent(EventKind.DESTROYED, domid))

    def rename(self, domid: int, name: str) -> None:
        with self._lock:
            guest = self._guest(domid)
            if any(domain.name == name and domain.domid != domid for domain in self.domains()):
                raise InvalidRequest(f'Domain with name "{name}" already exists.')
            guest.info = replace(guest.info, name=name)
            guest.config.name = name
            self._note("rename", domid, name)

    def sysrq(self, domid: int, key: str) -> None:
        self._guest(domid)
        self._note("sysrq", domid, key)

    def trigger(self, domid: int, trigger: Trigger, vcpu: int = 0) -> None:
        guest = self._guest(domid)
        if trigger is not Trigger.NMI:
            raise InvalidRequest(f"trigger {trigger} is for HVM domains")
        if vcpu >= guest.config.vcpus_ceiling:
            raise InvalidRequest(f"Domain {domid} has no vCPU {vcpu}.")
        self._note("trigger", domid, str(trigger), vcpu)

    def dump_core(self, domid: int, path: Path, progress: OnProgress = no_progress) -> None:
        self._guest(domid)
        if str(path).startswith(UNREADABLE):
            raise ToolstackError(f"Could not open corefile {path}: No such file or directory")
        progress(Progress("writing memory", 1, 1))
        self._note("dump_core", domid, str(path))

    def open_console(self, domid: int, number: int = 0) -> ConsoleStream:
        if number:
            raise InvalidRequest(f"Domain {domid} has no console {number}.")
        return self._guest(domid).console

    def console_history(self, domid: int) -> bytes:
        return b"printed by domain %d\r\n" % self._guest(domid).info.domid

    def execute(self, domid: int, execution: Execution) -> ProcessStream:
        self._guest(domid)
        self._note("execute", domid, *execution.command)
        return FakeProcess(execution)

    def dmesg(self) -> str:
        return self.log

    def clear_dmesg(self) -> None:
        self.log = ""

    def subscribe(self) -> EventStream:
        return self._hub.subscribe()

    def close(self) -> None:
        self._hub.close()
