"""The configuration of a domain, as typed data.

One `DomainConfig` says everything that the toolstack was told about a domain; `reader` makes it from xl.cfg text,
`as_json` prints it, programs may fill it in themselves. A field that is None was not given: what stands for it is
decided where it is used, and properties such as `memory_kib` give the decision that a PV domain gets here.

Source: xl.cfg(5) for the keys and their meaning, libxl's domain configuration (as `xl create -n` prints it) for the
grouping.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import InitVar, dataclass, field
from enum import StrEnum
from pathlib import Path
from uuid import UUID, uuid4

from xenolith.toolstack.config.cpuid import CpuidPolicy
from xenolith.toolstack.config.devices import Channel, IomemRange, P9Share, PciDevice, PortRange, VirtualFramebuffer
from xenolith.toolstack.config.disk import Disk
from xenolith.toolstack.config.vif import Nic

DEFAULT_MEMORY_KIB = 32 * 1024  # libxl's, when neither memory nor maxmem is given
DEFAULT_WEIGHT = 256  # what a domain weighs with Xen's schedulers


class DomainType(StrEnum):
    PV = "pv"
    PVH = "pvh"
    HVM = "hvm"


class Action(StrEnum):
    """What happens to a domain that has shut down; the values are xl.cfg's names."""

    DESTROY = "destroy"
    RESTART = "restart"
    RENAME_RESTART = "rename-restart"
    PRESERVE = "preserve"
    COREDUMP_DESTROY = "coredump-destroy"
    COREDUMP_RESTART = "coredump-restart"
    SOFT_RESET = "soft-reset"


class TscMode(StrEnum):
    DEFAULT = "default"
    ALWAYS_EMULATE = "always_emulate"
    NATIVE = "native"
    NATIVE_PARAVIRT = "native_paravirt"


@dataclass(slots=True)
class SchedulerParameters:
    """Per-domain parameters; which of them count depends on the scheduler."""

    weight: int | None = None
    cap: int | None = None  # percent of one pCPU, 0 is no cap
    period: int | None = None
    extratime: int | None = None
    slice: int | None = None
    latency: int | None = None

    def given(self) -> dict[str, int]:
        """By the names that the scheduling algorithms have for them."""
        values = {"weight": self.weight, "cap": self.cap}
        return {name: value for name, value in values.items() if value is not None}

    def update(self, parameters: Mapping[str, int]) -> None:
        """Take over what of these can be said in a configuration."""
        self.weight = parameters.get("weight", self.weight)
        self.cap = parameters.get("cap", self.cap)


@dataclass(slots=True)
class DeviceModel:
    """Which QEMU would serve the domain, had it devices that need one; a PV domain has none here."""

    version: str | None = None
    path: str | None = None
    user: str | None = None
    seclabel: str | None = None
    arguments: list[str] = field(default_factory=list)
    arguments_pv: list[str] = field(default_factory=list)
    arguments_hvm: list[str] = field(default_factory=list)
    restrict: bool | None = None
    in_stubdomain: bool | None = None
    stubdomain_kernel: str | None = None
    stubdomain_cmdline: str | None = None
    stubdomain_ramdisk: str | None = None
    stubdomain_memory_kib: int | None = None


@dataclass(slots=True)
class DomainConfig:
    """Everything that is known of a domain before it exists."""

    name: str
    uuid: UUID = field(default_factory=uuid4)
    type: DomainType = DomainType.PV

    # What runs in it.
    kernel: str | None = None
    ramdisk: str | None = None
    cmdline: str | None = None
    bootloader: str | None = None
    bootloader_args: list[str] = field(default_factory=list)
    device_tree: str | None = None

    # What it gets.
    target_memory_kib: int | None = None
    max_memory_kib: int | None = None
    video_memory_kib: int | None = None
    shadow_memory_kib: int | None = None
    vcpus: int | None = None
    max_vcpus: int = 0  # 0: not given
    hard_affinity: list[frozenset[int]] | None = None  # one set of pCPUs per vCPU, from vCPU 0 on
    soft_affinity: list[frozenset[int]] | None = None
    numa_placement: bool | None = None
    pool: str | None = None
    scheduler: SchedulerParameters = field(default_factory=SchedulerParameters)
    max_grant_frames: int | None = None
    max_maptrack_frames: int | None = None
    max_grant_version: int | None = None
    max_event_channels: int = 0  # 0: the default

    # What it sees of the machine.
    tsc_mode: TscMode = TscMode.DEFAULT
    localtime: bool | None = None
    rtc_timeoffset: int = 0
    e820_host: bool | None = None
    cpuid: CpuidPolicy = field(default_factory=CpuidPolicy)
    msr_relaxed: bool | None = None
    nested_hvm: bool | None = None
    hap: bool | None = None
    out_of_sync_page_tables: bool | None = None
    acpi: bool | None = None
    vpmu: bool | None = None
    altp2m: str | None = None
    vmtrace_kib: int = 0

    # Devices.
    disks: list[Disk] = field(default_factory=list)
    nics: list[Nic] = field(default_factory=list)
    channels: list[Channel] = field(default_factory=list)
    p9_shares: list[P9Share] = field(default_factory=list)
    framebuffers: list[VirtualFramebuffer] = field(default_factory=list)
    pci_devices: list[PciDevice] = field(default_factory=list)
    ioports: list[PortRange] = field(default_factory=list)
    irqs: list[int] = field(default_factory=list)
    iomem: list[IomemRange] = field(default_factory=list)
    passthrough: str | None = None
    device_model: DeviceModel = field(default_factory=DeviceModel)

    # What it is to the host.
    driver_domain: bool | None = None
    disable_migrate: bool | None = None
    seclabel: str | None = None  # after the domain was built, when it differs from the label it is built with
    init_seclabel: str | None = None
    suspend_evtchn_compat: bool | None = None

    # What becomes of it.
    on_poweroff: Action = Action.DESTROY
    on_reboot: Action = Action.RESTART
    on_watchdog: Action = Action.DESTROY
    on_crash: Action = Action.DESTROY
    on_soft_reset: Action = Action.SOFT_RESET

    ignored_keys: list[str] = field(default_factory=list)  # given, meant for something that this toolstack lacks

    memory_mib: InitVar[int | None] = None  # another way to give target_memory_kib; not kept

    def __post_init__(self, memory_mib: int | None) -> None:
        if memory_mib is not None:
            self.target_memory_kib = memory_mib << 10

    @property
    def memory_kib(self) -> int:
        """The memory the domain starts with."""
        if self.target_memory_kib is not None:
            return self.target_memory_kib
        return DEFAULT_MEMORY_KIB if self.max_memory_kib is None else self.max_memory_kib

    @property
    def memory_ceiling_kib(self) -> int:
        """The memory the domain may ever have."""
        return max(self.memory_kib, self.max_memory_kib or 0)

    @property
    def vcpus_online(self) -> int:
        """How many vCPUs are online when the domain starts."""
        return self.vcpus or 1

    @property
    def vcpus_ceiling(self) -> int:
        """How many vCPUs the domain has, online or not."""
        return max(self.max_vcpus, self.vcpus_online)

    def unsupported(self) -> list[str]:
        """The keys whose effect a PV domain of this toolstack cannot be given; creating it must not ignore them."""
        asked = {
            f'type="{self.type}"': self.type is not DomainType.PV,
            "pci": bool(self.pci_devices),
            "ioports": bool(self.ioports),
            "irqs": bool(self.irqs),
            "iomem": bool(self.iomem),
            "vfb": bool(self.framebuffers),
            "device_tree": self.device_tree is not None,
            "nestedhvm": bool(self.nested_hvm),
            "altp2m": self.altp2m not in (None, "disabled"),
            "vmtrace_buf_kb": bool(self.vmtrace_kib),
        }
        return [name for name, given in asked.items() if given] + self.ignored_keys

    def without_effect(self, scheduler_parameters: Collection[str]) -> list[str]:
        """Settings that the domain lives without: which, and what is missing here, a sentence each for people.

        A value that asks for what every domain gets anyway is not among them. `scheduler_parameters` is what the
        scheduler of its cpupool lets be set.
        Whoever makes one of these work takes it out of here.
        """
        scheduling = self.scheduler
        asked = {
            "cpu_weight": (
                scheduling.weight not in (None, DEFAULT_WEIGHT) and "weight" not in scheduler_parameters,
                "the scheduler in use has no weights",
            ),
            "cap": (bool(scheduling.cap) and "cap" not in scheduler_parameters, "the scheduler in use has no caps"),
            "period": (scheduling.period is not None, "the scheduler has no such parameter"),
            "slice": (scheduling.slice is not None, "the scheduler has no such parameter"),
            "latency": (scheduling.latency is not None, "the scheduler has no such parameter"),
            "extratime": (scheduling.extratime is not None, "the scheduler has no such parameter"),
            "max_grant_version": (self.max_grant_version is not None, "all domains may use the same versions"),
            "tsc_mode": (self.tsc_mode not in (TscMode.DEFAULT, TscMode.NATIVE), "guests read the processor's counter"),
            "e820_host": (bool(self.e820_host), "a domain's memory is one range"),
            "cpuid": (bool(self.cpuid.msrs), "no MSR tells of features"),
            "msr_relaxed": (bool(self.msr_relaxed), "MSRs that are not known fault"),
            "vpmu": (bool(self.vpmu), "guests get no performance counters"),
            "channel": (bool(self.channels), "a domain has one console"),
            "passthrough": (self.passthrough in ("enabled", "sync_pt", "share_pt"), "there is no IOMMU to use"),
            "driver_domain": (bool(self.driver_domain), "back-ends are in domain 0"),
            "seclabel": (self.seclabel is not None, "there are no security labels"),
            "init_seclabel": (self.init_seclabel is not None, "there are no security labels"),
            "xend_suspend_evtchn_compat": (bool(self.suspend_evtchn_compat), "no old tool looks for that port"),
        }
        return [f"{key} has no effect: {reason}" for key, (given, reason) in asked.items() if given]


def absolute_paths(config: DomainConfig, directory: Path) -> DomainConfig:
    """The same configuration, with files named so that somebody who works elsewhere finds them."""
    config.kernel = _absolute(config.kernel, directory)
    config.ramdisk = _absolute(config.ramdisk, directory)
    for disk in config.disks:
        if disk.script is None and disk.target:
            disk.target = _absolute(disk.target, directory)
    for share in config.p9_shares:
        share.path = str(directory / share.path)
    for channel in config.channels:
        channel.path = _absolute(channel.path, directory)
    return config


def _absolute(path: str | None, directory: Path) -> str | None:
    return None if path is None else str(directory / path)
