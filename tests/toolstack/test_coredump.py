"""A core file is opened by tools that know ELF: pyelftools for its structure, gdb for what a person sees."""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
from operator import attrgetter
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import given, settings
from hypothesis import strategies as st

from xenolith.toolstack.client import Progress, ToolstackError
from xenolith.toolstack.coredump import PAGE_SIZE, REGISTERS, Mapping, MemoryRun, VcpuState, write_core

DIRECT_MAP = 0xFFFF888000000000


def run(pfn: int, *pages: bytes) -> MemoryRun:
    filled = [page.ljust(PAGE_SIZE, b"\0") for page in pages]
    gmfns = [0x1000 + pfn + index for index in range(len(pages))]
    return MemoryRun(pfn, len(pages), gmfns, filled)


def direct(memory: list[MemoryRun]) -> list[Mapping]:
    return [Mapping(DIRECT_MAP + run.pfn * PAGE_SIZE, run.pfn, run.frames) for run in memory]


def registers(base: int) -> dict[str, int]:
    return {name: base + index for index, name in enumerate(REGISTERS)}


def core_of(vcpus: list[VcpuState], memory: list[MemoryRun]) -> bytes:
    file = io.BytesIO()
    write_core(file, "web", vcpus, memory, direct(memory))
    return file.getvalue()


VCPUS = [VcpuState(registers(0x1000), b"A" * 5168), VcpuState(registers(0x2000), b"B" * 5168)]


def test_memory_is_found_by_its_virtual_addresses_and_by_pfn() -> None:
    elf = ELFFile(io.BytesIO(core_of(VCPUS, [run(16, b"sixteen"), run(2, b"two", b"three")])))
    loads = [segment for segment in elf.iter_segments() if segment["p_type"] == "PT_LOAD"]
    assert [(load["p_vaddr"], load["p_paddr"]) for load in loads] == [
        (DIRECT_MAP + 2 * PAGE_SIZE, 2 * PAGE_SIZE),
        (DIRECT_MAP + 16 * PAGE_SIZE, 16 * PAGE_SIZE),
    ]
    assert [load.data()[: load["p_filesz"]].rstrip(b"\0") for load in loads][1] == b"sixteen"
    assert loads[0].data()[PAGE_SIZE : PAGE_SIZE + 5] == b"three"


def test_memory_that_is_mapped_twice_is_in_the_file_once_and_found_at_both_addresses() -> None:
    file = io.BytesIO()
    text = 0xFFFFFFFF81000000
    memory = [run(2, b"two", b"three"), run(8, b"eight")]
    mappings = [Mapping(text, 3, 1), Mapping(DIRECT_MAP, 0, 9), Mapping(text + PAGE_SIZE, 99, 1)]
    write_core(file, "web", [], memory, mappings)
    elf = ELFFile(file)
    loads = [segment for segment in elf.iter_segments() if segment["p_type"] == "PT_LOAD"]
    assert [(load["p_vaddr"], load.data().rstrip(b"\0")[-5:]) for load in loads] == [
        (DIRECT_MAP + 2 * PAGE_SIZE, b"three"),
        (DIRECT_MAP + 8 * PAGE_SIZE, b"eight"),
        (text, b"three"),
    ]
    assert elf.get_section_by_name(".xen_pages").data_size == 3 * PAGE_SIZE


def test_xen_tools_find_pages_p2m_and_contexts_in_sections() -> None:
    elf = ELFFile(io.BytesIO(core_of(VCPUS, [run(2, b"two", b"three")])))
    p2m = elf.get_section_by_name(".xen_p2m").data()
    assert list(struct.iter_unpack("<QQ", p2m)) == [(2, 0x1002), (3, 0x1003)]
    pages = elf.get_section_by_name(".xen_pages").data()
    assert (pages[:3], pages[PAGE_SIZE : PAGE_SIZE + 5]) == (b"two", b"three")
    contexts = elf.get_section_by_name(".xen_prstatus")
    assert (contexts["sh_entsize"], contexts.data()) == (5168, b"A" * 5168 + b"B" * 5168)
    notes = {note["n_type"]: note["n_descdata"] for note in elf.get_section_by_name(".note.Xen").iter_notes()}
    assert struct.unpack("<QQQQ", notes[0x2000001]) == (0xF00FEBED, 2, 2, PAGE_SIZE)


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), max_size=6), st.integers(0, 4))
def test_every_page_is_in_the_file_once(lengths: list[int], vcpus: int) -> None:
    memory = [run(100 * index, *(bytes([index, page, 7]) for page in range(n))) for index, n in enumerate(lengths)]
    elf = ELFFile(io.BytesIO(core_of([VcpuState({})] * vcpus, memory)))
    for segment, source in zip(list(elf.iter_segments())[1:], filter(attrgetter("frames"), memory), strict=True):
        assert segment.data() == b"".join(bytes(chunk) for chunk in source.chunks)
    assert elf.get_section_by_name(".xen_pages").data_size == sum(lengths) * PAGE_SIZE


def test_progress_ends_with_all_pages() -> None:
    seen: list[Progress] = []
    write_core(io.BytesIO(), "web", VCPUS, [run(0, b"a", b"b"), run(9, b"c")], [], seen.append)
    assert (seen[-1].done, seen[-1].total) == (3, 3)
    assert [progress.done for progress in seen] == sorted(progress.done for progress in seen)


def test_a_run_that_is_shorter_or_longer_than_it_says_is_refused() -> None:
    for frames in (1, 3):
        wrong = MemoryRun(0, frames, [0] * frames, [bytes(2 * PAGE_SIZE)])
        with pytest.raises(ToolstackError, match="pages long"):
            write_core(io.BytesIO(), "web", [], [wrong], [])
    with pytest.raises(ToolstackError, match="gmfns"):
        write_core(io.BytesIO(), "web", [], [MemoryRun(0, 2, [0], [])], [])


@pytest.mark.skipif(not shutil.which("gdb"), reason="gdb is not installed")
def test_gdb_shows_vcpus_as_threads_with_registers_and_memory(tmp_path: Path) -> None:
    core = tmp_path / "core"
    core.write_bytes(core_of(VCPUS, [run(2, b"Xenolith was here\0")]))
    commands = ["info threads", "thread 2", "info registers rip rsp", f"x/s {DIRECT_MAP + 2 * PAGE_SIZE:#x}"]
    arguments = [word for command in commands for word in ("-ex", command)]
    shown = subprocess.run(
        ["gdb", "-nx", "-batch", *arguments, "-c", str(core)], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert "Core was generated by `web'" in shown
    assert "LWP 1" in shown and "LWP 2" in shown
    assert f"{0x2000 + REGISTERS.index('rip'):#x}" in shown
    assert f"{0x2000 + REGISTERS.index('rsp'):#x}" in shown
    assert '"Xenolith was here"' in shown
