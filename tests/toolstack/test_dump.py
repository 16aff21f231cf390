"""A core of a domain that runs is what a debugger finds in it: registers, memory at its own addresses, contexts."""

from __future__ import annotations

import os
import stat
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
from elftools.elf.elffile import ELFFile

from xenolith.abi import vcpu_context
from xenolith.dom0.image import load_image
from xenolith.toolstack.client import Progress, ToolstackError
from xenolith.toolstack.embedded import EmbeddedToolstack

GUESTS = Path(__file__).parents[2] / "guests" / "prebuilt"


def core_of(toolstack: EmbeddedToolstack, domid: int, path: Path) -> tuple[Any, vcpu_context.VcpuContext]:
    toolstack.dump_core(domid, path)
    elf = ELFFile(path.open("rb"))
    return elf, vcpu_context.parse(elf.get_section_by_name(".xen_prstatus").data())


def read_memory(elf: Any, va: int, size: int) -> bytes:
    for segment in elf.iter_segments("PT_LOAD"):
        if segment["p_vaddr"] <= va < segment["p_vaddr"] + segment["p_memsz"]:
            data: bytes = segment.data()
            return data[va - segment["p_vaddr"] :][:size]
    raise AssertionError(f"{va:#x} is not in the core")


def test_the_kernels_text_is_at_its_addresses_and_the_registers_point_into_it(
    crashed: tuple[EmbeddedToolstack, int], tmp_path: Path
) -> None:
    elf, context = core_of(*crashed, tmp_path / "core")
    image = load_image(GUESTS / "crash.elf")
    text = next(segment for segment in image.segments if segment.executable)
    start = image.virt_base + text.paddr - image.elf_paddr_offset
    assert start <= context.regs.rip < start + text.memsz
    at_rip = context.regs.rip - start
    assert read_memory(elf, context.regs.rip, 8) == bytes(text.data[at_rip : at_rip + 8])
    assert read_memory(elf, context.regs.rsp, 8)  # its stack is there too
    assert context.flags & vcpu_context.VGCF_in_kernel


def test_all_memory_is_in_the_core_once(crashed: tuple[EmbeddedToolstack, int], tmp_path: Path) -> None:
    elf, _ = core_of(*crashed, tmp_path / "core")
    assert elf.get_section_by_name(".xen_pages").data_size == 32 << 20
    pfns = [pfn for pfn, _ in struct.iter_unpack("<QQ", elf.get_section_by_name(".xen_p2m").data())]
    assert pfns == list(range(8192))


def test_a_core_that_cannot_be_written_leaves_nothing_behind(
    crashed: tuple[EmbeddedToolstack, int], tmp_path: Path
) -> None:
    toolstack, domid = crashed
    with pytest.raises(ToolstackError, match="cannot write the core file"):
        toolstack.dump_core(domid, tmp_path / "missing" / "core")
    (tmp_path / "occupied").mkdir()
    with pytest.raises(ToolstackError, match="cannot write the core file"):
        toolstack.dump_core(domid, tmp_path / "occupied")
    assert [path.name for path in tmp_path.iterdir()] == ["occupied"]


def test_a_core_goes_into_a_device_and_through_a_symbolic_link_and_replaces_neither(
    crashed: tuple[EmbeddedToolstack, int], tmp_path: Path
) -> None:
    toolstack, domid = crashed
    toolstack.dump_core(domid, Path("/dev/null"))
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(ToolstackError, match="No space left on device"):
        toolstack.dump_core(domid, Path("/dev/full"))
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)
    link = tmp_path / "link"
    link.symlink_to("real")
    toolstack.dump_core(domid, link)
    assert link.is_symlink() and (tmp_path / "real").read_bytes()[:4] == b"\x7fELF"
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ToolstackError, match="neither a file nor a device"):
        toolstack.dump_core(domid, tmp_path / "fifo")
    assert (tmp_path / "fifo").is_fifo()


def test_a_domain_that_is_destroyed_during_a_dump_goes_and_the_dump_says_so(
    crashed: tuple[EmbeddedToolstack, int], tmp_path: Path
) -> None:
    toolstack, domid = crashed
    destroyers: list[threading.Thread] = []

    def destroy(progress: Progress) -> None:
        if not destroyers:
            leaving = toolstack._table.record(domid).leaving
            destroyers.append(threading.Thread(target=toolstack.destroy, args=(domid,)))
            destroyers[0].start()
            assert leaving.wait(60)

    with pytest.raises(ToolstackError, match="is being destroyed"):
        toolstack.dump_core(domid, tmp_path / "core", destroy)
    destroyers[0].join()
    assert [domain.domid for domain in toolstack.domains()] == [0]
    assert list(tmp_path.iterdir()) == []
