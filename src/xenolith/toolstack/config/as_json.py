"""A DomainConfig as the JSON that `xl create -n` and `xl list -l` print.

libxl prints a structure field by field and leaves out what still has its default; structures themselves are always
there. Booleans with three states are the strings "True" and "False", enumerations their names. The layout is that of
the yajl library: four spaces, and an empty object or array takes three lines.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeAlias

from xenolith.toolstack.config.cpuid import REGISTERS, CpuidPolicy
from xenolith.toolstack.config.devices import Channel, Display, P9Share, PciDevice, VirtualFramebuffer
from xenolith.toolstack.config.disk import Disk
from xenolith.toolstack.config.domain import Action, DeviceModel, DomainConfig, DomainType, TscMode
from xenolith.toolstack.config.vif import Nic

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | bool | None"

_ALL_FUNCTIONS = 2**32 - 1
_ANY_DOMID = 2**32 - 1
_SCHED_DEFAULT = -1  # a scheduler parameter that was not given

_ACTION_NAMES = {action: action.value.replace("-", "_") for action in Action}
_ACTION_NAMES[Action.RENAME_RESTART] = "restart_rename"


def domain_config_json(config: DomainConfig) -> dict[str, Json]:
    """The object that xl prints for a configuration."""
    document: dict[str, Json] = {"c_info": _create_info(config), "b_info": _build_info(config)}
    document |= _lists(
        disks=[_disk(disk) for disk in config.disks],
        nics=[_nic(nic) for nic in config.nics],
        pcidevs=[_pci(device) for device in config.pci_devices],
        vfbs=[_vfb(vfb) for vfb in config.framebuffers],
        vkbs=[{"devid": vfb.devid} for vfb in config.framebuffers],
        p9s=[_p9(share) for share in config.p9_shares],
        channels=[_channel(channel) for channel in config.channels],
    )
    for key, action in (
        ("on_poweroff", config.on_poweroff),
        ("on_reboot", config.on_reboot),
        ("on_watchdog", config.on_watchdog),
        ("on_crash", config.on_crash),
        ("on_soft_reset", config.on_soft_reset),
    ):
        if action is not Action.DESTROY:
            document[key] = _ACTION_NAMES[action]
    return document


def live_config_json(config: DomainConfig, domid: int, scheduler: str) -> dict[str, Json]:
    """The configuration of a domain that exists, as `xl list -l` prints it: with what it was given in the end.

    The domid inside c_info is not the domain's: libxl prints the number that means "any", and so do we.
    """
    filled = replace(
        config,
        vcpus=config.vcpus_online,
        max_vcpus=config.vcpus_ceiling,
        target_memory_kib=config.memory_kib,
        max_memory_kib=config.memory_ceiling_kib,
        video_memory_kib=0,
        scheduler=replace(config.scheduler, weight=config.scheduler.weight or 256, cap=config.scheduler.cap or 0),
        cmdline=config.cmdline or "",
        msr_relaxed=bool(config.msr_relaxed),
    )
    document = domain_config_json(filled)
    create, build = document["c_info"], document["b_info"]
    assert isinstance(create, dict)
    assert isinstance(build, dict)
    build["sched_params"] = {"sched": scheduler, **_scheduler(filled)}
    if domid == 0:
        kept = ("max_memkb", "target_memkb", "sched_params", "type.pv")
        shown: dict[str, Json] = {name: build[name] for name in kept}
        return {
            "c_info": {"type": create["type"], "name": create["name"]},
            "b_info": shown | {"arch_arm": {}, "arch_x86": {}},
        }
    up_to_name = list(create)[: list(create).index("name") + 1]
    document["c_info"] = {name: create[name] for name in up_to_name} | {"domid": _ANY_DOMID} | create
    return document


def _create_info(config: DomainConfig) -> dict[str, Json]:
    return {"type": config.type.value} | _given(
        hap=_boolean(config.hap),
        oos=_boolean(config.out_of_sync_page_tables),
        ssid_label=config.init_seclabel,
        name=config.name,
        uuid=str(config.uuid) if config.uuid.int else None,
        pool_name=config.pool,
        run_hotplug_scripts="True",
        driver_domain=_boolean(config.driver_domain),
        passthrough=None if config.passthrough == "default" else config.passthrough,
        xend_suspend_evtchn_compat=_boolean(config.suspend_evtchn_compat),
    )


def _build_info(config: DomainConfig) -> dict[str, Json]:
    document = _given(max_vcpus=config.max_vcpus or None)
    document |= _lists(
        avail_vcpus=list(range(config.vcpus or 0)),
        vcpu_hard_affinity=[_cpus(cpus) for cpus in config.hard_affinity or []],
        vcpu_soft_affinity=[_cpus(cpus) for cpus in config.soft_affinity or []],
    )
    document |= _given(
        numa_placement=_boolean(config.numa_placement),
        tsc_mode=None if config.tsc_mode is TscMode.DEFAULT else config.tsc_mode.value,
        max_memkb=config.max_memory_kib,
        target_memkb=config.target_memory_kib,
        video_memkb=config.video_memory_kib,
        shadow_memkb=config.shadow_memory_kib,
        rtc_timeoffset=config.rtc_timeoffset or None,
        exec_ssid_label=config.seclabel,
        localtime=_boolean(config.localtime),
        disable_migrate=_boolean(config.disable_migrate),
        cpuid=_cpuid(config.cpuid),
        max_grant_frames=config.max_grant_frames,
        max_maptrack_frames=config.max_maptrack_frames,
        max_grant_version=config.max_grant_version,
    )
    document |= _device_model(config.device_model)
    document["sched_params"] = _scheduler(config)
    document |= _lists(
        ioports=[{"first": ports.first, "number": ports.number} for ports in config.ioports],
        irqs=list(config.irqs),
        iomem=[_given(start=range_.start, number=range_.number, gfn=range_.gfn) for range_ in config.iomem],
    )
    document |= _given(
        claim_mode="True",
        event_channels=config.max_event_channels or None,
        kernel=config.kernel,
        cmdline=config.cmdline,
        ramdisk=config.ramdisk,
        device_tree=config.device_tree,
        acpi=_boolean(config.acpi),
        bootloader=config.bootloader,
    )
    document |= _lists(bootloader_args=list(config.bootloader_args))
    document |= _given(nested_hvm=_boolean(config.nested_hvm), dm_restrict=_boolean(config.device_model.restrict))
    document |= _by_type(config)
    document["arch_arm"] = {}
    document["arch_x86"] = _given(msr_relaxed=_boolean(config.msr_relaxed))
    return document | _given(
        altp2m=None if config.altp2m == "disabled" else config.altp2m,
        vmtrace_buf_kb=config.vmtrace_kib or None,
        vpmu=_boolean(config.vpmu),
    )


def _device_model(model: DeviceModel) -> dict[str, Json]:
    document = _given(
        device_model_version=model.version and model.version.replace("-", "_"),
        device_model_stubdomain=_boolean(model.in_stubdomain),
        stubdomain_memkb=model.stubdomain_memory_kib,
        stubdomain_kernel=model.stubdomain_kernel,
        stubdomain_cmdline=model.stubdomain_cmdline,
        stubdomain_ramdisk=model.stubdomain_ramdisk,
        device_model=model.path,
        device_model_ssid_label=model.seclabel,
        device_model_user=model.user,
    )
    return document | _lists(
        extra=list(model.arguments), extra_pv=list(model.arguments_pv), extra_hvm=list(model.arguments_hvm)
    )


def _by_type(config: DomainConfig) -> dict[str, Json]:
    if config.type is DomainType.PV:
        return {"type.pv": _given(e820_host=_boolean(config.e820_host))}
    if config.type is DomainType.PVH:
        return {"type.pvh": {}}
    return {"type.hvm": {"vga": {}, "vnc": {}, "sdl": {}, "spice": {}, "rdm": {}}}


def _scheduler(config: DomainConfig) -> dict[str, Json]:
    given = config.scheduler
    values = _given(
        weight=given.weight,
        cap=given.cap,
        period=given.period,
        extratime=given.extratime,
        slice=given.slice,
        latency=given.latency,
    )
    return {name: value for name, value in values.items() if value != _SCHED_DEFAULT}


def _cpuid(policy: CpuidPolicy) -> dict[str, Json] | None:
    if not policy.leaves and not policy.msrs:
        return None
    leaves: list[Json] = []
    for leaf in policy.leaves:
        entry: dict[str, Json] = {"leaf": leaf.leaf}
        if leaf.subleaf is not None:
            entry["subleaf"] = leaf.subleaf
        leaves.append(entry | {register: leaf.policy[register] for register in REGISTERS if register in leaf.policy})
    return {"cpuid": leaves, "msr": [{"index": msr.index, "policy": msr.policy} for msr in policy.msrs]}


def _disk(disk: Disk) -> Json:
    return _given(
        backend_domname=disk.backend_domain,
        pdev_path=disk.target,
        vdev=disk.vdev,
        backend=disk.backend,
        format=disk.format,
        script=disk.script,
        removable=int(disk.is_cdrom) or None,
        readwrite=int(disk.writable) or None,
        is_cdrom=int(disk.is_cdrom) or None,
        direct_io_safe=disk.direct_io_safe or None,
        discard_enable=_boolean(disk.discard),
        specification=disk.specification,
        colo_enable=_boolean(disk.colo_enable),
        colo_host=disk.colo_host,
        colo_port=disk.colo_port or None,
        colo_export=disk.colo_export,
        active_disk=disk.active_disk,
        hidden_disk=disk.hidden_disk,
    )


def _nic(nic: Nic) -> Json:
    return _given(
        backend_domname=nic.backend_domain,
        devid=nic.devid,
        mtu=nic.mtu or None,
        model=nic.model,
        mac=nic.mac_text,
        ip=nic.ip,
        bridge=nic.bridge,
        ifname=nic.ifname,
        script=nic.script,
        nictype=nic.nictype,
        rate_bytes_per_interval=nic.rate_bytes_per_interval or None,
        rate_interval_usecs=nic.rate_interval_us or None,
        gatewaydev=nic.gatewaydev,
        trusted=_boolean(nic.trusted),
    )


def _pci(device: PciDevice) -> Json:
    return _given(
        func=device.function or None,
        dev=device.device or None,
        bus=device.bus or None,
        domain=device.domain or None,
        vdevfn=device.virtual_slot or None,
        vfunc_mask=_ALL_FUNCTIONS if device.all_functions else 1,
        msitranslate=device.msitranslate or None,
        power_mgmt=device.power_mgmt or None,
        permissive=device.permissive or None,
        seize=device.seize or None,
        rdm_policy=device.rdm_policy,
    )


def _vfb(vfb: VirtualFramebuffer) -> Json:
    document: dict[str, Json] = {"devid": vfb.devid, "vnc": _display(vfb.vnc), "sdl": _display(vfb.sdl)}
    return document | _given(keymap=vfb.keymap)


def _display(display: Display) -> dict[str, Json]:
    document = _given(enable=_boolean(display.enable), listen=display.listen, passwd=display.password)
    document |= _given(display=display.display or None, findunused=_boolean(display.find_unused))
    document |= _given(opengl=_boolean(display.opengl), xauthority=display.xauthority)
    if display.x_display is not None:
        xauthority = document.pop("xauthority", None)
        document |= _given(display=display.x_display, xauthority=xauthority)
    return document


def _p9(share: P9Share) -> Json:
    return _given(
        backend_domname=share.backend_domain,
        tag=share.tag,
        path=share.path,
        security_model=share.security_model,
        ro=None if share.writable else "True",
    )


def _channel(channel: Channel) -> Json:
    document = _given(backend_domname=channel.backend_domain, devid=channel.devid, name=channel.name)
    document[f"connection.{channel.connection}"] = _given(path=channel.path)
    return document


def _given(**fields: Json) -> dict[str, Json]:
    """The fields that are not None, in order."""
    return {name: value for name, value in fields.items() if value is not None}


def _lists(**fields: list[Json]) -> dict[str, Json]:
    """The lists that are not empty, in order."""
    return {name: value for name, value in fields.items() if value}


def _cpus(cpus: frozenset[int]) -> list[Json]:
    return [*sorted(cpus)]


def _boolean(value: bool | None) -> str | None:
    return None if value is None else str(value)


def render(value: Json) -> str:
    """JSON text in yajl's layout, with a newline at the end."""
    return _render(value, "") + "\n"


def _render(value: Json, indent: str) -> str:
    inner = indent + "    "
    if isinstance(value, dict):
        members = [f"{inner}{_string(name)}: {_render(member, inner)}" for name, member in value.items()]
        return "{\n" + ",\n".join(members) + f"\n{indent}}}"
    if isinstance(value, list):
        return "[\n" + ",\n".join(inner + _render(item, inner) for item in value) + f"\n{indent}]"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else str(value)


_SHORT_ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _string(text: str) -> str:
    """A JSON string as yajl writes it: only what must be escaped is, with upper-case hexadecimal digits."""
    return '"' + "".join(map(_escape, text)) + '"'


def _escape(character: str) -> str:
    if character in _SHORT_ESCAPES:
        return _SHORT_ESCAPES[character]
    # yajl leaves the second as they are, which command terminals too, and the third, which stand for bytes of no UTF-8.
    if character < " " or "\x7f" <= character <= "\x9f" or "\ud800" <= character <= "\udfff":
        return f"\\u{ord(character):04X}"
    return character
