"""Synthetic kernel images for tests, laid out by the ELF and bzImage specifications and not by our reader."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import lz4.block

VIRT_BASE = 0xFFFFFFFF80000000
ENTRY = VIRT_BASE + 0x1000000
PT_LOAD, PT_NOTE, SHT_NULL, SHT_NOTE = 1, 4, 0, 7


def note(kind: int, value: int | str | bytes, name: bytes = b"Xen\0") -> bytes:
    if isinstance(value, int):
        value = struct.pack("<Q", value)
    elif isinstance(value, str):
        value = value.encode() + b"\0"
    return (
        struct.pack("<III", len(name), len(value), kind) + name + bytes(-len(name) % 4) + value + bytes(-len(value) % 4)
    )


def linux_notes(**changes: int | str | bytes | None) -> bytes:
    """The notes of a Debian 6.1 kernel (as observed), some changed, or left out by None."""
    values: dict[str, tuple[int, int | str | bytes | None]] = {
        "guest_os": (6, "linux"),
        "guest_version": (7, "2.6"),
        "xen_version": (5, "xen-3.0"),
        "virt_base": (3, VIRT_BASE),
        "init_p2m": (15, 0x8000000000),
        "entry": (1, ENTRY),
        "features": (10, "!writable_page_tables"),
        "supported_features": (17, struct.pack("<I", 0x8811)),
        "loader": (8, "generic"),
        "l1_mfn_valid": (13, struct.pack("<QQ", 1, 1)),
        "mod_start_pfn": (16, 1),
        "paddr_offset": (4, 0),
        "hypercall_page": (2, None),
        "phys32_entry": (18, None),
        "bsd_symtab": (11, None),
    }
    for name, value in changes.items():
        values[name] = (values[name][0], value)
    return b"".join(note(kind, value) for kind, value in values.values() if value is not None)


def elf(
    segments: Sequence[tuple[int, bytes, int]] = ((0x1000000, b"\x90" * 64, 0x2000),),
    notes: bytes = b"",
    *,
    entry: int = 0,
    notes_in: str = "segment",
    elf_class: int = 2,
    machine: int = 62,
    flags: Sequence[int] = (),
) -> bytes:
    """ELF64 with loadable `segments` (paddr, bytes, memsz), each with its p_flags or all of them, and notes in a
    "segment", as GRUB's ("memsz 0"), or in a "section" only."""
    headers = len(segments) + (notes_in != "section")
    data_at = 64 + 56 * headers
    programs, body = b"", b""
    for (paddr, data, memsz), allowed in zip(segments, flags or [7] * len(segments), strict=True):
        offset = data_at + len(body)
        programs += struct.pack("<IIQQQQQQ", PT_LOAD, allowed, offset, 0, paddr, len(data), memsz, 4096)
        body += data
    notes_at = data_at + len(body)
    body += notes
    if notes_in != "section":
        memsz = 0 if notes_in == "memsz 0" else len(notes)
        programs += struct.pack("<IIQQQQQQ", PT_NOTE, 4, notes_at, 0, 0, len(notes), memsz, 4)
    names = b"\0.note.Xen\0.shstrtab\0"
    names_at = data_at + len(body)
    sections_at = names_at + len(names)
    body += names
    body += struct.pack("<IIQQQQIIQQ", 0, SHT_NULL, 0, 0, 0, 0, 0, 0, 0, 0)
    body += struct.pack("<IIQQQQIIQQ", 1, SHT_NOTE, 2, 0, notes_at, len(notes), 0, 0, 4, 0)
    body += struct.pack("<IIQQQQIIQQ", 11, 3, 0, 0, names_at, len(names), 0, 0, 1, 0)
    identity = b"\x7fELF" + bytes([elf_class, 1, 1]) + bytes(9)
    header = struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, entry, 64, sections_at, 0, 64, 56, headers, 64, 3, 2)
    return identity + header + programs + body


def linux(**changes: int | str | bytes | None) -> bytes:
    return elf(notes=linux_notes(**changes))


def bzimage(payload: bytes, *, protocol: int = 0x20F, setup_sectors: int = 3, offset: int = 100) -> bytes:
    """A kernel file with the payload where its header says (Linux's boot protocol)."""
    image = bytearray((setup_sectors + 1) * 512 + offset)
    image[0x1F1] = setup_sectors
    image[0x1FE:0x200] = b"\x55\xaa"
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, protocol)
    struct.pack_into("<II", image, 0x248, offset, len(payload))
    return bytes(image) + payload + bytes(512)


def lz4_legacy(data: bytes, block_bytes: int = 8 << 20) -> bytes:
    """lz4 -l, as the kernel's build runs it."""
    pieces = [b"\x02\x21\x4c\x18"]
    for at in range(0, len(data), block_bytes):
        block = lz4.block.compress(data[at : at + block_bytes], store_size=False)
        pieces += [struct.pack("<I", len(block)), block]
    return b"".join(pieces)
