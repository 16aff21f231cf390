"""Guests to make domains of: Debian's kernel with our initramfs, as files and as an xl.cfg that uses them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xenolith.abi.layout import XEN_LEGACY_MAX_VCPUS
from xenolith.debian import packages
from xenolith.debian.initramfs import InitramfsError, build_initramfs, kernel_arguments, needed_arguments
from xenolith.debian.modules import DEVICE_MODULES, kernel_modules
from xenolith.debian.packages import DEFAULT_KERNEL as DEFAULT_KERNEL
from xenolith.debian.packages import DebianGuest, GuestUnavailable, write_whole
from xenolith.dom0.image import ImageError, load_image
from xenolith.toolstack.errors import ToolstackError

MEMORY_MIB: Final = 256


class NoGuest(ToolstackError):
    """The guest cannot be had; the text says what to do."""


@dataclass(frozen=True)
class PreparedGuest:
    """A guest on this machine: the packages it is from, and files to boot."""

    package: str
    version: str
    suite: str  # empty for the machine's own
    kernel: Path
    elf: Path
    busybox: Path
    initramfs: Path
    arguments: str  # for the kernel

    def config(self, name: str, vcpus: int = 1) -> str:
        """The text of an xl.cfg for a domain of this guest."""
        return (
            f"# {self.package} {self.version}\n"
            f'name    = "{name}"\n'
            f'kernel  = "{self.elf}"\n'
            f'ramdisk = "{self.initramfs}"\n'
            f'extra   = "{self.arguments}"\n'
            f"memory  = {MEMORY_MIB}\n"
            f"vcpus   = {vcpus}\n"
        )


def debian(kernel: str = DEFAULT_KERNEL, *, devices: bool = False, update: bool = False) -> PreparedGuest:
    """Debian's stock kernel (see `packages.obtain`), with an initramfs that starts a shell on the console.

    With `devices` that holds the drivers of disks, networks and shared directories, as far as the kernel has them; with
    `update` apt is asked what is newest now. Its kernel takes as many vCPUs as its domain has. Raises NoGuest.
    """
    try:
        found = packages.refresh(kernel) if update else packages.obtain(kernel)
        initramfs = _initramfs(found, devices)
        arguments = f"{kernel_arguments(XEN_LEGACY_MAX_VCPUS)} {needed_arguments(load_image(found.elf))}".strip()
    except (GuestUnavailable, InitramfsError, ImageError, OSError) as error:
        raise NoGuest(str(error)) from error
    return PreparedGuest(
        found.package, found.version, found.suite, found.kernel, found.elf, found.busybox, initramfs, arguments
    )


def _initramfs(found: DebianGuest, devices: bool) -> Path:
    """Written anew each time, since building it takes milliseconds."""
    path = found.kernel.with_name("devices.cpio") if devices else found.busybox.with_name("shell.cpio")
    modules = kernel_modules(found, DEVICE_MODULES, missing_ok=True) if devices else []
    write_whole(path, build_initramfs(found.busybox, modules=modules))
    return path
