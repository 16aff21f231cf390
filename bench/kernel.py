"""Debian's stock kernel: the bzImage as the package has it, and the ELF file inside it.

Every system but User-Mode Linux, which is a kernel of its own, boots this same kernel.  The payload's
place in a bzImage: Linux, Documentation/arch/x86/boot.rst, fields setup_sects, payload_offset and
payload_length.
"""

from __future__ import annotations

import lzma
import struct
from dataclasses import dataclass
from pathlib import Path

from bench.packages import PackageError, cache_directory, dependency, only_file, unpacked

XZ_MAGIC = b"\xfd7zXZ\0"
SETUP_SECTS, PAYLOAD_OFFSET = 0x1F1, 0x248  # offsets in the setup header


@dataclass(frozen=True)
class Kernel:
    """A kernel in both its forms, and the modules that came with it."""

    release: str
    bzimage: Path
    elf: Path
    package: Path


def debian_kernel() -> Kernel:
    """The kernel that linux-image-amd64 stands for."""
    package = unpacked(dependency("linux-image-amd64", r"linux-image-\S+"))
    bzimage = only_file(package, "boot/vmlinuz-*")
    release = bzimage.name.removeprefix("vmlinuz-")
    elf = cache_directory() / f"vmlinux-{release}"
    if not elf.exists():
        partial = elf.with_suffix(".partial")
        partial.write_bytes(elf_inside(bzimage.read_bytes()))
        partial.rename(elf)
    return Kernel(release, bzimage, elf, package)


def elf_inside(bzimage: bytes) -> bytes:
    """Decompress a bzImage's payload."""
    setup_sectors = bzimage[SETUP_SECTS] or 4
    offset, length = struct.unpack_from("<II", bzimage, PAYLOAD_OFFSET)
    start = (setup_sectors + 1) * 512 + offset
    payload = bzimage[start : start + length]
    if not payload.startswith(XZ_MAGIC):
        raise PackageError(f"the kernel's payload begins with {payload[:6].hex()}, which is not xz as in Debian 12")
    return lzma.LZMADecompressor().decompress(payload)  # four bytes of length follow the stream
