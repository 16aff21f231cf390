"""The smaller device specifications of xl.cfg(5): channel, p9, vfb, pci, ioports, irqs and iomem.

Disks and network interfaces have modules of their own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from xenolith.toolstack.config.grammar import ConfigError, ConfigFile

_UINT32_MAX = 2**32 - 1

STATUS_FAIL, STATUS_INVALID = 3, 6  # xl exits with the negated libxl error


@dataclass(slots=True)
class Channel:
    """An extra console ring with a name, carried to a pty or a socket of the host."""

    devid: int
    name: str | None = None
    connection: str = ""  # "pty" or "socket"
    path: str | None = None  # of the socket
    backend_domain: str | None = None


@dataclass(slots=True)
class P9Share:
    """A directory of the host that the guest mounts over Xen 9pfs."""

    tag: str
    path: str
    security_model: str
    backend_domain: str | None = None
    writable: bool = True  # ours: ro=1 says no


@dataclass(slots=True)
class Display:
    """How a framebuffer is shown: the vnc or the sdl half of a vfb."""

    enable: bool | None = None
    listen: str | None = None
    password: str | None = None
    display: int = 0
    find_unused: bool | None = None
    opengl: bool | None = None
    x_display: str | None = None
    xauthority: str | None = None


@dataclass(slots=True)
class VirtualFramebuffer:
    """A paravirtual framebuffer with its keyboard."""

    devid: int
    vnc: Display = field(default_factory=Display)
    sdl: Display = field(default_factory=Display)
    keymap: str | None = None


@dataclass(slots=True)
class PciDevice:
    """A PCI device of the host to hand through."""

    domain: int = 0
    bus: int = 0
    device: int = 0
    function: int = 0
    virtual_slot: int = 0  # as a devfn
    all_functions: bool = False
    msitranslate: bool = False
    power_mgmt: bool = False
    permissive: bool = False
    seize: bool = False
    rdm_policy: str = "strict"


@dataclass(slots=True)
class PortRange:
    first: int
    number: int


@dataclass(slots=True)
class IomemRange:
    """Host frames to map, at `gfn` or, if None, at the same numbers."""

    start: int
    number: int
    gfn: int | None = None


def parse_channel(file: ConfigFile, spec: str, devid: int) -> Channel:
    channel = Channel(devid)
    path: str | None = None
    for pair in filter(None, spec.split(",")):
        key, _, value = pair.lstrip("=").partition("=")
        value = value.lstrip("=").partition("=")[0]
        if not key or not value:
            raise file.fail(f"failed to parse channel configuration: {pair}")
        key, value = key.strip(), value.strip()
        if key == "backend":
            channel.backend_domain = value
        elif key == "name":
            channel.name = value
        elif key == "path":
            path = value
        elif key != "connection":
            file.warn(f"unknown channel parameter '{key}', ignoring")
        elif value in ("pty", "socket"):
            channel.connection = value
        else:
            raise file.fail(f"unknown channel connection '{value}'")
    if not channel.connection:
        raise file.fail("channel has unknown 'connection'")
    if channel.connection == "socket":
        if path is None:
            raise file.fail("channel connection 'socket' requires path=..")
        channel.path = path
    return channel


def parse_p9(file: ConfigFile, spec: str) -> P9Share:
    given: dict[str, str] = {}
    for word in filter(None, spec.split(",")):
        key, equals, value = word.lstrip(" ").partition("=")
        if not equals:
            break
        if key not in ("tag", "path", "security_model", "backend", "ro"):
            raise file.fail(f"Unknown string `{key}' in 9pfs spec")
        given[key] = value
    if not {"tag", "path", "security_model"} <= given.keys():
        raise file.fail("9pfs spec missing required field!")
    if given.get("ro", "0") not in ("0", "1"):
        raise file.fail(f"9pfs spec: ro={given['ro']} is neither 0 nor 1")
    writable = given.get("ro") != "1"
    return P9Share(given["tag"], given["path"], given["security_model"], given.get("backend"), writable)


def parse_vfb(spec: str, devid: int) -> VirtualFramebuffer:
    """The framebuffer that `spec` describes; unknown keys mean nothing."""
    vfb = VirtualFramebuffer(devid)
    for word in filter(None, spec.split(",")):
        key, equals, value = word.lstrip(" ").partition("=")
        if not equals:
            break
        _set_vfb(vfb, key, value)
    return vfb


def _set_vfb(vfb: VirtualFramebuffer, key: str, value: str) -> None:
    if key == "vnc":
        vfb.vnc.enable = _atoi(value) != 0
    elif key == "vnclisten":
        vfb.vnc.listen = value
    elif key == "vncpasswd":
        vfb.vnc.password = value
    elif key == "vncdisplay":
        vfb.vnc.display = _atoi(value)
    elif key == "vncunused":
        vfb.vnc.find_unused = _atoi(value) != 0
    elif key == "keymap":
        vfb.keymap = value
    elif key == "sdl":
        vfb.sdl.enable = _atoi(value) != 0
    elif key == "opengl":
        vfb.sdl.opengl = _atoi(value) != 0
    elif key == "display":
        vfb.sdl.x_display = value
    elif key == "xauthority":
        vfb.sdl.xauthority = value


def top_level_vfb(file: ConfigFile) -> VirtualFramebuffer | None:
    """The framebuffer that the keys vnc, vnclisten, ... outside of any vfb ask for."""
    if not file.integer("vnc"):
        return None
    vnc = Display(
        enable=file.boolean("vnc"),
        listen=file.string("vnclisten"),
        password=file.string("vncpasswd"),
        display=file.integer("vncdisplay") or 0,
        find_unused=file.boolean("vncunused"),
    )
    sdl = Display(
        enable=file.boolean("sdl"),
        opengl=file.boolean("opengl"),
        x_display=file.string("display"),
        xauthority=file.string("xauthority"),
    )
    return VirtualFramebuffer(0, vnc, sdl, file.string("keymap"))


_BDF = re.compile(
    r"(?:(?P<domain>[0-9a-fA-F]{1,4}):)?(?P<bus>[0-9a-fA-F]{1,2}):(?P<device>[0-9a-fA-F]{1,2})"
    r"\.(?P<function>[0-7]|\*)(?:@(?P<slot>[0-9a-fA-F]{1,2}))?"
)


def parse_pci(file: ConfigFile, spec: str, defaults: PciDevice) -> PciDevice:
    """[DOMAIN:]BUS:DEVICE.FUNCTION[@SLOT] or bdf=..., then options; `defaults` are the pci_* keys."""
    device = PciDevice(
        msitranslate=defaults.msitranslate,
        power_mgmt=defaults.power_mgmt,
        permissive=defaults.permissive,
        seize=defaults.seize,
    )
    place, *options = spec.split(",")
    bdf = _BDF.fullmatch(place.removeprefix("bdf="))
    if bdf is None or int(bdf["device"], 16) > 31:
        raise _pci_error(file, spec, "", STATUS_INVALID)
    device.domain = int(bdf["domain"] or "0", 16)
    device.bus = int(bdf["bus"], 16)
    device.device = int(bdf["device"], 16)
    device.all_functions = bdf["function"] == "*"
    device.function = 0 if device.all_functions else int(bdf["function"])
    device.virtual_slot = int(bdf["slot"] or "0", 16) << 3
    for option in options:
        _pci_option(file, spec, device, option)
    return device


def _pci_option(file: ConfigFile, spec: str, device: PciDevice, option: str) -> None:
    key, equals, value = option.partition("=")
    if not equals:
        raise _pci_error(file, spec, "", STATUS_INVALID)
    if key in ("msitranslate", "power_mgmt", "permissive", "seize"):
        setattr(device, key, _atoi(value) != 0)
    elif key == "vslot":
        if not re.fullmatch(r"[0-9a-fA-F]{1,2}", value):
            raise _pci_error(file, spec, "", STATUS_INVALID)
        device.virtual_slot = int(value, 16) << 3
    elif key != "rdm_policy":
        raise _pci_error(file, spec, f"Unknown PCI_SPEC_STRING option: {key}", STATUS_INVALID)
    elif value in ("strict", "relaxed"):
        device.rdm_policy = value
    else:
        raise _pci_error(file, spec, f"Unknown RDM policy: {value}", STATUS_FAIL)


def _pci_error(file: ConfigFile, spec: str, reason: str, status: int) -> ConfigError:
    # xl prints no newline between the two.
    return file.fail(f"{reason}unable to parse PCI_SPEC_STRING `{spec}' for passthrough", status)


def parse_ioport(file: ConfigFile, spec: str) -> PortRange:
    """Hexadecimal FIRST or FIRST-LAST."""
    first = re.match(r"(?:0[xX])?([0-9a-fA-F]+)", spec)
    if first is None:
        raise file.fail(f"xl: Invalid argument parsing ioport: {spec}")
    start = end = _port(file, first[1])
    rest = spec[first.end() :]
    if rest.startswith("-"):
        last = re.fullmatch(r"(?:0[xX])?([0-9a-fA-F]+)", rest[1:])
        if last is None:
            raise file.fail(f"xl: Invalid argument parsing ioport: {spec}")
        end = _port(file, last[1])
    elif rest:
        file.warn(f"xl: Invalid argument parsing ioport: {spec}")
    return PortRange(start, (end - start + 1) % 2**32)


def _port(file: ConfigFile, digits: str) -> int:
    number = int(digits, 16)
    if number >= _UINT32_MAX:
        raise file.fail(f"xl: ioport {number:x} too big")
    return number


def parse_irq(file: ConfigFile, spec: str) -> int:
    if not re.fullmatch(r"[ \t]*\+?[0-9]{1,19}", spec):
        raise file.fail(f"xl: Invalid argument parsing irq: {spec}")
    if int(spec) >= _UINT32_MAX:
        raise file.fail(f"xl: irq {int(spec):x} too big")
    return int(spec)


def parse_iomem(file: ConfigFile, spec: str) -> IomemRange:
    """Hexadecimal START,NUMBER[@GFN], in frames."""
    match = re.fullmatch(r"([0-9a-fA-F]{1,16}),([0-9a-fA-F]{1,16})(?:@([0-9a-fA-F]{1,16}))?", spec)
    if match is None:
        raise file.fail(f"xl: Invalid argument parsing iomem: {spec}")
    return IomemRange(int(match[1], 16), int(match[2], 16), int(match[3], 16) if match[3] else None)


def _atoi(text: str) -> int:
    match = re.match(r"[ \t]*([+-]?[0-9]{1,9})", text)
    return int(match[1]) if match else 0
