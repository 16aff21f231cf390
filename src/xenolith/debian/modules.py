"""A kernel's modules, taken by name out of its package with what they depend on, to be put into an initramfs.

Debian's kernels have xenbus and the console built in; front-ends (xen-blkfront, xen-netfront, 9pnet_xen), file systems
and what these use are modules.  A package holds some 4,000 of them, most of them drivers of hardware, which a PV guest
does not have; the rest is kept in the cache, beside the kernel.

    kernel_modules(obtain("6.1"), ["xen-blkfront", "ext4"])

gives the archive's nodes: the modules and those they depend on under /lib/modules/RELEASE, decompressed, with the
tables that modprobe reads (modules.dep, .alias, .softdep of depmod(8)).  So our /init finds a device's driver by the
alias in sysfs, and the kernel finds a file system's when that is mounted.  Dependencies are what the modules say in
their own .modinfo section; a soft one ("pre: crypto-crc32c") means whichever module has that alias.
"""

from __future__ import annotations

import json
import lzma
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final

import zstandard

from xenolith.debian.initramfs import Node
from xenolith.debian.packages import DebianGuest, GuestUnavailable, kernel_package_files, locked

DEVICE_MODULES: Final = ("xen-blkfront", "xen-netfront", "9pnet_xen", "9p", "ext4", "overlay", "squashfs")
"""What a guest with disks, a network and a shared directory needs; a flavour may lack some (9p: the cloud kernel)."""

_WITHIN: Final = re.compile(
    r"\./(?:usr/)?lib/modules/(?P<release>[^/]+)/(?P<path>modules\.builtin|kernel/.+\.ko(?:\.xz|\.zst)?)"
)
_WITHOUT_HARDWARE: Final = re.compile(
    r"modules\.builtin|kernel/(?:arch|block|crypto|fs|lib|mm|net|security)/.+"
    r"|kernel/drivers/(?:block|cdrom|md|xen)/.+|kernel/drivers/(?:net|scsi)/[^/]+"
)
_MODINFO: Final = re.compile(rb"(?:\A|\0)(depends|softdep|alias)=([^\0]*)(?=\0)")


@dataclass(frozen=True)
class Module:
    """What modinfo tells of a module. `path` is below /lib/modules/RELEASE, without the compression's suffix."""

    path: str
    depends: list[str] = field(default_factory=list)
    soft: list[str] = field(default_factory=list)
    aliases: list[str] = field(default_factory=list)


def kernel_modules(guest: DebianGuest, names: Iterable[str], *, missing_ok: bool = False) -> list[Node]:
    """The nodes of an initramfs in which these modules of the guest's kernel can be loaded.

    What the kernel has built in is left out; with `missing_ok` also what it does not have at all.
    Raises GuestUnavailable if it has no such module, or none can be obtained.
    """
    home = _obtained(guest)
    index = json.loads((home / "index.json").read_text())
    modules = {name: Module(**record) for name, record in index["modules"].items()}
    if missing_ok:
        names = [name for name in names if _normal(name) in modules]
    taken = _closure(modules, set(index["builtin"]), names, guest.package)
    base = f"lib/modules/{index['release']}"
    nodes = [
        Node(f"{base}/{modules[name].path}", stat.S_IFREG | 0o644, _unpacked(home / modules[name].path))
        for name in taken
    ]
    tables = {
        "modules.dep": [f"{modules[name].path}: {' '.join(_paths_needed(modules, name))}".rstrip() for name in taken],
        "modules.alias": [f"alias {alias} {name}" for name in taken for alias in modules[name].aliases],
        "modules.softdep": [f"softdep {name} pre: {' '.join(soft)}" for name in taken if (soft := modules[name].soft)],
        "modules.symbols": [],
    }
    for table, lines in tables.items():
        text = "".join(line + "\n" for line in lines)
        nodes.append(Node(f"{base}/{table}", stat.S_IFREG | 0o644, text.encode()))
    return nodes


def _normal(name: str) -> str:
    """A module's name as the kernel has it, which knows no hyphen."""
    return name.replace("-", "_")


def _closure(modules: dict[str, Module], builtin: set[str], names: Iterable[str], package: str) -> list[str]:
    """The modules named and all they need, each behind those that it needs."""
    providers = {_normal(alias): name for name, module in modules.items() for alias in module.aliases}
    taken: dict[str, None] = {}

    def take(name: str) -> None:
        if name in taken:
            return
        module = modules[name]
        for soft in module.soft:
            provider = providers.get(_normal(soft)) or _normal(soft)
            if provider in modules:
                take(provider)
        for needed in module.depends:
            if _normal(needed) in modules:
                take(_normal(needed))
        taken[name] = None

    for name in map(_normal, names):
        if name in modules:
            take(name)
        elif name not in builtin:
            raise GuestUnavailable(f"{package} has no module {name}")
    return list(taken)


def _paths_needed(modules: dict[str, Module], name: str) -> list[str]:
    """As modules.dep has them: all that must be loaded before, the first to be loaded last."""
    order: dict[str, None] = {}

    def visit(name: str) -> None:
        for needed in map(_normal, modules[name].depends):
            if needed in modules:
                visit(needed)
                order[modules[needed].path] = None

    visit(name)
    return list(reversed(order))


# --- the cache ---------------------------------------------------------------------------------------------


def _obtained(guest: DebianGuest) -> Path:
    """The directory with the modules and their index, obtained if need be."""
    home = guest.kernel.parent / "modules"
    if (home / "index.json").is_file():
        return home
    with locked(home.parent.parent):
        if not (home / "index.json").is_file():
            aside = Path(tempfile.mkdtemp(dir=home.parent, prefix="modules-"))
            try:
                _unpack(guest, aside)
                aside.chmod(0o755)
                shutil.rmtree(home, ignore_errors=True)
                aside.rename(home)
            except BaseException:
                shutil.rmtree(aside)
                raise
    return home


def _unpack(guest: DebianGuest, home: Path) -> None:
    release, builtin, modules = "", [], {}
    for path, data in kernel_package_files(guest, _modules_without_hardware):
        match = _WITHIN.fullmatch(path)
        assert match
        release, path = match["release"], match["path"]
        if path == "modules.builtin":
            builtin = [_normal(PurePosixPath(line).stem) for line in data.decode().splitlines()]
            continue
        path = re.sub(r"\.(xz|zst)$", "", path)
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_bytes(data)
        modules[_normal(PurePosixPath(path).stem)] = _module(path, _decompressed(data))
    if not modules:
        raise GuestUnavailable(f"{guest.package} {guest.version} has no modules")
    records = {name: vars(module) for name, module in modules.items()}
    index = {"release": release, "builtin": builtin, "modules": records}
    (home / "index.json").write_text(json.dumps(index))


def _modules_without_hardware(path: str) -> bool:
    match = _WITHIN.fullmatch(path)
    return bool(match and _WITHOUT_HARDWARE.fullmatch(match["path"]))


def _module(path: str, data: bytes) -> Module:
    """By the strings of its .modinfo section, "key=value" with a NUL behind each."""
    found: dict[str, list[str]] = {"depends": [], "softdep": [], "alias": []}
    for key, value in _MODINFO.findall(data):
        found[key.decode()].append(value.decode("utf-8", "replace"))
    depends = [name for value in found["depends"] for name in value.split(",") if name]
    return Module(path, depends, list(_pre(found["softdep"])), found["alias"])


def _pre(softdeps: Sequence[str]) -> Iterator[str]:
    """The modules to be loaded before, out of "pre: a b post: c"."""
    for value in softdeps:
        kind = ""
        for word in value.split():
            if word.endswith(":"):
                kind = word
            elif kind == "pre:":
                yield word


def _unpacked(path: Path) -> bytes:
    return _decompressed(path.read_bytes())


def _decompressed(data: bytes) -> bytes:
    """A module as the guest's insmod needs it, whatever it was packed with."""
    if data.startswith(b"\xfd7zXZ"):
        return lzma.decompress(data)
    if data.startswith(b"\x28\xb5\x2f\xfd"):
        return zstandard.ZstdDecompressor().decompressobj().decompress(data)
    return data
