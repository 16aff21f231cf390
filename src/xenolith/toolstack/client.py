"""What can be asked of a toolstack: the interface that the `xl` command, programs and the daemon share.

`Client` makes domains, takes them apart and tells what happens to them, one primitive a method, as libxl does.
`Supervision` follows domains through their lives, applying the configured actions when they shut down. Both are had in
one's own process (`supervisor.Supervisor` is a Supervision on any Client) and, over the daemon's socket, from
`remote.RemoteClient`.

Each abstract method is a verb, and this is the only place where it is defined (see `verbs`): the daemon's protocol, the
client at the other end of its socket and the table of docs/control-protocol.md are made from its signature and the
first sentence of its docstring. Its types must be some that `codec` knows.

Domains are named by domid. Every method may be called by any thread, and raises `ToolstackError` (usually one of its
subclasses) when what was asked cannot be done.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final, NewType, Protocol, TypeAlias
from uuid import UUID

from xenolith.abi.x86 import PAGE_SIZE
from xenolith.toolstack.config.disk import Disk
from xenolith.toolstack.config.domain import DomainConfig
from xenolith.toolstack.config.vif import Nic
from xenolith.toolstack.errors import Closed as Closed
from xenolith.toolstack.errors import ConnectionLost as ConnectionLost
from xenolith.toolstack.errors import DomainNotFound as DomainNotFound
from xenolith.toolstack.errors import EngineUnavailable as EngineUnavailable
from xenolith.toolstack.errors import InvalidRequest as InvalidRequest
from xenolith.toolstack.errors import NotAcknowledged as NotAcknowledged
from xenolith.toolstack.errors import NotSupported as NotSupported
from xenolith.toolstack.errors import ToolstackError as ToolstackError
from xenolith.toolstack.errors import Undetermined as Undetermined

NewDomid = NewType("NewDomid", int)
"""The domid of a domain that was just made. If whoever asked for it has gone when it is there, it is destroyed."""


class ShutdownRequest(StrEnum):
    """What is written to a guest's control/shutdown."""

    POWEROFF = "poweroff"
    REBOOT = "reboot"


class AfterSave(StrEnum):
    """What becomes of a domain that was saved."""

    DESTROY = "destroy"
    PAUSE = "pause"
    RUN = "run"


class Trigger(StrEnum):
    """What `xl trigger` can send."""

    NMI = "nmi"
    RESET = "reset"
    INIT = "init"
    POWER = "power"
    SLEEP = "sleep"
    S3RESUME = "s3resume"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostInfo:
    """The machine and its hypervisor, as `xl info` prints them."""

    host: str
    release: str
    version: str
    machine: str
    nr_cpus: int
    nr_nodes: int = 1
    cores_per_socket: int
    threads_per_core: int = 1
    cpu_khz: int
    hw_caps: tuple[int, ...] = (0,) * 8
    virt_caps: tuple[str, ...]
    total_memory_kib: int
    free_memory_kib: int
    sharing_freed_kib: int = 0
    sharing_used_kib: int = 0
    outstanding_claims_kib: int = 0
    free_cpus: int = 0
    xen_major: int
    xen_minor: int
    xen_extra: str
    xen_caps: tuple[str, ...]
    scheduler: str
    scheduler_parameters: tuple[str, ...] = ()  # what it lets be set for a domain
    page_size: int = PAGE_SIZE
    virt_start: int
    changeset: str = ""
    commandline: str = ""
    compiler: str = ""
    compile_by: str = ""
    compile_domain: str = ""
    compile_date: str = ""
    build_id: str = ""
    engine: str
    xenstore_socket: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainInfo:
    """One domain, as `xl list` shows it."""

    domid: int
    name: str
    uuid: UUID
    running: bool = False
    blocked: bool = False
    paused: bool = False
    shutdown: bool = False
    shutdown_reason: int | None = None  # while `shutdown`
    dying: bool = False
    memory_kib: int
    outstanding_kib: int = 0  # claimed and not yet allocated
    max_memory_kib: int
    vcpus_online: int
    cpu_time_ns: int = 0
    pool: str = "Pool-0"
    security_label: str | None = None
    start_time: float  # seconds since the epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class VcpuInfo:
    """One vCPU, as `xl vcpu-list` shows it."""

    vcpu: int
    online: bool
    cpu: int  # the pCPU it runs or last ran on
    running: bool = False
    blocked: bool = False
    cpu_time_ns: int = 0  # running
    runnable_ns: int = 0  # waiting for a pCPU; a guest counts this and `offline_ns` as stolen
    blocked_ns: int = 0
    offline_ns: int = 0
    hard_affinity: frozenset[int]
    soft_affinity: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class CpupoolInfo:
    """A cpupool, as `xl cpupool-list` shows it."""

    name: str
    scheduler: str
    scheduler_parameters: tuple[str, ...]  # what it lets be set for a domain
    schedparam: dict[str, int]  # its own, in microseconds
    cpus: frozenset[int]
    domains: int  # how many


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainStatistics:
    """Counters of one domain since it was made, as `xl top` follows them."""

    domid: int
    cpu_time_ns: int
    vcpu_times_ns: tuple[int, ...]
    traps: int
    hypercalls: int
    network_received_bytes: int = 0
    network_sent_bytes: int = 0
    disk_read_bytes: int = 0
    disk_written_bytes: int = 0
    disk_reads: int = 0
    disk_writes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskInfo:
    """A virtual block device of a domain's, as `xl block-list` shows it, and what it did since it was plugged in."""

    number: int  # as the guest knows it, see xen-vbd-interface(7)
    vdev: str
    backend_domid: int = 0
    state: int  # the front-end's, of xenbus
    event_channel: int  # -1: not connected, as ring_ref
    ring_ref: int
    backend_path: str
    target: str  # empty: a drive without a medium
    format: str
    writable: bool
    removable: bool
    size_bytes: int
    read_bytes: int = 0
    written_bytes: int = 0
    reads: int = 0
    writes: int = 0
    flushes: int = 0
    discards: int = 0
    errors: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleInfo:
    """A rule of the firewall-router in words, and what it decided."""

    text: str
    packets: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkInfo:
    """A virtual interface of a domain's, as `xl network-list` shows it, and what it did since it was plugged in."""

    devid: int
    mac: str
    backend_domid: int = 0
    state: int  # the front-end's, of xenbus
    event_channel: int  # -1: not connected, as the rings
    tx_ring_ref: int
    rx_ring_ref: int
    backend_path: str
    address: str  # IPv4, that DHCP tells it
    mtu: int
    bridge: str
    published: tuple[str, ...]  # [ADDRESS:]HOST:GUEST[/udp]
    rules: tuple[RuleInfo, ...]
    received_packets: int  # by the domain
    received_bytes: int
    received_dropped: int  # it did not take them
    sent_packets: int
    sent_bytes: int
    dropped: dict[str, int]  # what it sent and the router did not forward, by reason


@dataclass(slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint of a domain, as a file."""

    number: int
    path: Path
    taken: int  # seconds since the epoch
    size_bytes: int  # that its file takes
    base: str  # the name of the checkpoint that it goes on from; empty: it has all itself
    disks: tuple[str, ...]  # the files that keep what the disks held
    # Of one that was just taken:
    stood_ns: int = 0  # how long the domain stood still
    pages: int = 0  # that were written meanwhile
    remark: str = ""  # why the domain stands still for all of its memory


@dataclass(frozen=True, slots=True)
class RelocationRound:
    """Pages that were sent while the domain ran, and how many were written to meanwhile."""

    began_ns: int
    ended_ns: int
    pages: int
    written: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RelocationInfo:
    """What a relocation took."""

    rounds: tuple[RelocationRound, ...]
    last_pages: int  # sent while it stood still
    down_ns: int  # from the standstill to the answer
    took_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtectionInfo:
    """A domain that another daemon holds, and what the last epoch took."""

    domid: int
    to: str
    failure: str  # why it is not protected any more
    epochs: int
    pages: int
    blocks: int
    stood_ns: int
    took_ns: int


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a long operation has come; `total` 0 means that nobody knows how far it is."""

    stage: str
    done: int
    total: int


OnProgress: TypeAlias = Callable[[Progress], None]


def no_progress(progress: Progress) -> None:
    """For callers who do not watch."""


class EventKind(StrEnum):
    CREATED = "created"  # it exists now, paused
    SHUTDOWN = "shutdown"  # it has shut down by itself; `reason` says how
    DESTROYED = "destroyed"  # it does not exist any more
    MESSAGE = "message"  # what the supervisor did about it; `text` says what
    REBUILT = "rebuilt"  # it was built again; `successor` is the new domid
    RELEASED = "released"  # nobody supervises it any more


@dataclass(frozen=True, slots=True)
class DomainEvent:
    """Something happened to a domain."""

    kind: EventKind
    domid: int
    reason: int | None = None
    text: str = ""
    successor: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """A command to run inside a guest.

    With `terminal`, of so many rows and columns, it has one of its own, and its output and errors are one stream.
    After `timeout` seconds it is killed, with all that it started in its session.  `limits` are of setrlimit(2), by the
    names of LIMITS: bytes, seconds or numbers.
    """

    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    directory: str = "/root"
    user: str = ""  # a number or a name, and :GROUP, a number; empty: root
    terminal: tuple[int, int] | None = None
    timeout: float | None = None
    limits: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateInfo:
    """A domain that was booted and frozen, and clones of it that stand ready."""

    name: str
    memory_kib: int
    vcpus: int
    kernel: str
    made: float  # seconds since the epoch
    ready: int  # clones, of `wanted`
    wanted: int
    runs: int  # commands that were run in clones of it
    problem: str = ""  # why no more clones can be made now


LIMITS: Final = {"cpu": 0, "fsize": 1, "data": 2, "stack": 3, "core": 4, "nproc": 6, "nofile": 7, "as": 9}
"""The resource limits that a command can be given, with Linux's numbers (asm-generic/resource.h)."""


@dataclass(frozen=True, slots=True)
class ProcessOutput:
    """Some output of a command inside a guest, never empty."""

    data: bytes
    errors: bool = False  # of its standard error


class Outcome(StrEnum):
    """How a command inside a guest came to its end."""

    EXITED = "exited"  # by itself or by a signal
    NOT_STARTED = "not started"
    TIMED_OUT = "timed out"
    LOST = "lost"  # the guest has ended, or its agent does not answer as it should


@dataclass(frozen=True, slots=True)
class ProcessEnd:
    """The end of a command inside a guest. `status` is what a shell would have in $?, or one of `xenolith run`'s."""

    status: int
    outcome: Outcome = Outcome.EXITED
    message: str = ""


class ProcessStream(Protocol):
    """A command that runs inside a guest. Closing it is the user's duty; a command that still runs gets SIGHUP."""

    def read(self, timeout: float | None = None) -> ProcessOutput | ProcessEnd | None:
        """What comes next, in the end always a ProcessEnd; None when `timeout` seconds passed without anything."""

    def write(self, data: bytes) -> None:
        """Give it input; waits while it has too much that it has not read."""

    def end_input(self) -> None: ...

    def signal(self, number: int) -> None:
        """Send a signal to its process group."""

    def resize(self, rows: int, columns: int) -> None:
        """Its terminal has another size now."""

    def close(self) -> None: ...


class ConsoleStream(Protocol):
    """An attachment to a domain's console. Closing it is the user's duty."""

    def read(self, timeout: float | None = None) -> bytes | None:
        """The next output; b"" when the console has ended, None when `timeout` seconds passed without any."""

    def write(self, data: bytes) -> None:
        """Type on the console. Input that the guest does not take for long is lost, as on a serial line."""

    def close(self) -> None: ...


class EventStream(Protocol):
    """Events in order. A reader that is too slow loses the oldest, never delays a domain."""

    def get(self, timeout: float | None = None) -> DomainEvent | None:
        """The next event; None when `timeout` seconds passed, or the stream has ended or was closed."""

    def close(self) -> None: ...


class Client(ABC):
    """A machine that runs domains."""

    @abstractmethod
    def host(self) -> HostInfo:
        """The host and the hypervisor."""

    @abstractmethod
    def domains(self) -> list[DomainInfo]:
        """All domains by domid, dom0 first."""

    @abstractmethod
    def departed(self) -> list[DomainInfo]:
        """Domains that went a moment ago, the last one first; what they printed can still be read."""

    @abstractmethod
    def vcpus(self, domid: int) -> list[VcpuInfo]:
        """The vCPUs of a domain, by number."""

    @abstractmethod
    def statistics(self) -> list[DomainStatistics]:
        """The counters of all domains, by domid."""

    @abstractmethod
    def config(self, domid: int) -> DomainConfig:
        """The configuration with which the domain would be built again."""

    @abstractmethod
    def set_config(self, domid: int, config: DomainConfig) -> None:
        """Change the configuration with which the domain would be built again."""

    @abstractmethod
    def create(self, config: DomainConfig, progress: OnProgress = no_progress) -> NewDomid:
        """Make a domain and leave it paused; its domid.

        Paths in the configuration must be absolute.
        """

    @abstractmethod
    def pause(self, domid: int) -> None:
        """Stop a domain for a while."""

    @abstractmethod
    def unpause(self, domid: int) -> None:
        """Let a domain run: a new one for the first time, a paused one on."""

    @abstractmethod
    def request_shutdown(self, domid: int, request: ShutdownRequest) -> None:
        """Ask the guest to shut down; returns when it has taken note.

        Raises NotAcknowledged when it does not. A domain that has shut down already has nothing to do to power off;
        that it reboot is an InvalidRequest.
        """

    @abstractmethod
    def soft_reset(self, domid: int) -> None:
        """Start a domain over that has shut down with reason soft-reset."""

    @abstractmethod
    def destroy(self, domid: int, again: bool = False) -> None:
        """End a domain at once.

        What a clone's disks hold goes with it, if the domain is not built `again`.
        """

    @abstractmethod
    def rename(self, domid: int, name: str) -> None:
        """Give a domain another name.

        Raises InvalidRequest when another domain has it.
        """

    @abstractmethod
    def scheduling(self, domid: int) -> dict[str, int]:
        """The scheduler's parameters of a domain, by name: weight, cap and what else the algorithm in use has."""

    @abstractmethod
    def set_scheduling(self, domid: int, parameters: dict[str, int]) -> None:
        """Change some of the scheduler's parameters of a domain."""

    @abstractmethod
    def set_affinity(
        self, domid: int, vcpu: int | None, hard: frozenset[int] | None = None, soft: frozenset[int] | None = None
    ) -> None:
        """Set on which pCPUs a vCPU, or each, may run and on which it had best run; null leaves it as it is."""

    @abstractmethod
    def cpupools(self) -> list[CpupoolInfo]:
        """The cpupools, that in which domains begin first."""

    @abstractmethod
    def create_cpupool(self, name: str, scheduler: str, cpus: frozenset[int]) -> None:
        """Make a cpupool of pCPUs that are in none."""

    @abstractmethod
    def destroy_cpupool(self, name: str) -> None:
        """End a cpupool that has no domains; its pCPUs are in none then."""

    @abstractmethod
    def rename_cpupool(self, name: str, new_name: str) -> None:
        """Give a cpupool another name."""

    @abstractmethod
    def add_to_cpupool(self, name: str, cpus: frozenset[int]) -> None:
        """Give a cpupool pCPUs that are in none."""

    @abstractmethod
    def remove_from_cpupool(self, name: str, cpus: frozenset[int]) -> None:
        """Take pCPUs from a cpupool; nobody runs on them then."""

    @abstractmethod
    def move_to_cpupool(self, domid: int, name: str) -> None:
        """Move a domain to a cpupool; its vCPUs may run on any pCPU of it."""

    @abstractmethod
    def set_schedparam(self, name: str, parameters: dict[str, int]) -> None:
        """Change parameters of a cpupool's scheduler itself, in microseconds."""

    @abstractmethod
    def set_vcpus(self, domid: int, count: int) -> None:
        """Tell the guest how many of its vCPUs to have online; it takes them up and down itself."""

    @abstractmethod
    def set_memory_target(self, domid: int, kib: int) -> None:
        """Tell the guest's balloon how much memory to have, and let the domain have no more than that."""

    @abstractmethod
    def set_max_memory(self, domid: int, kib: int) -> None:
        """Set the most memory that a domain may have; what it has above that stays until it gives it back."""

    @abstractmethod
    def sysrq(self, domid: int, key: str) -> None:
        """Send a magic sysrq key."""

    @abstractmethod
    def trigger(self, domid: int, trigger: Trigger, vcpu: int = 0) -> None:
        """Send a vCPU what only hardware could."""

    @abstractmethod
    def dump_core(self, domid: int, path: Path, progress: OnProgress = no_progress) -> None:
        """Write an ELF core of the domain to a file, whose path must be absolute."""

    @abstractmethod
    def disks(self, domid: int) -> list[DiskInfo]:
        """The virtual block devices of a domain, by number."""

    @abstractmethod
    def networks(self, domid: int) -> list[NetworkInfo]:
        """The virtual network interfaces of a domain, by number."""

    @abstractmethod
    def attach_network(self, domid: int, nic: Nic) -> None:
        """Give a domain another network interface.

        Its number must be free; None for the MAC means a random one.
        """

    @abstractmethod
    def detach_network(self, domid: int, devid: int, force: bool = False) -> None:
        """Take a network interface from a domain; by force also where the guest does not let go of it."""

    @abstractmethod
    def set_network_rules(self, domid: int, devid: int, rules: str) -> None:
        """Give an interface other rules, from its next packet on."""

    @abstractmethod
    def capture_network(self, domid: int, devid: int) -> ConsoleStream:
        """Copies of all frames of an interface from now on, in pcap's format."""

    @abstractmethod
    def attach_disk(self, domid: int, disk: Disk) -> None:
        """Give a domain another disk.

        Its path must be absolute.
        """

    @abstractmethod
    def detach_disk(self, domid: int, vdev: str, force: bool = False) -> None:
        """Take a disk from a domain, by its name or number; by force also where the guest does not let go of it."""

    @abstractmethod
    def change_medium(self, domid: int, vdev: str, target: str) -> None:
        """Put a medium into a drive, an image by its absolute path; an empty one takes out what is there."""

    @abstractmethod
    def measure_disk(self, domid: int, vdev: str) -> None:
        """Look again how large a disk's storage is, and tell the guest."""

    @abstractmethod
    def snapshot_disk(self, domid: int, vdev: str, path: Path) -> None:
        """Keep what a disk of the format overlay holds now in a file, which can be the backing of other overlays."""

    @abstractmethod
    def save(
        self,
        domid: int,
        path: Path,
        after: AfterSave = AfterSave.DESTROY,
        compress: bool = False,
        progress: OnProgress = no_progress,
    ) -> None:
        """Write a domain to a file, whose path must be absolute, and end it, or leave it paused or running.

        The file is complete, or what it was before.
        """

    @abstractmethod
    def restore(self, path: Path, config: DomainConfig | None = None, progress: OnProgress = no_progress) -> NewDomid:
        """Make a domain of a file that it was saved to and leave it paused; its domid.

        With another configuration than the saved one its name, disks and what becomes of it in the end are those.
        """

    @abstractmethod
    def checkpoint(self, domid: int, directory: Path, keep: int) -> Checkpoint:
        """Take a checkpoint of a running domain into a directory, whose path must be absolute.

        It has what has changed since the last one, and its disks. At least `keep` of them are kept.
        """

    @abstractmethod
    def checkpoint_every(self, domid: int, directory: Path, seconds: float, keep: int) -> None:
        """Take a checkpoint every so many seconds from now on; 0: no more."""

    @abstractmethod
    def checkpoints(self, directory: Path) -> list[Checkpoint]:
        """The checkpoints in a directory, the oldest first."""

    @abstractmethod
    def rollback(self, path: Path) -> NewDomid:
        """Make a domain of a checkpoint, with its disks as they were, and leave it paused; its domid.

        The domain that has its name by now is destroyed, and later checkpoints are given up.
        """

    @abstractmethod
    def send(
        self, domid: int, to: str, token: str = "", limit: float = 0, progress: OnProgress = no_progress
    ) -> RelocationInfo:
        """Relocate a running domain to another daemon's address, or by way of whoever listens at a UNIX socket.

        The address is unix:/PATH or tls:HOST:PORT; the socket an absolute path.  While it runs no more than `limit`
        bytes a second are sent; 0: as many as go.

        It has left when this returns.  While it is under way it has the name NAME--migratedaway here.  Raises
        Undetermined where nobody knows whether it runs there: ask by `settle` with the same token, then destroy
        or unpause it.
        """

    @abstractmethod
    def receive(self, path: Path, paused: bool = False) -> NewDomid:
        """Take a domain from whoever listens at the UNIX socket of this absolute path; its domid.

        It runs when this returns, or is paused.
        """

    @abstractmethod
    def settle(self, token: str, at: str = "") -> bool:
        """Whether the domain that was sent here with this token has arrived; if not, it will not any more.

        With `at` the daemon at that address is asked.
        """

    @abstractmethod
    def listen(self, address: str) -> None:
        """Let other daemons come to this address, unix:/PATH or tls:HOST:PORT; an empty one: to none any more."""

    @abstractmethod
    def join_network(self, to: str) -> None:
        """Let domains here and those of the daemon that listens at an address reach each other; an empty one: no more.

        A connection between two of them stays open while one is relocated from one daemon to the other.
        """

    @abstractmethod
    def joined_networks(self) -> list[str]:
        """The addresses of the daemons whose networks were joined here."""

    @abstractmethod
    def protect(self, domid: int, to: str, seconds: float) -> None:
        """Have the daemon at an address hold the domain as it is every so many seconds, and go on with it if this dies.

        0: no more.
        """

    @abstractmethod
    def protections(self) -> list[ProtectionInfo]:
        """The domains that other daemons hold."""

    @abstractmethod
    def clone(self, domid: int, names: list[str], progress: OnProgress = no_progress) -> list[int]:
        """Make copies of a running domain, which goes on, and leave them paused; their domids.

        They share its memory until they write, and have their own xenstore. Their disks are the same, so those
        must be read-only.
        """

    @abstractmethod
    def suspend(self, domid: int) -> None:
        """Have the guest suspend itself; it has shut down with reason suspend when this returns."""

    @abstractmethod
    def resume(self, domid: int) -> None:
        """Let a guest go on that has suspended itself."""

    @abstractmethod
    def open_console(self, domid: int, number: int = 0) -> ConsoleStream:
        """Attach to a console; 0 is the primary one.

        What was printed recently comes first.
        """

    @abstractmethod
    def console_history(self, domid: int) -> bytes:
        """What was printed recently on the primary console."""

    @abstractmethod
    def execute(self, domid: int, execution: Execution) -> ProcessStream:
        """Run a command inside a guest that has our agent; waits for it while the guest boots."""

    @abstractmethod
    def create_template(
        self,
        name: str,
        config: DomainConfig,
        warm_up: Execution | None = None,
        ready: int = 4,
        progress: OnProgress = no_progress,
    ) -> None:
        """Boot a domain, run a command in its guest, and freeze it; keep so many clones of it ready."""

    @abstractmethod
    def templates(self) -> list[TemplateInfo]:
        """The templates of this machine."""

    @abstractmethod
    def remove_template(self, name: str) -> None:
        """Forget a template and the clones that stand ready; those that run go on."""

    @abstractmethod
    def run_template(self, name: str, execution: Execution) -> ProcessStream:
        """Run a command in a clone of a template, which is destroyed when the command has ended."""

    @abstractmethod
    def dmesg(self) -> str:
        """The hypervisor's log."""

    @abstractmethod
    def clear_dmesg(self) -> None:
        """Empty the hypervisor's log."""

    @abstractmethod
    def subscribe(self) -> EventStream:
        """Follow what happens to all domains from now on: events CREATED, SHUTDOWN and DESTROYED."""


def every(stream: EventStream) -> Iterator[DomainEvent]:
    """The events of a stream up to its end."""
    while (event := stream.get()) is not None:
        yield event


class Supervision(ABC):
    """Somebody who follows domains through their lives."""

    @abstractmethod
    def supervise(self, domid: int) -> None:
        """Apply the configured actions when the domain ends, and to what is built in its place."""

    @abstractmethod
    def abandon(self, name: str) -> bool:
        """Do not build again what has ended and waits for its next life; whether there was such a domain."""

    @abstractmethod
    def watch(self, domid: int) -> EventStream:
        """Follow what happens from now on to a supervised domain and its successors.

        The stream ends after RELEASED or DESTROYED.
        """


DOM0_UUID = UUID(int=0)


def find_by_name(client: Client, name: str) -> int | None:
    """The domid of the domain with this name."""
    return next((domain.domid for domain in client.domains() if domain.name == name), None)


def scheduler_parameters(client: Client, config: DomainConfig) -> tuple[str, ...]:
    """What the scheduler of the cpupool that a domain is to be in lets be set for it."""
    first, *_ = pools = client.cpupools()
    return next((pool for pool in pools if pool.name == config.pool), first).scheduler_parameters


def find_domain(client: Client, domid: int) -> DomainInfo:
    """The domain with this domid. Raises DomainNotFound."""
    for domain in client.domains():
        if domain.domid == domid:
            return domain
    raise DomainNotFound(domid)
