"""What the keys of a configuration file mean, for xl.cfg(5).

`reader` reads them; a test compares the two. Source: xl.cfg(5) of Xen, and what this toolstack makes of them.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Key(NamedTuple):
    """One key: its name, the form of its value, what it does."""

    name: str
    value: str
    text: str


_ENDS = "destroy, restart, rename-restart, preserve, coredump-destroy, coredump-restart or soft-reset"
_AFFINITY = 'CPUs such as "0-3,^1", "node:0" or "all" for every vCPU, or a list with one such string for each.'
_PARAMETER = "A parameter of the schedulers that know it."

GROUPS: Final[dict[str, tuple[Key, ...]]] = {
    "What runs": (
        Key("name", "STRING", "The domain's name, which must be given and be unique."),
        Key("uuid", "UUID", "Its UUID; random when absent."),
        Key("type", "STRING", '"pv", the default. Domains of other types cannot be made here.'),
        Key("builder", "STRING", 'The older form of type: "generic" is a PV domain.'),
        Key("kernel", "PATH", "The kernel: an ELF file or a bzImage that is built for Xen PV."),
        Key("ramdisk", "PATH", "The initial ramdisk."),
        Key("cmdline", "STRING", "The kernel's command line. root and extra are ignored beside it."),
        Key("root", "STRING", 'The file system\'s device: "root=STRING" in the command line.'),
        Key("extra", "STRING", "More for the command line."),
        Key("firmware", "STRING", '"pvgrub32" or "pvgrub64": GRUB for Xen, as Debian installs it, is the kernel.'),
        Key("bootloader", "PROGRAM", "A program that finds the kernel in the disk."),
        Key("bootloader_args", "LIST", "Arguments for that program."),
    ),
    "Memory and processors": (
        Key("memory", "MBYTES", "What it starts with; 32 when absent."),
        Key("maxmem", "MBYTES", "The most it may have; as memory when absent."),
        Key("vcpus", "NUMBER", "How many vCPUs are online at the start; 1 when absent."),
        Key("maxvcpus", "NUMBER", "How many it has, online or not."),
        Key("cpus", "CPUS", f"Where vCPUs may run: {_AFFINITY}"),
        Key("cpus_soft", "CPUS", f"Where they run by preference: {_AFFINITY}"),
        Key("cpu_weight", "NUMBER", "Its share of contended processors, 1 to 65535; 256 is usual."),
        Key("cap", "PERCENT", "The most processor time it gets, in percent of one pCPU; 0 is no cap."),
        Key("period", "NUMBER", _PARAMETER),
        Key("slice", "NUMBER", _PARAMETER),
        Key("latency", "NUMBER", _PARAMETER),
        Key("extratime", "NUMBER", _PARAMETER),
        Key("pool", "STRING", "The cpupool it is in."),
        Key("videoram", "MBYTES", "Written to xenstore; no PV domain has a graphics card."),
        Key("shadow_memory", "MBYTES", "For shadow page tables, which PV domains do without."),
    ),
    "Devices": (
        Key("disk", "LIST", "Virtual block devices, as xl-disk-configuration(5) of Xen describes them."),
        Key("vif", "LIST", "Virtual network interfaces, as xl-network-configuration(5) of Xen describes them."),
        Key("channel", "LIST", '"name=NAME,connection=pty|socket[,path=PATH]": further consoles.'),
        Key("p9", "LIST", '"tag=TAG,path=PATH,security_model=none": shared directories.'),
        Key("vfb", "LIST", "A framebuffer, which needs a device model."),
        Key("pci", "LIST", "PCI devices passed through."),
        *(
            Key(name, "BOOLEAN", "For all of these devices.")
            for name in ("pci_msitranslate", "pci_permissive", "pci_power_mgmt", "pci_seize")
        ),
        Key("ioports", "LIST", "I/O ports passed through."),
        Key("irqs", "LIST", "Interrupts passed through."),
        Key("iomem", "LIST", "Memory-mapped I/O passed through."),
        Key("passthrough", "STRING", "How the IOMMU is used for devices passed through."),
    ),
    "What becomes of it": (
        Key("on_poweroff", "ACTION", f"What happens when it powers off: {_ENDS}. Default: destroy."),
        Key("on_reboot", "ACTION", "The same when it reboots. Default: restart."),
        Key("on_crash", "ACTION", "The same when it crashes. Default: destroy."),
        Key("on_watchdog", "ACTION", "The same when its watchdog was not fed. Default: destroy."),
        Key("on_soft_reset", "ACTION", "The same when it asks for a soft reset. Default: soft-reset."),
    ),
    "Limits and what it sees of the machine": (
        Key("max_grant_frames", "NUMBER", "The most pages of its grant table."),
        Key("max_maptrack_frames", "NUMBER", "The most pages for grants that it maps."),
        Key("max_grant_version", "NUMBER", "The newest version of grant tables it may use."),
        Key("max_event_channels", "NUMBER", "The most event channels; 1023 is usual."),
        Key("tsc_mode", "MODE", "default, native, always_emulate or native_paravirt."),
        Key("localtime", "BOOLEAN", "Whether it gets local time instead of UTC."),
        Key("rtc_timeoffset", "SECONDS", "How far its wall clock is ahead."),
        Key("e820_host", "BOOLEAN", "Whether its memory has the holes of the host's."),
        Key("cpuid", "STRING or LIST", "What CPUID tells it, in libxl's or xend's form."),
        Key("vpmu", "BOOLEAN", "Whether it has performance counters."),
        Key("msr_relaxed", "BOOLEAN", "Whether it may read MSRs that are not known."),
        Key("driver_domain", "BOOLEAN", "Whether back-ends may be in it."),
        Key("nomigrate", "BOOLEAN", "Whether it must stay on this host."),
        Key("seclabel", "LABEL", "Its security label."),
        Key("init_seclabel", "LABEL", "The label while it is built."),
        Key("xend_suspend_evtchn_compat", "BOOLEAN", "Whether the suspend event channel is found in the old place."),
    ),
    "Read, and of use to other kinds of domains alone": (
        *(Key(name, "BOOLEAN", "Without effect for a PV domain.") for name in ("acpi", "hap", "oos", "nestedhvm")),
        Key("altp2m", "MODE", "Without effect for a PV domain when it is disabled."),
        Key("vmtrace_buf_kb", "KBYTES", "Processor trace, which PV domains cannot have."),
        Key("device_tree", "PATH", "For ARM."),
        Key("timer_mode", "NUMBER", "An error for a PV domain, as with xl."),
        *(
            Key(name, "STRING", "Which device model is used, and how; nothing here needs one.")
            for name in (
                "device_model", "device_model_version", "device_model_override", "device_model_user",
                "device_model_args", "device_model_args_pv", "device_model_args_hvm",
                "device_model_stubdomain_override", "device_model_stubdomain_seclabel", "stubdomain_kernel",
                "stubdomain_cmdline", "stubdomain_ramdisk", "stubdomain_memory", "dm_restrict",
            )
        ),
    ),
}  # fmt: skip
