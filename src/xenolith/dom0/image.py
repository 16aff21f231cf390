"""Guest kernel images: from the file that a distribution ships to what the domain builder has to place.

A Linux kernel for x86 is a *bzImage*: a real-mode header (Documentation/arch/x86/boot.rst in Linux) that says
where in the file the compressed kernel is. The payload is an ELF image compressed by any of Linux's methods (xz, lz4,
zstd, gzip, bzip2, lzma, lzo), and it is taken out here, on the host, so that the guest never runs its own
decompressor. Other PV kernels are plain or gzip-compressed ELF images.

The ELF image is loaded by physical address (p_paddr: Linux's per-cpu segment has virtual address 0). How it
wants to be started is in its Xen ELF notes (`abi.elfnote`), in a PT_NOTE segment or, for kernels of the Mini-OS
kind, in a SHT_NOTE section only. Which notes and features must be there follows Xen's own loader (libelf-loader
and libelf-dominfo).

Images come from anyone. Every number in them is checked before use, the decompressed size is bounded, and
whatever is wrong raises ImageError with the reason.
"""

from __future__ import annotations

import bz2
import io
import lzma
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import lz4.block
import zstandard
from elftools.elf.elffile import ELFFile

from xenolith.abi.elfnote import GENERIC_LOADER, NOTE_ALIGNMENT, NOTE_HEADER, NOTE_NAME, XEN_VERSION, ElfNote, Feature
from xenolith.abi.x86 import PAGE_SIZE, is_canonical

MAX_IMAGE_BYTES: Final = 1 << 30  # of a decompressed image, and of its segments in memory
_PF_X: Final = 1  # a segment's p_flags
_MAX_PROGRAM_HEADERS: Final = 256
_MAX_SECTIONS: Final = 4096
_TOP: Final = 1 << 64
_GUEST_PHYSICAL_END: Final = 1 << 40  # INIT_P2M and 4-level tables leave room for far more; nobody links above it

OFFERED_FEATURES: Final = frozenset(
    {
        Feature.writable_page_tables,  # direct writes to page tables trap and are validated
        Feature.pae_pgdir_above_4gb,
        Feature.mmu_pt_update_preserve_ad,
        Feature.gnttab_map_avail_bits,
    }
)
"""Features that a kernel may require ("!name") of us and still run."""


class ImageError(Exception):
    """The image cannot be run; the message says why."""


@dataclass(frozen=True)
class Segment:
    """A piece of the image at guest-physical address `paddr`: `data`, then zeros up to `memsz` bytes."""

    paddr: int
    data: memoryview
    memsz: int
    executable: bool = True


@dataclass(frozen=True)
class KernelImage:
    """A PV kernel, checked: what to place where, and how to enter it.

    `segments` are in ascending order of `paddr` and do not overlap. Physical address p is pfn
    (p - elf_paddr_offset) >> 12 of the domain, mapped at p - elf_paddr_offset + virt_base.
    """

    entry: int
    virt_base: int
    elf_paddr_offset: int
    segments: tuple[Segment, ...]
    hypercall_page: int | None
    init_p2m: int | None
    mod_start_pfn: bool
    features: frozenset[Feature]
    required_features: frozenset[Feature]
    guest_os: str
    guest_version: str
    loader: str
    hv_start_low: int | None
    bsd_symtab: bool

    def without_contents(self) -> KernelImage:
        """What is known of the kernel, without the kernel."""
        return replace(self, segments=())

    @property
    def paddr_start(self) -> int:
        return self.segments[0].paddr

    @property
    def paddr_end(self) -> int:
        return self.segments[-1].paddr + self.segments[-1].memsz

    def virtual(self, paddr: int) -> int:
        """The virtual address at which the builder maps an address of the image."""
        return paddr - self.elf_paddr_offset + self.virt_base


def load_image(source: Path | bytes) -> KernelImage:
    """Reads a kernel from a file or from memory. Raises ImageError."""
    if isinstance(source, bytes):
        return _parse_elf(elf_of_image(source))
    try:
        data = source.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot read the kernel {source}: {error.strerror}") from error
    try:
        return _parse_elf(elf_of_image(data))
    except ImageError as error:
        raise ImageError(f"{source}: {error}") from error


# --- containers and compression ----------------------------------------------------------------------------

_ELF_MAGIC: Final = b"\x7fELF"
_GZIP_MAGIC: Final = b"\x1f\x8b"
_XZ_MAGIC: Final = b"\xfd7zXZ\x00"
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_XZ_MEMORY_BYTES: Final = 256 << 20  # of the decoder; Linux uses dictionaries of up to 128 MiB
_ZSTD_STEP_BYTES: Final = 16 << 10  # zstd makes at most 128 KiB of 4 bytes: a step stays below 512 MiB
_LZ4_LEGACY_MAGIC: Final = b"\x02\x21\x4c\x18"
_LZ4_LEGACY_BLOCK_BYTES: Final = 8 << 20  # every block but the last decompresses to exactly this
_BZIP2_MAGIC: Final = b"BZh"
_LZMA_MAGIC: Final = b"\x5d\x00\x00"
_LZOP_MAGIC: Final = b"\x89LZO\x00\r\n\x1a\n"
_LZOP_FILTER: Final = 0x800
_LZOP_PLAIN_CHECKSUMS: Final = (0x1, 0x100)  # Adler-32 and CRC-32
_LZOP_PACKED_CHECKSUMS: Final = (0x2, 0x200)
_LZOP_BLOCK_BYTES: Final = 64 << 20  # the most that lzop itself takes

_SETUP_SECTS_OFFSET: Final = 0x1F1
_BOOT_FLAG_OFFSET: Final = 0x1FE
_HEADER_MAGIC_OFFSET: Final = 0x202
_PROTOCOL_OFFSET: Final = 0x206
_PAYLOAD_OFFSET_OFFSET: Final = 0x248
_FIRST_PROTOCOL_WITH_PAYLOAD: Final = 0x208
_SECTOR_BYTES: Final = 512


def elf_of_image(image: bytes) -> bytes:
    """The ELF image in a kernel file: in a bzImage, compressed, or as it is. Raises ImageError."""
    if image.startswith(_ELF_MAGIC):
        return image
    if image.startswith(_GZIP_MAGIC):
        elf = _decompress(memoryview(image))
    elif _is_bzimage(image):
        elf = _decompress(_bzimage_payload(image))
    else:
        raise ImageError("not a kernel image: neither ELF, gzip-compressed ELF, nor a Linux bzImage")
    if not elf.startswith(_ELF_MAGIC):
        raise ImageError("the compressed payload of the kernel image is not an ELF image")
    return elf


def _is_bzimage(image: bytes) -> bool:
    return image[_BOOT_FLAG_OFFSET : _BOOT_FLAG_OFFSET + 2] == b"\x55\xaa" and (
        image[_HEADER_MAGIC_OFFSET : _HEADER_MAGIC_OFFSET + 4] == b"HdrS"
    )


def _bzimage_payload(image: bytes) -> memoryview:
    if len(image) < _PAYLOAD_OFFSET_OFFSET + 8:
        raise ImageError("truncated bzImage: the file ends in its header")
    (protocol,) = struct.unpack_from("<H", image, _PROTOCOL_OFFSET)
    if protocol < _FIRST_PROTOCOL_WITH_PAYLOAD:
        raise ImageError(
            f"bzImage of boot protocol {protocol >> 8}.{protocol & 0xFF:02}: too old, it does not say where its "
            "kernel is (2.08 is the first that does)"
        )
    setup_sectors = image[_SETUP_SECTS_OFFSET] or 4
    offset, length = struct.unpack_from("<II", image, _PAYLOAD_OFFSET_OFFSET)
    start = (setup_sectors + 1) * _SECTOR_BYTES + offset
    if length == 0:
        raise ImageError("bzImage without a payload")
    if start + length > len(image):
        raise ImageError(f"truncated bzImage: its payload ends at byte {start + length}, the file at byte {len(image)}")
    return memoryview(image)[start : start + length]


def _decompress(payload: memoryview) -> bytes:
    """Decompresses a payload by its magic number. Bytes after the compressed stream (Linux puts the size there)
    are left alone."""
    head = bytes(payload[:16])
    try:
        if head.startswith(_GZIP_MAGIC):
            elf = _gunzip(payload)
        elif head.startswith(_XZ_MAGIC):
            elf = _bounded(lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES), payload)
        elif head.startswith(_ZSTD_MAGIC):
            elf = _unzstd(payload)
        elif head.startswith(_LZ4_LEGACY_MAGIC):
            elf = _unlz4_legacy(payload)
        elif head.startswith(_BZIP2_MAGIC):
            elf = _bounded(bz2.BZ2Decompressor(), payload)
        elif head.startswith(_LZMA_MAGIC):
            elf = _bounded(lzma.LZMADecompressor(format=lzma.FORMAT_ALONE, memlimit=_XZ_MEMORY_BYTES), payload)
        elif head.startswith(_LZOP_MAGIC):
            elf = _unlzop(payload)
        elif head.startswith(_ELF_MAGIC):
            elf = bytes(payload)
        else:
            raise ImageError("the kernel is compressed with an unknown method, none of Linux's seven")
    except (lzma.LZMAError, zlib.error, zstandard.ZstdError, lz4.block.LZ4BlockError, OSError, MemoryError) as error:
        raise ImageError(f"the compressed kernel is damaged: {error}") from error
    if len(elf) > MAX_IMAGE_BYTES:
        raise ImageError(f"the kernel decompresses to more than {MAX_IMAGE_BYTES >> 20} MiB")
    return elf


def _gunzip(payload: memoryview) -> bytes:
    decompressor = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    elf = decompressor.decompress(payload, MAX_IMAGE_BYTES + 1)
    if not decompressor.eof and len(elf) <= MAX_IMAGE_BYTES:
        raise ImageError("the compressed kernel is truncated")
    return elf


def _bounded(decompressor: lzma.LZMADecompressor | bz2.BZ2Decompressor, payload: memoryview) -> bytes:
    elf = decompressor.decompress(payload, MAX_IMAGE_BYTES + 1)
    if not decompressor.eof and len(elf) <= MAX_IMAGE_BYTES:
        raise ImageError("the compressed kernel is truncated")
    return elf


def _unzstd(payload: memoryview) -> bytes:
    # A kernel may use a window of 128 MiB (zstd -22 --ultra), more than the library allows unasked.
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
    pieces, total = [], 0
    for at in range(0, len(payload), _ZSTD_STEP_BYTES):
        pieces.append(decompressor.decompress(payload[at : at + _ZSTD_STEP_BYTES]))
        total += len(pieces[-1])
        if decompressor.eof or total > MAX_IMAGE_BYTES:
            return b"".join(pieces)
    raise ImageError("the compressed kernel is truncated")


def _unlz4_legacy(payload: memoryview) -> bytes:
    """lz4's first frame format, which Linux uses: blocks, each behind its compressed size, and no end mark.

    Every block but the last is a full one, so the first shorter block is the end. A last block that happens to be
    full is followed by the four bytes of size that Linux appends, or by nothing.
    """
    pieces = []
    at = len(_LZ4_LEGACY_MAGIC)
    while at + 4 < len(payload):
        (compressed_bytes,) = struct.unpack_from("<I", payload, at)
        at += 4
        if at + compressed_bytes > len(payload):
            raise ImageError("the compressed kernel is truncated")
        block = payload[at : at + compressed_bytes]
        pieces.append(lz4.block.decompress(block, uncompressed_size=_LZ4_LEGACY_BLOCK_BYTES))
        at += compressed_bytes
        if len(pieces[-1]) < _LZ4_LEGACY_BLOCK_BYTES:
            break
        if len(pieces) * _LZ4_LEGACY_BLOCK_BYTES > MAX_IMAGE_BYTES:
            break
    return b"".join(pieces)


def _unlzop(payload: memoryview) -> bytes:
    """The file format of lzop, which Linux uses: a header, then blocks, each behind its sizes and checksums.

    The LZO library is imported here: nobody else needs it. The checksums are the kernel's affair.
    """
    from lzallright import LZOCompressor, LZOError

    file = io.BytesIO(payload[len(_LZOP_MAGIC) :])

    def number(size: int) -> int:
        data = file.read(size)
        if len(data) < size:
            raise ImageError("the compressed kernel is truncated")
        return int.from_bytes(data, "big")

    version = number(2)
    number(2)  # the library's
    newer = version >= 0x0940
    file.seek(4 if newer else 1, io.SEEK_CUR)  # the version needed, the method and its level
    flags = number(4)
    file.seek((4 if flags & _LZOP_FILTER else 0) + (12 if newer else 8), io.SEEK_CUR)  # the filter, the mode, the time
    file.seek(number(1) + 4, io.SEEK_CUR)  # the file's name, the header's checksum
    plain_checksums = sum(4 for flag in _LZOP_PLAIN_CHECKSUMS if flags & flag)
    packed_checksums = sum(4 for flag in _LZOP_PACKED_CHECKSUMS if flags & flag)
    pieces, total = [], 0
    while size := number(4):
        packed = number(4)
        total += size
        if packed > size or size > _LZOP_BLOCK_BYTES:
            raise ImageError("the compressed kernel is damaged: a block of an impossible size")
        file.seek(plain_checksums + (packed_checksums if packed < size else 0), io.SEEK_CUR)
        block = file.read(packed)
        if len(block) < packed:
            raise ImageError("the compressed kernel is truncated")
        try:
            pieces.append(block if packed == size else LZOCompressor.decompress(block, size))
        except LZOError as error:
            raise ImageError(f"the compressed kernel is damaged: {error}") from error
        if total > MAX_IMAGE_BYTES:
            break
    return b"".join(pieces)


# --- ELF ---------------------------------------------------------------------------------------------------


def _parse_elf(elf: bytes) -> KernelImage:
    _check_identity(elf)
    segments, notes = _read_headers(elf)
    return _checked_image(segments, _xen_notes(notes), _entry_of_header(elf))


def _entry_of_header(elf: bytes) -> int:
    return int.from_bytes(elf[24:32], "little")


def _check_identity(elf: bytes) -> None:
    """e_ident and e_machine, before anything is read by the layout they imply (System V gABI, ELF header)."""
    if len(elf) < 64:
        raise ImageError("truncated ELF image: the file ends in its header")
    if elf[4] == 1:
        raise ImageError("a 32-bit kernel; only x86-64 PV kernels run here")
    if elf[4] != 2 or elf[5] != 1:
        raise ImageError("not a little-endian 64-bit ELF image")
    machine = int.from_bytes(elf[18:20], "little")
    if machine != 62:
        raise ImageError(f"a kernel for another processor (ELF machine {machine}); only x86-64 (62) runs here")
    programs, sections = int.from_bytes(elf[56:58], "little"), int.from_bytes(elf[60:62], "little")
    if programs > _MAX_PROGRAM_HEADERS or sections > _MAX_SECTIONS:
        raise ImageError(f"an absurd ELF image: {programs} program headers and {sections} sections")


def _read_headers(elf: bytes) -> tuple[tuple[Segment, ...], list[bytes]]:
    """The loadable segments, and the raw contents of what may hold notes."""
    try:
        # Damaged files make pyelftools raise from anywhere inside it (construct, struct, KeyError, ...).
        file = ELFFile(io.BytesIO(elf))
        loads = [header.header for header in file.iter_segments("PT_LOAD")]
        notes = [(header["p_offset"], header["p_filesz"]) for header in file.iter_segments("PT_NOTE")]
        if not notes:
            sections = (file.get_section(i) for i in range(file.num_sections()))
            notes = [(s["sh_offset"], s["sh_size"]) for s in sections if s["sh_type"] == "SHT_NOTE"]
    except Exception as error:
        raise ImageError(f"a damaged ELF image: {error}") from error
    view = memoryview(elf)
    segments = [
        Segment(
            load["p_paddr"],
            _slice(view, load["p_offset"], load["p_filesz"], "a segment"),
            load["p_memsz"],
            bool(load["p_flags"] & _PF_X),
        )
        for load in loads
        if load["p_memsz"]
    ]
    return _checked_segments(segments), [bytes(_slice(view, offset, size, "a note")) for offset, size in notes]


def _slice(view: memoryview, offset: int, size: int, what: str) -> memoryview:
    if offset + size > len(view):
        raise ImageError(
            f"truncated ELF image: {what} ends at byte {offset + size:#x}, the file at byte {len(view):#x}"
        )
    return view[offset : offset + size]


def _checked_segments(segments: list[Segment]) -> tuple[Segment, ...]:
    if not segments:
        raise ImageError("an ELF image without loadable segments")
    segments.sort(key=lambda segment: segment.paddr)
    end = 0
    for segment in segments:
        if len(segment.data) > segment.memsz:
            raise ImageError(f"the segment at {segment.paddr:#x} has more bytes in the file than in memory")
        if segment.paddr < end:
            raise ImageError(f"the segment at {segment.paddr:#x} overlaps the one that ends at {end:#x}")
        end = segment.paddr + segment.memsz
    if end - segments[0].paddr > MAX_IMAGE_BYTES:
        raise ImageError(f"the segments span {segments[0].paddr:#x} to {end:#x}, more than {MAX_IMAGE_BYTES >> 20} MiB")
    return tuple(segments)


# --- Xen notes ---------------------------------------------------------------------------------------------


def _xen_notes(regions: list[bytes]) -> dict[ElfNote, bytes]:
    """The Xen notes of the image by type; of two notes of one type the first counts."""
    notes: dict[ElfNote, bytes] = {}
    known = set(ElfNote)
    for region in regions:
        for name, kind, descriptor in _iter_notes(region):
            if name == NOTE_NAME and kind in known:
                notes.setdefault(ElfNote(kind), descriptor)
    return notes


def _iter_notes(region: bytes) -> Iterator[tuple[bytes, int, bytes]]:
    """(name, type, descriptor) of each note. What does not fit in the region is no note."""
    at, header_bytes = 0, struct.calcsize(NOTE_HEADER)
    while at + header_bytes <= len(region):
        name_bytes, descriptor_bytes, kind = struct.unpack_from(NOTE_HEADER, region, at)
        name_at = at + header_bytes
        descriptor_at = _aligned(name_at + name_bytes)
        if descriptor_at + descriptor_bytes > len(region):
            return
        yield (
            region[name_at : name_at + name_bytes].rstrip(b"\0"),
            kind,
            region[descriptor_at : descriptor_at + descriptor_bytes],
        )
        at = _aligned(descriptor_at + descriptor_bytes)


def _aligned(offset: int) -> int:
    return -(-offset // NOTE_ALIGNMENT) * NOTE_ALIGNMENT


def _checked_image(segments: tuple[Segment, ...], notes: dict[ElfNote, bytes], elf_entry: int) -> KernelImage:
    _check_is_pv(notes)
    supported, required = _features(notes)
    virt_base = _number(notes, ElfNote.VIRT_BASE)
    paddr_offset = _number(notes, ElfNote.PADDR_OFFSET)
    if paddr_offset is not None and virt_base is None:
        raise ImageError("the note PADDR_OFFSET needs a note VIRT_BASE")
    entry = _number(notes, ElfNote.ENTRY)
    image = KernelImage(
        entry=elf_entry if entry is None else entry,
        virt_base=virt_base or 0,
        elf_paddr_offset=paddr_offset or 0,
        segments=segments,
        hypercall_page=_number(notes, ElfNote.HYPERCALL_PAGE),
        init_p2m=_number(notes, ElfNote.INIT_P2M),
        mod_start_pfn=bool(_number(notes, ElfNote.MOD_START_PFN)),
        features=supported,
        required_features=required,
        guest_os=_text(notes, ElfNote.GUEST_OS),
        guest_version=_text(notes, ElfNote.GUEST_VERSION),
        loader=_text(notes, ElfNote.LOADER),
        hv_start_low=_number(notes, ElfNote.HV_START_LOW),
        bsd_symtab=_text(notes, ElfNote.BSD_SYMTAB).startswith("yes"),
    )
    _check_addresses(image)
    return image


def _check_is_pv(notes: dict[ElfNote, bytes]) -> None:
    """Refuses what is no PV kernel, with the conditions of Xen's loader."""
    if not notes:
        raise ImageError("not built for Xen: the image has no Xen ELF notes (for Linux, CONFIG_XEN_PV)")
    if ElfNote.PHYS32_ENTRY in notes and ElfNote.ENTRY not in notes:
        raise ImageError("a PVH-only kernel (it has PHYS32_ENTRY but no PV ENTRY); for Linux, build with CONFIG_XEN_PV")
    version = _text(notes, ElfNote.XEN_VERSION)
    if version != XEN_VERSION:
        raise ImageError(f"built for the Xen interface {version!r}; {XEN_VERSION!r} is the one there is")
    guest_os, loader = _text(notes, ElfNote.GUEST_OS), _text(notes, ElfNote.LOADER)
    if not loader.startswith(GENERIC_LOADER) and not guest_os.startswith("linux"):
        raise ImageError(f"needs the loader {loader!r}; only {GENERIC_LOADER!r} is known")


def _check_addresses(image: KernelImage) -> None:
    """The addresses must make sense together: later code adds and maps them without asking again."""
    if image.paddr_start < image.elf_paddr_offset:
        raise ImageError(f"the image starts at {image.paddr_start:#x}, below PADDR_OFFSET {image.elf_paddr_offset:#x}")
    if image.paddr_end - image.elf_paddr_offset > _GUEST_PHYSICAL_END:
        raise ImageError(f"the image ends at {image.paddr_end:#x}, beyond any domain's memory")
    start, end = image.virtual(image.paddr_start), image.virtual(image.paddr_end)
    if not is_canonical(image.virt_base) or end > _TOP or not (is_canonical(start) and is_canonical(end - 1)):
        raise ImageError(f"virtual addresses {start:#x} to {end:#x} are none of x86-64's")
    if not start <= image.entry < end:
        raise ImageError(f"the entry {image.entry:#x} is outside the image ({start:#x} to {end:#x})")
    page = image.hypercall_page
    if page is not None and (page % PAGE_SIZE or not start <= page <= end - PAGE_SIZE):
        raise ImageError(f"the hypercall page {page:#x} is no page of the image ({start:#x} to {end:#x})")
    p2m = image.init_p2m
    if p2m is not None and (p2m % PAGE_SIZE or not is_canonical(p2m) or start <= p2m < end):
        raise ImageError(f"INIT_P2M {p2m:#x} is misaligned, not canonical or inside the image")


def _features(notes: dict[ElfNote, bytes]) -> tuple[frozenset[Feature], frozenset[Feature]]:
    """(supported, required) features, from the string ("a|!b", "!" for required) and from the bit map."""
    supported: set[Feature] = set()
    required: set[Feature] = set()
    for word in filter(None, _text(notes, ElfNote.FEATURES).split("|")):
        feature = Feature.__members__.get(word.removeprefix("!"))
        if feature is not None:
            supported.add(feature)
        if word.startswith("!"):
            if feature not in OFFERED_FEATURES:
                raise ImageError(f"requires the feature {word[1:]!r}, which a PV domain does not have here")
            required.add(feature)
    bits = _number(notes, ElfNote.SUPPORTED_FEATURES) or 0
    supported.update(feature for feature in Feature if bits >> feature & 1)
    return frozenset(supported), frozenset(required)


def _number(notes: dict[ElfNote, bytes], kind: ElfNote) -> int | None:
    descriptor = notes.get(kind)
    if descriptor is None:
        return None
    if len(descriptor) not in (1, 2, 4, 8):
        raise ImageError(f"the note {kind.name} holds {len(descriptor)} bytes, which is no number")
    return int.from_bytes(descriptor, "little")


def _text(notes: dict[ElfNote, bytes], kind: ElfNote) -> str:
    return notes.get(kind, b"").split(b"\0", 1)[0].decode("ascii", "replace")
