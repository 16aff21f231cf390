"""Kernel images are read in every form they are shipped in, and refused with the reason when they cannot run."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from lzallright import LZOCompressor

from kernels import ENTRY, VIRT_BASE, bzimage, elf, linux, linux_notes, lz4_legacy, note
from xenolith.abi.elfnote import Feature
from xenolith.debian.packages import cache_directory
from xenolith.dom0.image import ImageError, KernelImage, elf_of_image, load_image


def _xz_as_linux(data: bytes) -> bytes:
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "dict_size": 32 << 20}]
    return lzma.compress(data, check=lzma.CHECK_CRC32, filters=filters)


def _lzop(data: bytes) -> bytes:
    """What `lzop -9` writes: by its file format, with Adler-32 checksums of blocks, in blocks of 256 KiB."""
    flags, name = 0x0300_0001, b"vmlinux"
    header = struct.pack(">HHHBBIIIIB", 0x1040, 0x20A0, 0x0940, 3, 9, flags, 0o100644, 0, 0, len(name)) + name
    pieces = [b"\x89LZO\x00\r\n\x1a\n", header, struct.pack(">I", zlib.adler32(header))]
    for at in range(0, len(data), 256 << 10):
        block = data[at : at + (256 << 10)]
        packed = LZOCompressor().compress(block)
        packed = packed if len(packed) < len(block) else block
        pieces += [struct.pack(">III", len(block), len(packed), zlib.adler32(block)), packed]
    return b"".join(pieces) + bytes(4)


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": _xz_as_linux,
    "zstd": zstandard.ZstdCompressor(level=19).compress,
    "zstd, streamed": lambda data: (c := zstandard.ZstdCompressor().compressobj()).compress(data) + c.flush(),
    "lz4": lz4_legacy,
    "bzip2": bz2.compress,
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
    "lzo": _lzop,
    "no": bytes,
}


@pytest.mark.parametrize("method", COMPRESSORS)
@pytest.mark.parametrize("with_size", [b"", b"SIZE"])
def test_a_bzimage_of_each_compression_gives_the_elf_inside(method: str, with_size: bytes) -> None:
    """Linux appends the uncompressed size to all payloads but gzip's."""
    kernel = linux()
    payload = COMPRESSORS[method](kernel) + with_size
    assert elf_of_image(bzimage(payload))[: len(kernel)] == kernel


def test_lz4_of_several_blocks_is_joined_also_when_the_last_block_is_full() -> None:
    for size in ((8 << 20) + 5, 16 << 20):
        kernel = linux() + bytes(size - len(linux()))
        assert elf_of_image(bzimage(lz4_legacy(kernel) + struct.pack("<I", size))) == kernel


def test_a_plain_and_a_gzip_compressed_elf_are_kernels_too() -> None:
    assert load_image(linux()) == load_image(gzip.compress(linux()))


def test_linux_notes_say_how_to_start_it() -> None:
    image = load_image(linux())
    assert (image.entry, image.virt_base, image.elf_paddr_offset) == (ENTRY, VIRT_BASE, 0)
    assert (image.init_p2m, image.mod_start_pfn, image.hypercall_page) == (0x8000000000, True, None)
    assert (image.guest_os, image.guest_version, image.loader) == ("linux", "2.6", "generic")
    assert image.required_features == {Feature.writable_page_tables}
    assert image.features == {Feature.writable_page_tables, Feature.pae_pgdir_above_4gb, Feature.dom0}
    assert image.virtual(0x1000000) == ENTRY


def test_a_kernel_with_a_hypercall_page_says_where() -> None:
    assert load_image(linux(hypercall_page=ENTRY + 0x1000)).hypercall_page == ENTRY + 0x1000


@pytest.mark.parametrize("notes_in", ["segment", "memsz 0", "section"])
def test_notes_are_found_in_a_segment_and_in_a_section_only(notes_in: str) -> None:
    """Mini-OS has only the section; GRUB's note segment has no size in memory. Both are linked at 0."""
    notes = note(6, "Mini-OS") + note(8, "generic") + note(5, "xen-3.0") + note(2, 0x1000)
    image = load_image(elf([(0, b"code", 0x3000)], notes, entry=0x10, notes_in=notes_in))
    assert (image.guest_os, image.virt_base, image.entry, image.hypercall_page) == ("Mini-OS", 0, 0x10, 0x1000)
    assert not image.mod_start_pfn and image.init_p2m is None


def test_notes_of_other_owners_and_unknown_types_are_passed_over() -> None:
    notes = note(1, 7, b"GNU\0") + note(99, "?") + linux_notes() + note(1, 7) + b"\xff" * 9
    assert load_image(elf(notes=notes)).entry == ENTRY


def test_segments_come_in_order_of_physical_address_with_their_size_in_memory() -> None:
    image = load_image(elf([(0x1003000, b"bb", 0x1000), (0x1000000, b"a", 0x2000), (0x900000, b"", 0)], linux_notes()))
    assert [(s.paddr, bytes(s.data), s.memsz) for s in image.segments] == [
        (0x1000000, b"a", 0x2000),
        (0x1003000, b"bb", 0x1000),
    ]
    assert (image.paddr_start, image.paddr_end) == (0x1000000, 0x1004000)


def test_paddr_offset_shifts_addresses_of_kernels_whose_paddr_is_virtual() -> None:
    notes = linux_notes(paddr_offset=0xC0000000, virt_base=0xC0000000, entry=0xC0001000)
    image = load_image(elf([(0xC0001000, b"x", 0x1000)], notes))
    assert image.virtual(0xC0001000) == 0xC0001000


REFUSED = {
    "not a kernel": (b"#!/bin/sh\n", "not a kernel image"),
    "nothing": (b"", "not a kernel image"),
    "32-bit": (elf(notes=linux_notes(), elf_class=1), "32-bit"),
    "another processor": (elf(notes=linux_notes(), machine=183), "another processor"),
    "no notes": (elf(), "not built for Xen"),
    "only GNU notes": (elf(notes=note(1, 7, b"GNU\0")), "not built for Xen"),
    "PVH only": (linux(entry=None, phys32_entry=0x1000000), "PVH-only"),
    "old interface": (linux(xen_version="xen-2.0"), "xen-2.0"),
    "own loader": (linux(loader="odd", guest_os="other"), "odd"),
    "needs translation": (linux(features="!auto_translated_physmap"), "auto_translated_physmap"),
    "needs ring 0": (linux(features="pae_pgdir_above_4gb|!supervisor_mode_kernel"), "supervisor_mode_kernel"),
    "needs the unknown": (linux(features="!flux_capacitor"), "flux_capacitor"),
    "entry outside": (linux(entry=VIRT_BASE), "entry"),
    "entry of 3 bytes": (linux(entry=b"abc"), "ENTRY"),
    "hypercall page outside": (linux(hypercall_page=ENTRY + 0x2000), "hypercall page"),
    "hypercall page unaligned": (linux(hypercall_page=ENTRY + 8), "hypercall page"),
    "p2m on the kernel": (linux(init_p2m=ENTRY), "INIT_P2M"),
    "p2m not canonical": (linux(init_p2m=1 << 60), "INIT_P2M"),
    "offset without base": (linux(virt_base=None, entry=0x1000000), "PADDR_OFFSET"),
    "below the offset": (linux(paddr_offset=0x2000000), "PADDR_OFFSET"),
    "not canonical": (linux(virt_base=1 << 60, entry=(1 << 60) + 0x1000000), "virtual addresses"),
    "wraps around": (elf([((1 << 64) - 0x1000, b"", 0x2000)], linux_notes()), "end"),
    "no segments": (elf([], linux_notes()), "without loadable segments"),
    "overlap": (elf([(0x1000000, b"", 0x1001), (0x1001000, b"", 1)], linux_notes()), "overlaps"),
    "huge": (elf([(0x1000000, b"", 1 << 31)], linux_notes()), "MiB"),
    "far apart": (elf([(0x1000000, b"", 4096), (0x91000000, b"", 4096)], linux_notes()), "MiB"),
    "filesz over memsz": (elf([(0x1000000, b"12345", 4)], linux_notes()), "more bytes"),
    "old bzImage": (bzimage(b"x", protocol=0x207), "2.07"),
    "empty payload": (bzimage(b""), "without a payload"),
    "short payload": (bzimage(gzip.compress(linux()))[:-600], "truncated"),
    "lzo in one block of 4 GiB": (bzimage(_lzop(b"")[:-4] + b"\xff" * 12), "impossible size"),
    "unknown compression": (bzimage(bytes(40)), "unknown method"),
    "payload is no ELF": (bzimage(gzip.compress(b"data")), "not an ELF"),
    "header only": (bzimage(b"")[:0x249], "truncated"),
    "truncated ELF": (linux()[:40], "truncated"),
} | {
    f"{name} cut": (bzimage(compress(linux())[:-20]), "truncated|damaged")
    for name, compress in COMPRESSORS.items()
    if name != "no"
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_run_is_refused_with_the_reason(case: str) -> None:
    image, reason = REFUSED[case]
    with pytest.raises(ImageError, match=reason):
        load_image(image)


@pytest.mark.parametrize("method", ["gzip", "xz", "zstd", "lz4", "bzip2", "lzma", "lzo"])
def test_a_decompression_bomb_is_stopped_at_the_limit(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xenolith.dom0.image.MAX_IMAGE_BYTES", 32 << 20)
    bomb = COMPRESSORS[method](b"\x7fELF" + bytes(48 << 20))
    with pytest.raises(ImageError, match="more than 32 MiB"):
        load_image(bzimage(bomb))


def test_an_error_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "vmlinuz").write_bytes(b"?")
    with pytest.raises(ImageError, match="vmlinuz: not a kernel image"):
        load_image(tmp_path / "vmlinuz")
    with pytest.raises(ImageError, match=r"cannot read .*absent: No such file"):
        load_image(tmp_path / "absent")


def _load_or_refuse(image: bytes) -> KernelImage | None:
    try:
        return load_image(image)
    except ImageError:
        return None


@given(
    st.sampled_from(
        [linux(), elf(notes=linux_notes(), notes_in="section"), bzimage(linux()), bzimage(lz4_legacy(linux()))]
    ),
    st.lists(st.tuples(st.integers(0, 1 << 16), st.sampled_from([0, 1, 7, 0x7F, 0x80, 0xFF])), max_size=8),
    st.integers(0, 1 << 16),
)
def test_a_hostile_image_is_read_or_refused_and_never_breaks_the_reader(
    image: bytes, changes: list[tuple[int, int]], cut: int
) -> None:
    damaged = bytearray(image)
    for at, value in changes:
        damaged[at % len(damaged)] = value
    kernel = _load_or_refuse(bytes(damaged[: cut % len(damaged) + 1 if cut else len(damaged)]))
    if kernel is not None:
        assert all(len(s.data) <= s.memsz <= 1 << 30 for s in kernel.segments)
        assert all(a.paddr + a.memsz <= b.paddr for a, b in zip(kernel.segments, kernel.segments[1:], strict=False))
        assert kernel.virtual(kernel.paddr_start) <= kernel.entry < kernel.virtual(kernel.paddr_end)


@given(
    st.lists(st.tuples(*[st.integers(0, (1 << 64) - 1)] * 2, st.binary(max_size=8)), max_size=4),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 64) - 1),
)
def test_arbitrary_addresses_and_sizes_are_read_or_refused(
    segments: list[tuple[int, int, bytes]], entry: int, base: int, offset: int
) -> None:
    notes = linux_notes(entry=entry, virt_base=base, paddr_offset=offset)
    _load_or_refuse(elf([(paddr, data, memsz) for paddr, memsz, data in segments], notes))


def _cached_debian_kernels() -> list[Path]:
    records = sorted((cache_directory() / "debian").glob("*.json"))
    return sorted({record.parent / json.loads(record.read_text())["kernel"] for record in records})


@pytest.mark.parametrize("kernel", _cached_debian_kernels(), ids=lambda path: path.parent.name)
def test_debians_kernels_in_the_cache_are_pv_kernels_without_a_hypercall_page(kernel: Path) -> None:
    image = load_image(kernel)
    assert (image.guest_os, image.virt_base, image.init_p2m) == ("linux", VIRT_BASE, 0x8000000000)
    assert image.mod_start_pfn and image.hypercall_page is None
    assert image.paddr_start == 0x1000000
