"""Domain 0: the privileged domain, whose kernel and programs are this Python process (paper 3.1; design decision 7).

`Dom0` owns what a booted dom0 has running: the control interface, the xenstore and the console back-ends.  It
makes domains (as libxl does: create, build, connect, introduce, describe in xenstore), notices when one shuts down or
crashes, and takes them apart again.  It reaches a guest only through control calls and event channels.

What becomes of a domain that has ended (restart, preserve, ...) is policy, and not decided here: a domain that shut
down keeps its memory and its console's scroll-back until `destroy`.
"""

from __future__ import annotations

import threading
import uuid as uuids
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final, Self

from xenolith.abi.grant_table import GNTTAB_RESERVED_CONSOLE, GNTTAB_RESERVED_XENSTORE
from xenolith.abi.hypercalls import VIRQ_DOM_EXC, SHUTDOWN_suspend
from xenolith.dom0 import domain_tree
from xenolith.dom0.backends.block import BlockBackend, VbdSpec
from xenolith.dom0.backends.block_native import BlockStatistics
from xenolith.dom0.backends.net import NetBackend, VifSpec
from xenolith.dom0.backends.p9 import P9Backend
from xenolith.dom0.builder import BuiltDomain, build
from xenolith.dom0.channel import Channel, describe
from xenolith.dom0.console import Console
from xenolith.dom0.copies import Copies
from xenolith.dom0.disks import DiskError, DiskSource
from xenolith.dom0.disks.open import open_disk
from xenolith.dom0.disks.overlay import OverlayDisk
from xenolith.dom0.event_thread import EventThread
from xenolith.dom0.image import KernelImage
from xenolith.dom0.migration.clone import FrozenDomain, introduce
from xenolith.dom0.migration.restore import Received
from xenolith.dom0.migration.services import ServicesRecord, put
from xenolith.dom0.network.frame import mac_text
from xenolith.dom0.network.link import UplinkError
from xenolith.dom0.network.network import Network, chosen_uplink
from xenolith.dom0.network.port import PortStatistics
from xenolith.dom0.shares import ShareError, ShareSpec
from xenolith.dom0.xenbus import UNPLUG_SECONDS, Device, DeviceGone, Xenbus
from xenolith.dom0.xenstore import HostRequests, XenstoreService
from xenolith.dom0.xenstore.connection import ConnectionState
from xenolith.dom0.xenstore.errors import XsError
from xenolith.hypervisor.control import USUAL, Control, DomainCreateError, DomainInfo, Limits
from xenolith.hypervisor.domain_record.kinds import RecordError
from xenolith.hypervisor.hypervisor import Hypervisor
from xenolith.hypervisor.python_domain import HypercallError, boot_dom0

KIB_PER_PAGE: Final = 4
AGENT_CHANNEL: Final = 1  # the number of the console over which a guest's agent speaks
AGENT_NAME: Final = "xenolith.agent"
NS_PER_SECOND: Final = 1_000_000_000


AnyDevice = Device[BlockBackend] | Device[NetBackend] | Device[P9Backend]


@dataclass(frozen=True, kw_only=True)
class DomainSpec:
    """What a domain is made of.

    `memory_kib` is what it starts with and `max_memory_kib` (None: the same) the most it may have; likewise `vcpus` and
    `max_vcpus`.
    """

    name: str
    image: KernelImage | None  # None: of a domain that comes from elsewhere
    kernel: str  # where the image came from, for people
    ramdisk: bytes = b""
    cmdline: str = ""
    memory_kib: int
    max_memory_kib: int | None = None
    vcpus: int = 1
    max_vcpus: int | None = None
    disks: tuple[VbdSpec, ...] = ()
    nets: tuple[VifSpec, ...] = ()
    shares: tuple[ShareSpec, ...] = ()
    limits: Limits = USUAL
    time_offset: int = 0  # s, of its wall clock from UTC
    scheduling: Mapping[str, int] = field(default_factory=dict)  # what is other than usual, see sched.policy
    cpupool: str = ""  # empty: the first one
    hard_affinity: Sequence[frozenset[int]] = ()  # of each vCPU, from the first on; for the rest it is any pCPU
    soft_affinity: Sequence[frozenset[int]] = ()
    uuid: uuids.UUID = field(default_factory=uuids.uuid4)


class GuestDomain:
    """A domain that dom0 made."""

    def __init__(
        self,
        spec: DomainSpec,
        built: BuiltDomain,
        console: Console,
        disks: dict[int, Device[BlockBackend]],
        nets: dict[int, Device[NetBackend]],
        channel: Channel | None,
        shares: dict[int, Device[P9Backend]],
        undo: ExitStack,
    ) -> None:
        image = spec.image and spec.image.without_contents()
        self.spec = replace(spec, image=image, ramdisk=b"")  # they are in the domain now
        self.domid = built.domid
        self.built = built
        self.console = console
        self.disks = disks  # by virtual device number
        self.nets = nets  # by handle
        self.channel = channel  # None: it came from where there was none
        self.shares = shares
        self.undo = undo  # takes the domain apart, in the reverse order of its making
        self.started = False  # it was let run
        self._ended = threading.Condition()
        self._end: DomainInfo | None = None

    def disk_statistics(self) -> BlockStatistics:
        """What its disks did, all together."""
        return BlockStatistics.total(device.backend.statistics for device in self.disks.values())

    def net_statistics(self) -> PortStatistics:
        """What its interfaces did, all together."""
        return PortStatistics.total(device.backend.vif.statistics for device in self.nets.values())

    @property
    def devices(self) -> list[AnyDevice]:
        """All its split devices."""
        return [*self.disks.values(), *self.nets.values(), *self.shares.values()]

    @property
    def end(self) -> DomainInfo | None:
        """How it shut down, or None while it has not."""
        return self._end

    def wait(self, timeout: float | None = None) -> DomainInfo | None:
        """Wait until it has shut down, at most `timeout` seconds; how, or None when the time is up."""
        with self._ended:
            self._ended.wait_for(lambda: self._end, timeout)
            return self._end

    def set_end(self, end: DomainInfo | None) -> None:
        """Called by Dom0 when it notices."""
        with self._ended:
            self._end = end
            self._ended.notify_all()


class Dom0:
    """Domain 0 on a hypervisor, with its services running.

    Methods may be called by any thread, each domain's by one at a time.
    """

    def __init__(self, hypervisor: Hypervisor, engine: str) -> None:
        self.hypervisor = hypervisor
        self.engine = engine  # its name
        self.control = Control(hypervisor)
        self.domains: dict[int, GuestDomain] = {}
        self.shutdown_hooks: list[Callable[[GuestDomain], None]] = []
        """Called on dom0's event thread with each domain that shuts down, once it has been noted as ended."""
        self._lock = threading.Lock()
        self.domain = boot_dom0(hypervisor)
        self.domain.log(f"engine: {engine}")
        self._thread = EventThread(self.domain.log)
        self.copies = Copies(self.control, self.domain.log)
        self.xenstore = XenstoreService()
        self.xenstore.start()
        self.xenbus = Xenbus(self.xenstore, self.domain.log)
        self.network = Network(self.domain.log, chosen_uplink())
        self.xenstore.write("/local/domain/0/name", "Domain-0", ["n0"])
        self.xenstore.write("/local/domain/0/domid", "0", ["n0"])
        port = self.domain.bind_virq(VIRQ_DOM_EXC)
        self.domain.set_handler(port, self._thread.on_event(self._note_ended_domains))

    # --- life cycle ----------------------------------------------------------------------------------

    def create(self, spec: DomainSpec) -> GuestDomain:
        """Make a domain, connect it to dom0's services and leave it paused. Raises DomainCreateError."""
        if spec.image is None:
            raise DomainCreateError("a new domain needs a kernel")
        pages = spec.memory_kib // KIB_PER_PAGE
        max_pages = (spec.max_memory_kib or spec.memory_kib) // KIB_PER_PAGE
        with ExitStack() as undo:
            vcpus = spec.max_vcpus or spec.vcpus
            domid = self.control.create_domain(spec.uuid.bytes, vcpus, max_pages, spec.limits)
            undo.callback(self.control.destroy, domid)
            self._schedule(domid, spec)
            self.control.set_time_offset(domid, spec.time_offset)
            built = build(self.control, domid, spec.image, pages, spec.ramdisk, spec.cmdline)
            self.control.grant_to_dom0(domid, GNTTAB_RESERVED_CONSOLE, built.console_mfn)
            self.control.grant_to_dom0(domid, GNTTAB_RESERVED_XENSTORE, built.store_mfn)
            console = self._connect_console(built, undo)
            self._describe(spec, built, undo)
            self._connect_xenstore(built, undo)
            channel = self._open_channel(domid, undo)
            disks: dict[int, Device[BlockBackend]] = {}
            undo.callback(_stop_all, disks)
            for vbd in spec.disks:
                disks[vbd.number] = self._plug(domid, vbd)
            nets: dict[int, Device[NetBackend]] = {}
            undo.callback(_stop_all, nets)
            for vif in spec.nets:
                nets[vif.number] = self._plug_net(domid, spec.name, vif)
            shares: dict[int, Device[P9Backend]] = {}
            undo.callback(_stop_all, shares)
            for share in spec.shares:
                shares[share.number] = self._plug_share(domid, share)
            domain = GuestDomain(spec, built, console, disks, nets, channel, shares, undo.pop_all())
        with self._lock:
            self.domains[domid] = domain
        return domain

    def restore(self, spec: DomainSpec, received: Received) -> GuestDomain:
        """Make a domain that was received, and leave it paused. Raises RecordError and DomainCreateError.

        `spec` says what it is called here and which disks it has; its sizes are what they were.
        """
        sizes = received.vcpus, received.max_pages
        domid = self.control.restore_domain(spec.uuid.bytes, *sizes, received.arrival, spec.limits)
        return self._connect(spec, domid, received.services)

    def clone(self, spec: DomainSpec, frozen: FrozenDomain, number: int) -> GuestDomain:
        """Make a copy of a domain that was frozen, the clone of this number, and leave it paused.

        `spec` as in `restore`.  Raises DomainCreateError.
        """
        domid = self.control.copy(frozen.frozen, spec.uuid.bytes, spec.limits)
        domain = self._connect(spec, domid, frozen.services)
        self.xenstore.transact(lambda store: introduce(store, domid, number, frozen.name))
        return domain

    def _connect(self, spec: DomainSpec, domid: int, theirs: ServicesRecord) -> GuestDomain:
        """Connect a domain that came from elsewhere to dom0's services."""
        with ExitStack() as undo:
            undo.callback(self.control.destroy, domid)
            for devices in (spec.disks, spec.nets):
                if len({device.number for device in devices}) < len(devices):
                    raise DomainCreateError("two of its devices have the same number")
            self._schedule(domid, spec)
            built = BuiltDomain(domid, theirs.store_mfn, theirs.store_port, theirs.console_mfn, theirs.console_port)
            console = self._connect_console(built, undo, theirs.scrollback)
            undo.callback(domain_tree.remove, self.xenstore, domid, spec.uuid)
            put(self.xenstore, theirs.nodes, domid, spec.uuid)
            self.xenstore.transact(lambda store: domain_tree.move(store, built, spec.name, spec.uuid))
            self._connect_xenstore(built, undo, theirs.connection)
            channel = self._open_channel(domid, undo)
            disks: dict[int, Device[BlockBackend]] = {}
            undo.callback(_stop_all, disks)
            for vbd in spec.disks:
                disks[vbd.number] = self._adopt(domid, vbd)
            nets: dict[int, Device[NetBackend]] = {}
            undo.callback(_stop_all, nets)
            for vif in spec.nets:
                nets[vif.number] = self._plug_net(domid, spec.name, vif, adopt=True)
            domain = GuestDomain(spec, built, console, disks, nets, channel, {}, undo.pop_all())
        with self._lock:
            self.domains[domid] = domain
        return domain

    def _schedule(self, domid: int, spec: DomainSpec) -> None:
        try:
            if spec.cpupool:
                self.control.move_to_cpupool(domid, spec.cpupool)
            self.control.set_scheduling(domid, spec.scheduling)
            for vcpu_id, hard in enumerate(spec.hard_affinity):
                self.control.set_affinity(domid, vcpu_id, hard, None)
            for vcpu_id, soft in enumerate(spec.soft_affinity):
                self.control.set_affinity(domid, vcpu_id, None, soft)
        except ValueError as error:
            raise DomainCreateError(str(error)) from error

    def _connect_console(self, built: BuiltDomain, undo: ExitStack, scrollback: bytes = b"") -> Console:
        port, notify = self._bind(built.domid, built.console_port, undo)
        console = Console(self._map(built.domid, built.console_mfn, undo), notify, scrollback)
        undo.callback(console.close)
        self.domain.set_handler(port, self._thread.on_event(console.service))
        return console

    def _connect_xenstore(self, built: BuiltDomain, undo: ExitStack, state: ConnectionState | None = None) -> None:
        port, notify = self._bind(built.domid, built.store_port, undo)
        page = self._map(built.domid, built.store_mfn, undo)
        try:
            ring = self.xenstore.introduce(built.domid, page, notify, state)
        except XsError as error:
            raise RecordError(f"its conversation with xenstore cannot go on: {error}") from error
        undo.callback(self.xenstore.release, built.domid)
        self.domain.set_handler(port, lambda _: ring.on_event())

    def _map(self, domid: int, mfn: int, undo: ExitStack) -> memoryview:
        try:
            page = self.control.map_foreign(domid, mfn)
        except ValueError as error:
            raise DomainCreateError(str(error)) from error
        undo.callback(self.control.unmap_foreign, domid, mfn)
        return page

    def _bind(self, domid: int, remote_port: int, undo: ExitStack) -> tuple[int, Callable[[], None]]:
        """Connect a port of dom0's to an unbound one of the domain's; the port, and what notifies the domain."""
        try:
            port = self.domain.bind_interdomain(domid, remote_port)
        except HypercallError as error:
            raise DomainCreateError(f"dom0 cannot bind an event channel: {error}") from error
        undo.callback(self.domain.close, port)

        def notify() -> None:
            self.domain.send(port)

        return port, notify

    def _describe(self, spec: DomainSpec, built: BuiltDomain, undo: ExitStack) -> None:
        description = domain_tree.Description(
            name=spec.name,
            uuid=spec.uuid,
            memory_kib=spec.memory_kib,
            max_memory_kib=spec.max_memory_kib or spec.memory_kib,
            vcpus=spec.vcpus,
            max_vcpus=spec.max_vcpus or spec.vcpus,
            kernel=spec.kernel,
            start_time=self.domain.wall_clock() // NS_PER_SECOND,
        )
        undo.callback(domain_tree.remove, self.xenstore, built.domid, spec.uuid)

        def write(store: HostRequests) -> None:
            domain_tree.write(store, built, description)
            describe(store, built.domid, AGENT_CHANNEL, AGENT_NAME)

        self.xenstore.transact(write)

    def _open_channel(self, domid: int, undo: ExitStack) -> Channel | None:
        if not self.xenstore.exists(f"{domain_tree.home(domid)}/device/console/{AGENT_CHANNEL}"):
            return None
        channel = Channel(self.domain, self.xenstore, self._thread, domid, AGENT_CHANNEL)
        undo.callback(channel.close)
        return channel

    def plug_disk(self, domain: GuestDomain, vbd: VbdSpec) -> None:
        """Give a domain another disk, also while it runs. Raises DomainCreateError."""
        domain.disks[vbd.number] = self._plug(domain.domid, vbd)

    def _plug(self, domid: int, vbd: VbdSpec) -> Device[BlockBackend]:
        return self._with_backend(
            domid, vbd, lambda backend: self.xenbus.plug(domid, vbd.number, backend, *backend.nodes())
        )

    def _adopt(self, domid: int, vbd: VbdSpec) -> Device[BlockBackend]:
        return self._with_backend(domid, vbd, lambda backend: self.xenbus.adopt(domid, vbd.number, backend, {}, {}))

    def _with_backend(
        self, domid: int, vbd: VbdSpec, device: Callable[[BlockBackend], Device[BlockBackend]]
    ) -> Device[BlockBackend]:
        try:
            backend = BlockBackend(self.domain, domid, vbd)
            try:
                return device(backend)
            except ValueError:
                backend.close()
                raise
        except (DiskError, ValueError) as error:
            raise DomainCreateError(str(error)) from error

    def let_go(self, domain: GuestDomain) -> None:
        """Close what is for one at a time of a domain that is paused, and that goes on elsewhere or by `take_back`.

        That is its disks and published ports.
        """
        _stop_all(domain.disks)
        for net in domain.nets.values():
            net.backend.attachment.withdraw()

    def take_back(self, domain: GuestDomain, devices: Mapping[int, Device[BlockBackend]]) -> None:
        """Open it again: the disks, those of `devices` that were not yet, and ports. Raises DomainCreateError."""
        for number, device in devices.items():
            if domain.disks[number] is device:
                device.stop()
                domain.disks[number] = self._adopt(domain.domid, device.backend.spec)
        for net in domain.nets.values():
            try:
                net.backend.attachment.publish()
            except UplinkError as error:
                raise DomainCreateError(str(error)) from error

    def unplug_disk(
        self, domain: GuestDomain, number: int, timeout: float = UNPLUG_SECONDS, force: bool = False
    ) -> bool:
        """Take a disk from a domain; False where the guest does not let go of it in time, unless by `force`.

        Raises KeyError where it has no such disk.
        """
        if not self.xenbus.unplug(domain.disks[number], timeout, force):
            return False
        del domain.disks[number]
        return True

    def change_medium(self, domain: GuestDomain, number: int, source: DiskSource | None) -> None:
        """Put another medium into a drive, or none. Raises KeyError and DiskError."""
        device = domain.disks[number]
        disk = open_disk(source)
        try:
            device.call(lambda: device.backend.insert(disk, source))
            device.refresh()
        except DeviceGone as error:
            disk.close()
            raise DiskError(str(error)) from error

    def snapshot_disk(self, domain: GuestDomain, number: int, path: Path) -> None:
        """Keep what an overlay holds now, see `overlay.OverlayDisk.snapshot`.

        Raises KeyError, DiskError, and OSError where the flush failed.
        """
        device = domain.disks[number]

        def snapshot() -> None:
            disk = device.backend.disk
            if not isinstance(disk, OverlayDisk):
                raise DiskError(f"{device.backend.spec.name} is no overlay, of which alone there can be snapshots")
            disk.snapshot(path)

        try:
            device.ask(snapshot)
        except DeviceGone as error:
            raise DiskError(str(error)) from error

    def measure_disk(self, domain: GuestDomain, number: int) -> None:
        """A disk's storage has become larger: the guest sees it soon. Raises KeyError and DiskError."""
        device = domain.disks[number]
        try:
            device.call(lambda: device.backend.disk.measure())
            device.refresh()
        except DeviceGone as error:
            raise DiskError(str(error)) from error

    def plug_net(self, domain: GuestDomain, vif: VifSpec) -> None:
        """Give a domain another network interface, also while it runs. Raises DomainCreateError."""
        domain.nets[vif.number] = self._plug_net(domain.domid, domain.spec.name, vif)

    def _plug_net(self, domid: int, name: str, vif: VifSpec, *, adopt: bool = False) -> Device[NetBackend]:
        try:
            backend = NetBackend(self.domain, domid, vif, self.network.router, partial(self.network.attach, name))
            try:
                if not adopt:
                    return self.xenbus.plug(domid, vif.number, backend, *backend.nodes())
                mac = {"mac": mac_text(vif.mac)}  # a clone has another than its parent
                return self.xenbus.adopt(domid, vif.number, backend, mac, mac)
            except ValueError:
                backend.close()
                raise
        except (UplinkError, ValueError) as error:
            raise DomainCreateError(str(error)) from error

    def unplug_net(
        self, domain: GuestDomain, number: int, timeout: float = UNPLUG_SECONDS, force: bool = False
    ) -> bool:
        """Take an interface from a domain, as `unplug_disk`. Raises KeyError where it has no such interface."""
        if not self.xenbus.unplug(domain.nets[number], timeout, force):
            return False
        del domain.nets[number]
        return True

    def _plug_share(self, domid: int, share: ShareSpec) -> Device[P9Backend]:
        try:
            backend = P9Backend(self.domain, domid, share)
            try:
                return self.xenbus.plug(domid, share.number, backend, *backend.nodes())
            except ValueError:
                backend.close()
                raise
        except (ShareError, ValueError) as error:
            raise DomainCreateError(str(error)) from error

    def start(self, domain: GuestDomain) -> None:
        """Let a domain run: one that was created, or paused, or came from elsewhere. Raises DomainCreateError."""
        self.copies.attend(domain.domid)
        domain.started = True
        if domain.channel is not None:
            domain.channel.attend()
        self.control.unpause(domain.domid)

    def resume(self, domain: GuestDomain) -> None:
        """Let a domain go on that has suspended itself. Raises ValueError for another."""
        if domain.end is None or domain.end.shutdown_reason != SHUTDOWN_suspend:
            raise ValueError(f"domain {domain.domid} has not suspended itself")
        domain.set_end(None)
        self.control.resume(domain.domid)

    def destroy(self, domain: GuestDomain) -> None:
        """End a domain, whatever it is doing, and give back all it had. What it printed stays readable."""
        with self._lock:
            if self.domains.pop(domain.domid, None) is None:
                return
        self.control.pause(domain.domid)
        end = self.control.info(domain.domid)
        domain.undo.close()
        if domain.end is None:
            domain.set_end(end)

    def close(self) -> None:
        """Destroy all domains, stop dom0's services and switch the machine off. Once."""
        self.copies.stop()
        for domain in list(self.domains.values()):
            self.destroy(domain)
        self.network.close()
        self.xenstore.stop()
        self._thread.stop()
        self.domain.power_off()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- on the event thread -----------------------------------------------------------------------------

    def _note_ended_domains(self) -> None:
        """VIRQ_DOM_EXC: some domain has shut down (libxl and xenstored look for it in the same way)."""
        for info in self.control.list():
            domain = self.domains.get(info.domid)
            if domain is None or not info.shutdown or domain.end is not None:
                continue
            if info.shutdown_reason == SHUTDOWN_suspend:
                domain.console.service()
            else:
                domain.console.close()
                if domain.channel is not None:
                    domain.channel.close()
                for device in domain.devices:
                    device.stop_soon()
            domain.set_end(info)
            self.xenstore.domain_event("@releaseDomain")
            for hook in self.shutdown_hooks:
                hook(domain)


def _stop_all(devices: Mapping[int, AnyDevice]) -> None:
    for device in devices.values():
        device.stop_soon()
    for device in devices.values():
        device.stop()
