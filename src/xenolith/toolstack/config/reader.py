"""From xl.cfg settings to a DomainConfig: every key, in the order in which xl looks at them.

The order shows: it is the order of the warnings, and decides which of two errors is reported. Each `_read_*` function
takes one group of keys. A key that xl knows and this toolstack has no use for is listed in `_NOT_HERE`, so that
creating such a domain can be refused instead of quietly giving less than was asked for; keys that xl does not know
either are ignored without a word, as xl does.

Source: xl.cfg(5), and the answers of xl 4.17 recorded in tests/toolstack/xlcfg/.
"""

from __future__ import annotations

import re
from uuid import UUID, uuid4

from xenolith.toolstack.config import devices
from xenolith.toolstack.config.cpuid import read_cpuid
from xenolith.toolstack.config.cpus import CpuSetError, HostTopology, parse_cpu_set
from xenolith.toolstack.config.devices import STATUS_FAIL, PciDevice
from xenolith.toolstack.config.disk import DiskSpecError, parse_disk
from xenolith.toolstack.config.domain import Action, DomainConfig, DomainType, TscMode
from xenolith.toolstack.config.grammar import ConfigError, ConfigFile, read_config
from xenolith.toolstack.config.vif import parse_vif

FIRMWARE_DIRECTORY = "/usr/lib/xen-4.17/boot"  # where Debian's grub-xen-host puts PV grub

_INT_MAX = 2**31 - 1

_NOT_HERE = (
    "dtdev",
    "pvcalls",
    "usbctrl",
    "usbdev",
    "vdispl",
    "vkb",
    "vnuma",
    "vsnd",
    "vtpm",
)


def parse_domain_config(text: str, source: str, host: HostTopology) -> tuple[DomainConfig, list[str]]:
    """The configuration that the text of the file `source` describes, and the warnings to print.

    Raises ConfigError, which carries the warnings up to the error and the error itself.
    """
    file = read_config(text, source)
    return read_domain_config(file, host), file.diagnostics


def read_domain_config(file: ConfigFile, host: HostTopology) -> DomainConfig:
    """The configuration of a parsed file; warnings go to its diagnostics."""
    init_seclabel, seclabel = file.string("init_seclabel"), file.string("seclabel")
    domain_type = _read_type(file)
    hap = file.boolean("hap")
    name = file.string("name")
    if name is None:
        raise file.fail("Domain name must be specified.")
    config = DomainConfig(name, _read_uuid(file), domain_type)
    config.init_seclabel = seclabel if init_seclabel is None else init_seclabel
    config.seclabel = None if init_seclabel is None else seclabel
    config.hap = hap
    config.out_of_sync_page_tables = file.boolean("oos")
    config.pool = file.string("pool")
    _read_scheduler(file, config)
    _read_memory(file, config)
    _read_vcpus(file, config)
    _read_affinity(file, config, host)
    _read_grant_limits(file, config)
    _read_actions(file, config)
    _read_passthrough(file, config)
    _read_platform(file, config)
    _read_kernel(file, config)
    _read_hardware(file, config)
    _read_devices(file, config)
    config.ignored_keys = [key for key in _NOT_HERE if key in file.settings]
    return config


def _read_type(file: ConfigFile) -> DomainType:
    """The keys type and, older, builder. A prefix of a name is as good as the name, hvm before pv before pvh."""
    found: DomainType | None = None
    text = file.string("type")
    if text is not None:
        found = _by_prefix(file, text, {"hvm": DomainType.HVM, "pv": DomainType.PV, "pvh": DomainType.PVH})
    text = file.string("builder")
    if text is not None:
        builder = _by_prefix(file, text, {"hvm": DomainType.HVM, "generic": DomainType.PV})
        if found not in (None, builder):
            raise file.fail('Contradicting "builder" and "type" options specified.')
        found = builder
    return found or DomainType.PV


def _by_prefix(file: ConfigFile, text: str, names: dict[str, DomainType]) -> DomainType:
    for name, domain_type in names.items():
        if name.startswith(text):
            return domain_type
    raise file.fail(f"Invalid domain type {text}.")


def _read_uuid(file: ConfigFile) -> UUID:
    text = file.string("uuid")
    if text is None:
        return uuid4()
    if not re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", text):
        raise file.fail(f"Failed to parse UUID: {text}")
    return UUID(text)


def _read_scheduler(file: ConfigFile, config: DomainConfig) -> None:
    parameters = config.scheduler
    parameters.weight = file.integer("cpu_weight")
    parameters.cap = file.integer("cap")
    parameters.period = file.integer("period")
    parameters.slice = file.integer("slice")
    parameters.latency = file.integer("latency")
    parameters.extratime = file.integer("extratime")


def _read_memory(file: ConfigFile, config: DomainConfig) -> None:
    config.target_memory_kib = _mebibytes(file, "memory")
    config.max_memory_kib = _mebibytes(file, "maxmem")
    if config.max_memory_kib is None:
        config.max_memory_kib = config.target_memory_kib


def _mebibytes(file: ConfigFile, key: str) -> int | None:
    """A size in MiB as KiB; a negative one becomes the huge number that libxl makes of it, which nothing can have."""
    number = file.integer(key)
    return None if number is None else number * 1024 % 2**64


def _read_vcpus(file: ConfigFile, config: DomainConfig) -> None:
    config.vcpus = file.integer("vcpus")
    if config.vcpus is not None and config.vcpus < 0:
        raise file.fail("Unable to allocate cpumap")
    config.max_vcpus = file.integer("maxvcpus") or config.vcpus or 0
    if config.max_vcpus < (config.vcpus or 0):
        raise file.fail("xl: maxvcpus < vcpus")


def _read_affinity(file: ConfigFile, config: DomainConfig, host: HostTopology) -> None:
    config.hard_affinity = _cpu_sets(file, "cpus", config.max_vcpus, host)
    if config.hard_affinity is not None and not all(config.hard_affinity):
        raise file.fail("vcpu hard affinity map is empty")
    config.soft_affinity = _cpu_sets(file, "cpus_soft", config.max_vcpus, host)
    if file.is_list("cpus") or config.soft_affinity is not None:
        config.numa_placement = False


def _cpu_sets(file: ConfigFile, key: str, max_vcpus: int, host: HostTopology) -> list[frozenset[int]] | None:
    """One set per vCPU: element by element of a list, or the same for all of a string. None if the key is absent."""
    if key not in file.settings:
        return None
    try:
        if file.is_list(key):
            items = file.items(key) or []
            sets = [parse_cpu_set(text, host) for text in file.strings(key)[:max_vcpus]]
            missing = min(len(items), max_vcpus) - len(sets)
            return sets + [frozenset()] * missing
        return [parse_cpu_set(file.string(key) or "", host)] * max_vcpus
    except CpuSetError as error:
        raise file.fail(str(error)) from error


def _read_grant_limits(file: ConfigFile, config: DomainConfig) -> None:
    config.max_grant_frames = _limit(file, "max_grant_frames")
    config.max_maptrack_frames = _limit(file, "max_maptrack_frames")
    config.max_grant_version = _limit(file, "max_grant_version")


def _limit(file: ConfigFile, key: str) -> int | None:
    if key not in file.settings:
        return None
    number = file.integer(key) if file.is_integer(key) else None
    if number is None or not 0 <= number <= _INT_MAX:
        # xl says nothing at all here.
        line = file.settings[key].line
        raise file.fail(f"{file.source}:{line}: parameter `{key}' must be a number from 0 to {_INT_MAX}")
    return number


def _read_actions(file: ConfigFile, config: DomainConfig) -> None:
    config.on_poweroff = _action(file, "on_poweroff", config.on_poweroff)
    config.on_reboot = _action(file, "on_reboot", config.on_reboot)
    config.on_watchdog = _action(file, "on_watchdog", config.on_watchdog)
    config.on_crash = _action(file, "on_crash", config.on_crash)
    config.on_soft_reset = _action(file, "on_soft_reset", config.on_soft_reset)


def _action(file: ConfigFile, key: str, default: Action) -> Action:
    text = file.string(key)
    if text is None:
        return default
    try:
        return Action(text)
    except ValueError:
        raise file.fail(f'Unknown {key} action "{text}" specified') from None


def _read_passthrough(file: ConfigFile, config: DomainConfig) -> None:
    if config.type is DomainType.PV:
        config.e820_host = file.boolean("e820_host")
    defaults = PciDevice(
        msitranslate=bool(file.integer("pci_msitranslate")),
        power_mgmt=bool(file.integer("pci_power_mgmt")),
        permissive=bool(file.integer("pci_permissive")),
        seize=bool(file.integer("pci_seize")),
    )
    config.pci_devices = [devices.parse_pci(file, spec, defaults) for spec in file.strings("pci")]
    if config.pci_devices and config.type is DomainType.PV:
        config.e820_host = True
    config.passthrough = file.string("passthrough")
    if config.passthrough not in (None, "default", "disabled", "enabled", "sync_pt", "share_pt"):
        raise file.fail(f"ERROR: unknown passthrough option '{config.passthrough}'")


def _read_platform(file: ConfigFile, config: DomainConfig) -> None:
    config.shadow_memory_kib = _mebibytes(file, "shadow_memory")
    config.disable_migrate = file.boolean("nomigrate")
    config.tsc_mode = _tsc_mode(file)
    config.rtc_timeoffset = (file.integer("rtc_timeoffset") or 0) % 2**32
    if file.integer("vncviewer") is not None:
        file.warn(
            'WARNING: ignoring "vncviewer" option. Use "-V" option of "xl create" to automatically spawn vncviewer.'
        )
    config.localtime = file.boolean("localtime")
    config.video_memory_kib = _mebibytes(file, "videoram")
    config.max_event_channels = (file.integer("max_event_channels") or 0) % 2**32


def _tsc_mode(file: ConfigFile) -> TscMode:
    modes = list(TscMode)
    if file.is_integer("tsc_mode"):
        number = file.integer("tsc_mode") or 0
        known = 0 <= number < len(modes)
        example = f'e.g. tsc_mode="{modes[number]}"' if known else ""
        file.warn(
            'WARNING: specifying "tsc_mode" as an integer is deprecated. '
            f"Please use the named parameter variant. {example}"
        )
        if not known:
            raise file.fail(f'ERROR: invalid value {number} for "tsc_mode"')
        return modes[number]
    text = file.string("tsc_mode")
    if text is None:
        return TscMode.DEFAULT
    file.warn(f'got a tsc mode string: "{text}"')
    if text not in modes:
        raise file.fail(f'ERROR: invalid value "{text}" for "tsc_mode"')
    return TscMode(text)


def _read_kernel(file: ConfigFile, config: DomainConfig) -> None:
    config.kernel = file.string("kernel")
    config.ramdisk = file.string("ramdisk")
    config.device_tree = file.string("device_tree")
    config.cmdline = _cmdline(file)
    config.driver_domain = file.boolean("driver_domain")
    config.acpi = file.boolean("acpi")
    config.bootloader = file.string("bootloader")
    config.bootloader_args = _bootloader_args(file)
    if "timer_mode" in file.settings and config.type is DomainType.PV:
        raise file.fail('ERROR: "timer_mode" option is not supported for PV guests.', STATUS_FAIL)
    config.nested_hvm = file.boolean("nestedhvm")
    if config.type is DomainType.HVM:
        return
    firmware = file.string("firmware")
    if firmware is not None:
        if config.kernel is not None:
            raise file.fail("ERROR: both kernel and firmware specified")
        if not ("pvgrub32".startswith(firmware) or "pvgrub64".startswith(firmware)):
            raise file.fail("ERROR: only pvgrub{32|64} supported as firmware options")
        config.kernel = f"{FIRMWARE_DIRECTORY}/{firmware}.bin"
    if config.bootloader is None and config.kernel is None:
        raise file.fail("Neither kernel nor bootloader specified")


def _cmdline(file: ConfigFile) -> str | None:
    cmdline, root, extra = file.string("cmdline"), file.string("root"), file.string("extra")
    if cmdline is not None:
        if root is not None or extra is not None:
            file.warn("Warning: ignoring root= and extra= in favour of cmdline=")
        return cmdline
    if root is None:
        return extra
    return f"root={root}" if extra is None else f"root={root} {extra}"


def _bootloader_args(file: ConfigFile) -> list[str]:
    if "bootloader_args" not in file.settings:
        return []
    if file.is_list("bootloader_args"):
        return file.strings("bootloader_args")
    file.warn('WARNING: Specifying "bootloader_args" as a string is deprecated. Please use a list of arguments.')
    return (file.string("bootloader_args") or "").split()


def _read_hardware(file: ConfigFile, config: DomainConfig) -> None:
    config.altp2m = _altp2m(file)
    config.vmtrace_kib = (file.integer("vmtrace_buf_kb") or 0) if file.is_integer("vmtrace_buf_kb") else 0
    config.vpmu = file.boolean("vpmu")
    config.ioports = [devices.parse_ioport(file, spec) for spec in file.strings("ioports")]
    config.irqs = [devices.parse_irq(file, spec) for spec in file.strings("irqs")]
    config.iomem = [devices.parse_iomem(file, spec) for spec in file.strings("iomem")]


def _altp2m(file: ConfigFile) -> str | None:
    modes = ("disabled", "mixed", "external", "limited")
    if file.is_integer("altp2m"):
        number = file.integer("altp2m") or 0
        if not 0 <= number < len(modes):
            raise file.fail(f'ERROR: invalid value {number} for "altp2m"')
        return modes[number]
    text = file.string("altp2m")
    if text is not None and text not in modes:
        raise file.fail(f'ERROR: invalid value "{text}" for "altp2m"')
    return text


def _read_devices(file: ConfigFile, config: DomainConfig) -> None:
    try:
        config.disks = [parse_disk(file, spec) for spec in file.strings("disk")]
    except DiskSpecError as error:
        raise ConfigError(file.diagnostics) from error
    config.p9_shares = [devices.parse_p9(file, spec) for spec in file.strings("p9")]
    config.channels = [devices.parse_channel(file, spec, devid) for devid, spec in enumerate(file.strings("channel"))]
    config.nics = [parse_vif(file, spec, devid) for devid, spec in enumerate(file.strings("vif"))]
    if file.items("vif2") is not None:
        file.warn("WARNING: vif2: netchannel2 is deprecated and not supported by xl")
    config.framebuffers = [devices.parse_vfb(spec, devid) for devid, spec in enumerate(file.strings("vfb"))]
    config.cpuid = read_cpuid(file)
    _read_device_model(file, config)
    if config.type is DomainType.PV and not config.framebuffers:
        vfb = devices.top_level_vfb(file)
        config.framebuffers = [vfb] if vfb else []
    config.device_model.restrict = file.boolean("dm_restrict")
    config.suspend_evtchn_compat = file.boolean("xend_suspend_evtchn_compat")
    config.msr_relaxed = file.boolean("msr_relaxed")
    if config.msr_relaxed is not None:
        file.warn("WARNING: msr_relaxed will be removed in future versions.")
        file.warn("If it fixes an issue you are having please report to xen-devel@lists.xenproject.org.")


def _read_device_model(file: ConfigFile, config: DomainConfig) -> None:
    model = config.device_model
    ignored = file.string("device_model")
    if ignored is not None:
        file.warn("WARNING: ignoring device_model directive.")
        file.warn('WARNING: Use "device_model_override" instead if you really want a non-default device_model')
        if "stubdom-dm" in ignored and config.type is DomainType.HVM:
            file.warn('WARNING: Or use "device_model_stubdomain_override" if you  want to enable stubdomains')
        elif "stubdom-dm" in ignored:
            file.warn('WARNING: ignoring "device_model_stubdomain_override" directive for pv guest')
    model.path = file.string("device_model_override")
    model.version = file.string("device_model_version")
    if model.version not in (None, "qemu-xen", "qemu-xen-traditional"):
        raise file.fail(f'Unknown device_model_version "{model.version}" specified')
    if model.version is None and model.path is not None:
        file.warn("WARNING: device model override given without specific DM version")
    model.in_stubdomain = file.boolean("device_model_stubdomain_override")
    model.seclabel = file.string("device_model_stubdomain_seclabel")
    model.user = file.string("device_model_user")
    model.stubdomain_kernel = file.string("stubdomain_kernel")
    model.stubdomain_cmdline = file.string("stubdomain_cmdline")
    model.stubdomain_ramdisk = file.string("stubdomain_ramdisk")
    model.stubdomain_memory_kib = _mebibytes(file, "stubdomain_memory")
    model.arguments = _device_model_arguments(file, "device_model_args")
    model.arguments_pv = _device_model_arguments(file, "device_model_args_pv")
    model.arguments_hvm = _device_model_arguments(file, "device_model_args_hvm")


def _device_model_arguments(file: ConfigFile, key: str) -> list[str]:
    arguments = file.strings(key)
    if key in file.settings and not file.is_list(key):
        raise file.fail(f"xl: Unable to parse {key}.", STATUS_FAIL)
    return arguments
