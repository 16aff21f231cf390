"""DISKSPEC: one virtual block device in the words of xl-disk-configuration(5).

A specification is a comma separated list. Bare words fill the slots target, format, vdev and access in this order;
`key=value` sets a parameter by name; `target=` takes the rest of the string, commas included. Old prefixes (`phy:`,
`file:`, `tap:qcow2:`) and the suffix `:cdrom` of a vdev are still understood.

Xen's parser is a flex scanner: at each position the rule that matches the longest text wins, of equals the first.
This module is the same rules, applied in the same way, because errors and odd specifications show the difference.

Virtual device numbers: xen-vbd-interface(7).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from xenolith.toolstack.config.grammar import ConfigFile


class DiskFormat(StrEnum):
    RAW = "raw"
    QCOW = "qcow"
    QCOW2 = "qcow2"
    VHD = "vhd"
    QED = "qed"
    VMDK = "vmdk"  # the rest is not Xen's
    VHDX = "vhdx"
    OVERLAY = "overlay"
    EXTENTS = "extents"
    EMPTY = "empty"  # a drive without a medium


class DiskBackend(StrEnum):
    PHY = "phy"
    TAP = "tap"
    QDISK = "qdisk"
    STANDALONE = "standalone"


class DiskSpecification(StrEnum):
    XEN = "xen"
    VIRTIO = "virtio"


@dataclass(slots=True)
class Disk:
    """One virtual block device. None means that the specification left it to the toolstack."""

    vdev: str | None = None
    target: str | None = None
    format: DiskFormat | None = None
    backend_domain: str | None = None
    backend: DiskBackend | None = None
    specification: DiskSpecification | None = None
    script: str | None = None
    writable: bool = True
    is_cdrom: bool = False
    direct_io_safe: bool = False
    discard: bool | None = None
    # Replication (COLO): carried, so that a configuration survives being printed; nothing here acts on it.
    colo_enable: bool | None = None
    colo_host: str | None = None
    colo_port: int = 0
    colo_export: str | None = None
    active_disk: str | None = None
    hidden_disk: str | None = None


class DiskSpecError(Exception):
    """A specification with errors; the lines have been added to the configuration's diagnostics."""


def parse_disk(file: ConfigFile, spec: str) -> Disk:
    """The disk that `spec` describes."""
    scanner = _Scanner(file, spec)
    scanner.scan()
    scanner.complete()
    if scanner.failed:
        raise DiskSpecError(spec)
    return scanner.disk


def virtual_device(vdev: str) -> int | None:
    """The number by which guest and backend know the device `vdev`; None if there is none for it.

    xvd* and d<n>p<m> use major 202 with 16 devices per disk while disk and partition fit, else the extended form
    1<<28 | disk<<8 | partition; hd* and sd* use the majors that Linux gave IDE and SCSI disks.
    """
    if re.fullmatch(r"0[xX][0-9a-fA-F]+|[0-9]+", vdev):
        number = int(vdev, 16 if vdev[:2].lower() == "0x" else 10)
        return number if number < 2**32 else None
    if match := re.fullmatch(r"d([0-9]+)(?:p([0-9]+))?", vdev):
        return _xvd(int(match[1]), int(match[2] or 0))
    match = re.fullmatch(r"(xvd|hd|sd)([a-z]{1,4})([0-9]{0,7})", vdev)
    if match is None:
        return None
    disk, partition = _letters(match[2]), int(match[3] or 0)
    if match[1] == "xvd":
        return _xvd(disk, partition)
    if match[1] == "sd":
        return 8 << 8 | disk << 4 | partition if disk < 16 and partition < 16 else None
    if disk < 2:
        return 3 << 8 | disk << 6 | partition if partition < 64 else None
    return 22 << 8 | (disk - 2) << 6 | partition if disk < 4 and partition < 64 else None


def _letters(letters: str) -> int:
    """a is 0, z is 25, aa is 26."""
    number = 0
    for letter in letters:
        number = number * 26 + ord(letter) - ord("a") + 1
    return number - 1


def _xvd(disk: int, partition: int) -> int | None:
    if disk < 16 and partition < 16:
        return 202 << 8 | disk << 4 | partition
    return 1 << 28 | disk << 8 | partition if disk < 2**20 and partition < 256 else None


_Choice = TypeVar("_Choice", DiskFormat, DiskBackend, DiskSpecification)

_Rule = tuple[re.Pattern[str], str]


def _rules(*rules: tuple[str, str]) -> tuple[_Rule, ...]:
    return tuple((re.compile(pattern), action) for pattern, action in rules)


# A group named `token` is what the rule consumes; the rest is context, which counts for the longest match.
_RULES = _rules(
    (r"(?P<token>[ \t\n]+)(?:[^ \t\n].*)?", "blank"),
    (r"format=[^,]*,?", "set_format"),
    (r"cdrom,?|devtype=cdrom,?", "set_cdrom"),
    (r"devtype=disk,?", "set_disk"),
    (r"devtype=[^,]*,?", "unknown_type"),
    (r"access=[^,]*,?", "set_access"),
    (r"backend=[^,]*,?", "set_backend_domain"),
    (r"backendtype=[^,]*,?", "set_backend"),
    (r"specification=[^,]*,?", "set_specification"),
    (r"vdev=[^,]*,?", "set_vdev"),
    (r"script=[^,]*,?", "set_script"),
    (r"direct-io-safe,?", "set_direct_io_safe"),
    (r"(?:no-)?discard,?", "set_discard"),
    (r"(?:no-)?colo,?", "set_colo"),
    (r"colo-host=[^,]*,?", "set_colo_host"),
    (r"colo-port=[^,]*,?", "set_colo_port"),
    (r"colo-export=[^,]*,?", "set_colo_export"),
    (r"active-disk=[^,]*,?", "set_active_disk"),
    (r"hidden-disk=[^,]*,?", "set_hidden_disk"),
    (r"target=.*", "set_target"),
    (r"[a-z][-a-z0-9]*=[^,],?", "unknown_parameter"),
    (r"(?P<token>(?:raw|qcow2?|vhd):).*", "format_prefix"),
    (r"(?P<token>(?:iscsi|e?nbd|drbd):).*", "script_prefix"),
    (r"(?P<token>(?:tapdisk|tap2?|aio|ioemu|file|phy):).*", "ignored_prefix"),
    (r"(?P<token>[a-z][a-z0-9]*:)(?:[^a-z0-9].*)?", "unknown_prefix"),
    (r"[^=,]*,|[^=,]+,?", "positional"),
)


class _Stop(Exception):
    """Nothing after this is worth a message."""


class _Scanner:
    """Reads one specification into `disk`, reporting into the configuration's diagnostics."""

    def __init__(self, file: ConfigFile, spec: str) -> None:
        self.disk = Disk()
        self.failed = False
        self._file = file
        self._spec = spec
        self._prefixed = False
        self._access_given = False

    def scan(self) -> None:
        position = 0
        try:
            while position < len(self._spec):
                matches = [(rule[0].match(self._spec, position), rule[1]) for rule in _RULES]
                found = [(match, action) for match, action in matches if match]
                if not found:
                    if position < len(self._spec) - 1:  # as xl: a stray last character goes unnoticed
                        self._error("bad disk syntax", self._spec[position:])
                    return
                match, action = max(found, key=lambda pair: pair[0].end())
                token = match.groupdict().get("token") or match[0]
                position += len(token)
                method: Callable[[str], None] = getattr(self, action)
                method(token)
        except _Stop:
            pass

    def complete(self) -> None:
        """Defaults, and what no specification may lack."""
        if self.failed:
            return
        disk = self.disk
        disk.format = disk.format or DiskFormat.RAW
        if disk.is_cdrom:
            disk.writable = False
            if not disk.target:
                disk.format = DiskFormat.EMPTY
        if disk.vdev is None:
            self._error("no vdev specified")
        elif disk.target is None and not disk.is_cdrom:
            self._error("no target specified (and device not removable)")

    def _error(self, message: str, near: str | None = None) -> None:
        where = "" if near is None else f": near `{near}'"
        self._file.warn(
            f"{self._file.source}: config parsing error in disk specification: {message}{where} in `{self._spec}'"
        )
        self.failed = True

    # One method per rule. `token` still has the comma that ended it.

    def blank(self, token: str) -> None:
        """Blanks before a parameter mean nothing."""

    def set_format(self, token: str) -> None:
        self._format(_value(token))

    def set_cdrom(self, token: str) -> None:
        self.disk.is_cdrom = True

    def set_disk(self, token: str) -> None:
        self.disk.is_cdrom = False

    def unknown_type(self, token: str) -> None:
        self._error("unknown value for type", token)

    def set_access(self, token: str) -> None:
        self._access(_value(token))

    def set_backend_domain(self, token: str) -> None:
        self.disk.backend_domain = self._once("backend", self.disk.backend_domain, _value(token))

    def set_backend(self, token: str) -> None:
        name = _value(token)
        if name not in DiskBackend.__members__.values():
            self._error("unknown value for backendtype", name)
        else:
            self.disk.backend = self._choose("backend", self.disk.backend, DiskBackend(name))

    def set_specification(self, token: str) -> None:
        name = _value(token)
        if name not in DiskSpecification.__members__.values():
            self._error("unknown value for specification", name)
        else:
            chosen = DiskSpecification(name)
            self.disk.specification = self._choose("specification", self.disk.specification, chosen)

    def set_vdev(self, token: str) -> None:
        self.disk.vdev = self._once("vdev", self.disk.vdev, _value(token))

    def set_script(self, token: str) -> None:
        self.disk.script = self._once("script", self.disk.script, _value(token))

    def set_direct_io_safe(self, token: str) -> None:
        self.disk.direct_io_safe = True

    def set_discard(self, token: str) -> None:
        self.disk.discard = not token.startswith("no-")

    def set_colo(self, token: str) -> None:
        self.disk.colo_enable = not token.startswith("no-")

    def set_colo_host(self, token: str) -> None:
        self.disk.colo_host = self._once("colo-host", self.disk.colo_host, _value(token))

    def set_colo_port(self, token: str) -> None:
        digits = re.match(r"[ \t]*[+-]?[0-9]{1,9}", _value(token))
        self.disk.colo_port = int(digits[0]) if digits else 0
        if not self.disk.colo_port:
            self._error("unknown value for colo_port", _value(token))

    def set_colo_export(self, token: str) -> None:
        self.disk.colo_export = self._once("colo-export", self.disk.colo_export, _value(token))

    def set_active_disk(self, token: str) -> None:
        self.disk.active_disk = self._once("active-disk", self.disk.active_disk, _value(token))

    def set_hidden_disk(self, token: str) -> None:
        self.disk.hidden_disk = self._once("hidden-disk", self.disk.hidden_disk, _value(token))

    def set_target(self, token: str) -> None:
        self.disk.target = self._once("target", self.disk.target, _value(token))

    def unknown_parameter(self, token: str) -> None:
        self._error("unknown parameter", token)

    def format_prefix(self, token: str) -> None:
        self._prefixed = True
        self._format(token.removesuffix(":"))

    def script_prefix(self, token: str) -> None:
        self._prefixed = True
        self.disk.script = self._once("script", self.disk.script, "block-" + token.removesuffix(":"))

    def ignored_prefix(self, token: str) -> None:
        self._prefixed = True

    def unknown_prefix(self, token: str) -> None:
        self._error("unknown deprecated disk prefix", token)
        raise _Stop

    def positional(self, token: str) -> None:
        word, disk = token.removesuffix(","), self.disk
        if self.failed:
            return
        if disk.target is None:
            disk.target = word
        elif not self._prefixed and disk.format is None:
            if disk.target == "" and self._vdev_with_type(word):
                disk.format = DiskFormat.EMPTY
            else:
                self._format(word)
        elif disk.vdev is None:
            if not self._vdev_with_type(word):
                disk.vdev = word
        elif not self._access_given:
            self._access_given = True
            self._access(word)
        else:
            self._error("too many positional parameters", word)
            raise _Stop

    # What several rules do.

    def _once(self, what: str, previous: str | None, value: str) -> str | None:
        """`value`, unless the parameter was already given as something else than the empty string."""
        if previous:
            self._error(f"{what} respecified", value)
            return previous
        return value

    def _choose(self, what: str, previous: _Choice | None, value: _Choice) -> _Choice:
        if previous is not None and previous is not value:
            self._error(f"{what} respecified", value)
            return previous
        return value

    def _format(self, name: str) -> None:
        if name and name not in DiskFormat.__members__.values():
            self._error("unknown value for format", name)
        else:
            chosen = DiskFormat(name or "raw")
            if self.disk.format not in (None, chosen):
                self._error("format respecified", name)
            else:
                self.disk.format = chosen

    def _access(self, name: str) -> None:
        if name in ("r", "ro"):
            self.disk.writable = False
        elif name in ("rw", "w", ""):
            self.disk.writable = True
        else:
            self._error("unknown value for access", name)

    def _vdev_with_type(self, word: str) -> bool:
        """Take the old form vdev:type; False if it is not one."""
        vdev, colon, kind = word.rpartition(":")
        if not colon:
            return False
        self.disk.vdev = self._once("vdev", self.disk.vdev, vdev)
        if kind in ("cdrom", "disk"):
            self.disk.is_cdrom = kind == "cdrom"
        else:
            self._error("unknown deprecated type", kind)
        return True


def _value(token: str) -> str:
    """What stands after '=', without the comma that ended it."""
    return token.removesuffix(",").partition("=")[2]
