"""The Python API: domains as objects, in one's own process or in the daemon, by the same interface.

`power_on` switches a machine on in this process; it and its domains are gone when it is closed. `connect` uses the
daemon's, which stays. Either gives a `Machine`, on which everything else is the same: a `Domain` is a name for a domid
and keeps no state of its own. What is not here is one attribute away, in `Machine.client` (see `client.Client`).

The words for states are those of `Domain.state`; waiting for one uses the client's events and does not poll.
"""

from __future__ import annotations

import copy
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Concatenate, ParamSpec, Self, TypeVar

from xenolith.toolstack import host
from xenolith.toolstack.agent.files import Files
from xenolith.toolstack.agent.running import Finished, execution, finish
from xenolith.toolstack.client import (
    Client,
    ConsoleStream,
    DiskInfo,
    DomainEvent,
    DomainInfo,
    DomainNotFound,
    DomainStatistics,
    EngineUnavailable,
    EventKind,
    EventStream,
    Execution,
    HostInfo,
    InvalidRequest,
    NetworkInfo,
    OnProgress,
    Outcome,
    ProcessStream,
    RuleInfo,
    ShutdownRequest,
    Supervision,
    TemplateInfo,
    ToolstackError,
    find_by_name,
    find_domain,
    no_progress,
    scheduler_parameters,
)
from xenolith.toolstack.config.cpus import HostTopology
from xenolith.toolstack.config.disk import Disk, DiskSpecError, parse_disk
from xenolith.toolstack.config.domain import DomainConfig, absolute_paths
from xenolith.toolstack.config.grammar import ConfigError, ConfigFile
from xenolith.toolstack.config.reader import parse_domain_config
from xenolith.toolstack.config.vif import Nic, parse_vif
from xenolith.toolstack.host import DEFAULT_SCHEDULER, SCHEDULERS
from xenolith.toolstack.xenstore_client import XenstoreClient


class State(StrEnum):
    """What a domain is about."""

    PAUSED = "paused"
    RUNNING = "running"  # or blocked, waiting for an event
    SHUTDOWN = "shutdown"
    GONE = "gone"


class Timeout(ToolstackError):
    """The domain has not come into the state in time."""


def load_config(path: str | Path) -> DomainConfig:
    """Read an xl.cfg; relative paths in it are meant from the working directory. Raises ToolstackError."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise ToolstackError(f"cannot read {path}: {error.strerror}") from error
    config, _ = parse_domain_config(text, str(path), HostTopology.of_this_machine())
    return config


log = logging.getLogger(__name__)


def debian(
    name: str = "debian",
    kernel: str | None = None,
    *,
    memory_mib: int = 256,
    vcpus: int = 1,
    arguments: str = "",
    devices: bool = False,
) -> DomainConfig:
    """A domain of Debian's stock kernel with a shell on its console, obtained when it is first wanted.

    `kernel` is a version, a suite or a package, as `xenolith guest debian` takes them; `arguments` are added to its
    command line; with `devices` its initramfs has the drivers of disks and networks. Raises ToolstackError.
    """
    from xenolith.toolstack import guests

    guest = guests.debian(kernel or guests.DEFAULT_KERNEL, devices=devices)
    return DomainConfig(
        name,
        kernel=str(guest.elf),
        ramdisk=str(guest.initramfs),
        cmdline=f"{guest.arguments} {arguments}".strip(),
        memory_mib=memory_mib,
        vcpus=vcpus,
    )


P = ParamSpec("P")
R = TypeVar("R")


def _verb(method: Callable[Concatenate[Client, int, P], R]) -> Callable[Concatenate[Domain, P], R]:
    """A verb of the client whose first argument is a domid, as a method of Domain."""

    def call(domain: Domain, /, *values: P.args, **named: P.kwargs) -> R:
        result: R = getattr(domain.client, method.__name__)(domain.domid, *values, **named)
        return result

    call.__name__, call.__doc__ = method.__name__, method.__doc__
    return call


class _Commands(ABC):
    """Where commands can be run."""

    @abstractmethod
    def _execute(self, wanted: Execution) -> ProcessStream: ...

    def start(
        self,
        command: str | Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        workdir: str = "/root",
        user: str = "",
        timeout: float | None = None,
        limits: Mapping[str, int] | None = None,
        terminal: tuple[int, int] | None = None,
    ) -> ProcessStream:
        """Start a command in the guest: words, or a line for its shell; it waits while the guest boots.

        `limits` are of setrlimit(2): `{"as": 64 << 20, "nproc": 50}`. After `timeout` seconds it is killed.
        """
        return self._execute(execution(command, env, workdir, user, timeout, limits, terminal))

    def run(
        self,
        command: str | Sequence[str],
        *,
        input: bytes = b"",
        env: Mapping[str, str] | None = None,
        workdir: str = "/root",
        user: str = "",
        timeout: float | None = None,
        limits: Mapping[str, int] | None = None,
    ) -> Finished:
        """Run a command in the guest, as `start` does, to its end: what it printed, and its exit status.

        Raises Timeout, and ToolstackError where the guest or its agent ends before the command.
        """
        process = self.start(command, env=env, workdir=workdir, user=user, timeout=timeout, limits=limits)
        return finished(process, input, timeout)


class Domain(_Commands):
    """One domain of a machine."""

    def __init__(self, machine: Machine, domid: int) -> None:
        self._machine = machine
        self.client = machine.client
        self.domid = domid

    @property
    def info(self) -> DomainInfo:
        """A snapshot. Raises DomainNotFound when the domain is gone."""
        return find_domain(self.client, self.domid)

    @property
    def state(self) -> State:
        try:
            info = self.info
        except DomainNotFound:
            return State.GONE
        if info.shutdown:
            return State.SHUTDOWN
        return State.PAUSED if info.paused else State.RUNNING

    @property
    def statistics(self) -> DomainStatistics:
        """Its counters. Raises DomainNotFound."""
        for statistics in self.client.statistics():
            if statistics.domid == self.domid:
                return statistics
        raise DomainNotFound(self.domid)

    def wait(self, state: State = State.SHUTDOWN, timeout: float | None = None) -> State:
        """Wait until it has shut down or is gone; the state it is in. Raises Timeout.

        A domain that nobody can bring into SHUTDOWN any more, since it is gone, ends the wait too.
        """
        if state not in (State.SHUTDOWN, State.GONE):
            raise ToolstackError(f"a domain comes into the state {state} by pause and unpause only; wait for an end")
        deadline = None if timeout is None else time.monotonic() + timeout
        events = self.client.subscribe()
        try:
            while (now := self.state) not in (state, State.GONE):
                left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
                if events.get(left) is None and (deadline is None or time.monotonic() >= deadline):
                    raise Timeout(f"Domain {self.domid} is {now} and not {state} after {timeout} seconds.")
            return now
        finally:
            events.close()

    pause = _verb(Client.pause)
    unpause = _verb(Client.unpause)
    destroy = _verb(Client.destroy)
    rename = _verb(Client.rename)
    scheduling = _verb(Client.scheduling)
    set_scheduling = _verb(Client.set_scheduling)
    set_affinity = _verb(Client.set_affinity)
    move_to_cpupool = _verb(Client.move_to_cpupool)
    set_vcpus = _verb(Client.set_vcpus)
    set_memory_target = _verb(Client.set_memory_target)
    set_max_memory = _verb(Client.set_max_memory)
    sysrq = _verb(Client.sysrq)
    trigger = _verb(Client.trigger)

    detach_disk = _verb(Client.detach_disk)
    measure_disk = _verb(Client.measure_disk)

    detach_network = _verb(Client.detach_network)
    set_network_rules = _verb(Client.set_network_rules)

    @property
    def nets(self) -> list[NetworkInfo]:
        """Its virtual network interfaces, with their rules and what each did. Raises DomainNotFound."""
        return self.client.networks(self.domid)

    def attach_network(self, nic: Nic | str = "") -> None:
        """Give it another network interface, also by what xl.cfg would say of it: "mac=00:16:3e:1:2:3,rate=1Mb/s"."""
        if isinstance(nic, str):
            file = ConfigFile("attach_network")
            try:
                nic = parse_vif(file, nic, 1 + max((each.devid for each in self.nets), default=-1))
            except ConfigError:
                raise InvalidRequest("\n".join(file.diagnostics)) from None
        self.client.attach_network(self.domid, nic)

    @property
    def disks(self) -> list[DiskInfo]:
        """Its virtual block devices, by number, and what each did. Raises DomainNotFound."""
        return self.client.disks(self.domid)

    def attach_disk(self, disk: Disk | str) -> None:
        """Give it another disk, also by what xl.cfg would say of it: "data.img,raw,xvdb,rw"."""
        if isinstance(disk, str):
            file = ConfigFile("attach_disk")
            try:
                disk = parse_disk(file, disk)
            except DiskSpecError:
                raise InvalidRequest("; ".join(file.diagnostics)) from None
        if disk.script is None and disk.target:
            disk = replace(disk, target=str(Path(disk.target).absolute()))
        self.client.attach_disk(self.domid, disk)

    def change_medium(self, vdev: str, target: str | Path | None) -> None:
        """Put a medium into a drive; None takes out what is there."""
        self.client.change_medium(self.domid, vdev, "" if target is None else str(Path(target).absolute()))

    def snapshot_disk(self, vdev: str, path: str | Path) -> None:
        """Keep what a disk of the format overlay holds now in a file, the backing of what it goes on with."""
        self.client.snapshot_disk(self.domid, vdev, Path(path).absolute())

    def shutdown(self) -> None:
        """Ask the guest to power off; returns when it has taken note."""
        self.client.request_shutdown(self.domid, ShutdownRequest.POWEROFF)

    def reboot(self) -> None:
        """Ask the guest to reboot. Who `supervise`s it builds it again."""
        self.client.request_shutdown(self.domid, ShutdownRequest.REBOOT)

    def supervise(self) -> None:
        """Have its configured actions (on_poweroff, on_crash, ...) applied when it ends."""
        self._machine.supervision.supervise(self.domid)

    def console(self) -> Console:
        """Attach to its console; what was printed recently comes first."""
        return Console(self.client.open_console(self.domid))

    def _execute(self, wanted: Execution) -> ProcessStream:
        return self.client.execute(self.domid, wanted)

    @property
    def files(self) -> Files:
        """The guest's files: `read`, `write`, `put` and `get`."""
        return Files(self._execute)

    def events(self) -> Events:
        """What happens to it from now on, up to its end."""
        return Events(self.client.subscribe(), self.domid)

    def dump_core(self, path: str | Path, progress: OnProgress = no_progress) -> None:
        """Write an ELF core."""
        self.client.dump_core(self.domid, Path(path).absolute(), progress)

    def __repr__(self) -> str:
        return f"<domain {self.domid}>"


def finished(process: ProcessStream, input: bytes, timeout: float | None) -> Finished:
    """What a command came to. Raises Timeout and ToolstackError."""
    done, outcome = finish(process, input)
    if outcome is Outcome.TIMED_OUT:
        raise Timeout(f"The command has not ended after {timeout} seconds; it was killed.")
    if outcome is Outcome.LOST:
        raise ToolstackError(f"Nobody knows how the command ended: {done.message}.")
    return done


class Console:
    """An attachment to a domain's console. As a context manager it is closed in the end; iterating gives the output."""

    def __init__(self, stream: ConsoleStream) -> None:
        self._stream = stream
        self._unread = b""  # came after what `expect` was waiting for

    def read(self, timeout: float | None = None) -> bytes | None:
        """The next output; b"" when the console has ended, None when `timeout` seconds passed without any."""
        if self._unread:
            data, self._unread = self._unread, b""
            return data
        return self._stream.read(timeout)

    def expect(self, wanted: str | bytes, timeout: float | None = None) -> bytes:
        """Read on until `wanted` comes; all up to its end. Raises Timeout, and ToolstackError if the console ends.

        What came in vain can be read again.
        """
        words = wanted.encode() if isinstance(wanted, str) else wanted
        deadline = None if timeout is None else time.monotonic() + timeout
        seen = b""
        while words not in seen:
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            data = self.read(left)
            if not data:
                self._unread = seen
                if data is None:
                    raise Timeout(f"{words!r} did not come in {timeout} seconds, but {_tail(seen)}.")
                raise ToolstackError(f"The console ended before {words!r} came; it said {_tail(seen)}.")
            seen += data
        end = seen.index(words) + len(words)
        self._unread = seen[end:] + self._unread
        return seen[:end]

    def write(self, data: str | bytes) -> None:
        """Type on the console."""
        self._stream.write(data.encode() if isinstance(data, str) else data)

    def close(self) -> None:
        self._stream.close()

    def __iter__(self) -> Iterator[bytes]:
        while data := self.read():
            yield data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _tail(output: bytes) -> str:
    return repr(output[-200:]) if output else "nothing"


class Events:
    """What happens to domains, or to one up to its end: CREATED, SHUTDOWN, DESTROYED. To iterate over."""

    def __init__(self, stream: EventStream, domid: int | None = None) -> None:
        self._stream = stream
        self._domid = domid

    def get(self, timeout: float | None = None) -> DomainEvent | None:
        """The next event; None when `timeout` seconds passed or there will be none."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            event = self._stream.get(None if deadline is None else max(deadline - time.monotonic(), 0.0))
            if event is None or self._domid in (None, event.domid):
                break
        if event is not None and event.domid == self._domid and event.kind is EventKind.DESTROYED:
            self.close()
        return event

    def close(self) -> None:
        self._stream.close()

    def __iter__(self) -> Iterator[DomainEvent]:
        while (event := self.get()) is not None:
            yield event

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MachineNetwork:
    """The network of a machine, to which all interfaces of its domains are attached."""

    def __init__(self, client: Client) -> None:
        self.client = client

    @property
    def nets(self) -> dict[str, list[NetworkInfo]]:
        """All interfaces, by the names of their domains."""
        found = {}
        for domain in self.client.domains():
            with suppress(DomainNotFound):  # it went meanwhile
                if nets := self.client.networks(domain.domid):
                    found[domain.name] = nets
        return found

    @property
    def rules(self) -> dict[str, dict[int, tuple[RuleInfo, ...]]]:
        """The rules in force, with their counters, by the domain's name and the interface's number."""
        return {name: {net.devid: net.rules for net in nets} for name, nets in self.nets.items()}

    def join(self, to: str) -> None:
        """Be one network with that of the daemon that listens at an address (unix:/PATH, tls:HOST:PORT)."""
        self.client.join_network(to)

    def leave(self) -> None:
        """Be a network of this machine's domains alone again."""
        self.client.join_network("")

    @property
    def joined(self) -> list[str]:
        """The addresses of those that were joined."""
        return self.client.joined_networks()


class Machine:
    """A machine that runs domains. As a context manager it is closed in the end."""

    def __init__(self, client: Client, supervision: Supervision, resources: ExitStack) -> None:
        """Made by `power_on` and `connect`. `resources` is what closing it releases."""
        self.client = client
        self.supervision = supervision
        self._resources = resources
        self._xenstore: XenstoreClient | None = None

    @property
    def host(self) -> HostInfo:
        return self.client.host()

    @property
    def network(self) -> MachineNetwork:
        """Its firewall-router."""
        return MachineNetwork(self.client)

    @property
    def xenstore(self) -> XenstoreClient:
        """Its xenstore, with dom0's rights."""
        if self._xenstore is None:
            path = self.host.xenstore_socket
            if path is None:
                raise ToolstackError("this machine's xenstore listens nowhere")
            self._xenstore = self._resources.enter_context(XenstoreClient(Path(path)))
        return self._xenstore

    def create(self, config: DomainConfig | str | Path, progress: OnProgress = no_progress) -> Domain:
        """Make a domain of a configuration, or of an xl.cfg file by its path; it is paused."""
        if not isinstance(config, DomainConfig):
            config = load_config(config)
        for sentence in config.without_effect(scheduler_parameters(self.client, config)):
            log.warning("%s: %s", config.name, sentence)
        return Domain(self, self.client.create(absolute_paths(config, Path.cwd()), progress))

    def domains(self) -> list[Domain]:
        """All guests, by domid."""
        return [Domain(self, info.domid) for info in self.client.domains() if info.domid]

    def create_template(
        self,
        name: str,
        config: DomainConfig | str | Path,
        warm_up: str | Sequence[str] | None = None,
        ready: int = 4,
        progress: OnProgress = no_progress,
        *,
        root: str = "",
        disks: Sequence[str] = (),
        net: str | None = None,
    ) -> Template:
        """Boot a domain of a configuration, run a command in its guest, and freeze it; keep so many clones ready.

        `root`, `disks` and `net` (its rules) add to the configuration what `xenolith run` means by these words.  What
        the template and its clones write to disks goes to overlays of their own.
        """
        config = copy.deepcopy(config) if isinstance(config, DomainConfig) else load_config(config)
        if root or disks or net is not None:
            # What makes roots of archives takes a while to import, and few want it.
            from xenolith.toolstack.run_template import equip

            equip(config, root, disks, net)
        wanted = execution(warm_up) if warm_up is not None else None
        self.client.create_template(name, absolute_paths(config, Path.cwd()), wanted, ready, progress)
        return Template(self, name)

    def templates(self) -> list[Template]:
        """All templates."""
        return [Template(self, info.name) for info in self.client.templates()]

    def events(self) -> Events:
        """What happens to all domains from now on."""
        return Events(self.client.subscribe())

    def domain(self, name: str | int) -> Domain:
        """The guest with this name, or this domid. Raises ToolstackError."""
        if isinstance(name, int):
            return Domain(self, find_domain(self.client, name).domid)
        domid = find_by_name(self.client, name)
        if not domid:
            raise ToolstackError(f"There is no guest with the name {name!r}.")
        return Domain(self, domid)

    def close(self) -> None:
        """End the connection; a machine in this process ends with all its domains."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Template(_Commands):
    """A guest that was booted once. Each command runs in a clone of its own, which is gone afterwards."""

    def __init__(self, machine: Machine, name: str) -> None:
        self._machine = machine
        self.name = name

    @property
    def info(self) -> TemplateInfo:
        """Raises ToolstackError when it is gone."""
        for info in self._machine.client.templates():
            if info.name == self.name:
                return info
        raise ToolstackError(f'There is no template "{self.name}".')

    def _execute(self, wanted: Execution) -> ProcessStream:
        """In a new clone; closing the process is its end."""
        return self._machine.client.run_template(self.name, wanted)

    def remove(self) -> None:
        """Forget it, and the clones that stand ready."""
        self._machine.client.remove_template(self.name)


def power_on(
    memory_mib: int = 1024,
    engine: str = "auto",
    pcpus: int = 2,
    scheduler: str = DEFAULT_SCHEDULER,
    host_cpus: Sequence[int] = (),
) -> Machine:
    """Switch a machine on in this process. Raises EngineUnavailable where the engine cannot run here.

    `scheduler` is the scheduling algorithm, one of those that `xenolith daemon --help` names. `host_cpus` are the CPUs
    of the host that the pCPUs are pinned to, one each; without them the host chooses from moment to moment.
    """
    from xenolith.machine.engines.protocol import EngineError
    from xenolith.toolstack.embedded import EmbeddedToolstack
    from xenolith.toolstack.supervisor import Supervisor

    if scheduler not in SCHEDULERS:
        raise InvalidRequest(f"There is no scheduler {scheduler!r}, only {', '.join(SCHEDULERS)}.")
    if memory_mib < 1 or pcpus < 1:
        raise InvalidRequest(f"A machine needs memory and a pCPU, not {memory_mib} MiB and {pcpus}.")
    with ExitStack() as resources:
        try:
            directory = Path(resources.enter_context(TemporaryDirectory(prefix="xenolith-")))
            dom0 = host.power_on(memory_mib, engine, pcpus, scheduler, host_cpus)
        except (EngineError, ValueError) as error:
            raise EngineUnavailable(str(error)) from error
        except (OSError, MemoryError) as error:
            raise ToolstackError(f"no machine of {memory_mib} MiB can be had: {error or 'no memory left'}") from error
        client = EmbeddedToolstack(dom0, xenstore_socket=directory / "xenstore.sock")
        resources.callback(client.close)
        supervisor = Supervisor(client, directory / "dump")
        resources.callback(supervisor.close)
        return Machine(client, supervisor, resources.pop_all())


def connect(socket: str | Path | None = None) -> Machine:
    """The daemon's machine at `socket`, by default this user's; it is started if none runs. Raises ToolstackError."""
    from xenolith.toolstack.daemon.remote import RemoteClient

    try:
        client = RemoteClient.connect(None if socket is None else Path(socket), say=log.warning)
    except (OSError, ValueError) as error:
        raise ToolstackError(f"cannot connect to {socket or 'the daemon'}: {error}") from error
    resources = ExitStack()
    resources.callback(client.close)
    return Machine(client, client, resources)
