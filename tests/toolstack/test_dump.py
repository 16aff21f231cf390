"""A core of a domain that runs is what a debugger finds in it: registers, memory at its own addresses, contexts."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from elftools.elf.elffile import ELFFile

from xenolith.abi import vcpu_context
from xenolith.abi.hypercalls import SHUTDOWN_crash
from xenolith.dom0.image import load_image
from xenolith.toolstack.client import InvalidRequest, ToolstackError, Trigger
from xenolith.toolstack.config.domain import DomainConfig
from xenolith.toolstack.embedded import EmbeddedToolstack

if TYPE_CHECKING:
    from machines import Machine

GUESTS = Path(__file__).parents[2] / "guests" / "prebuilt"


@pytest.fixture
def crashed(machine: Callable[[int], Machine]) -> tuple[EmbeddedToolstack, int]:
    """A toolstack with a domain that jumped to an address where nothing is."""
    toolstack = EmbeddedToolstack(machine(32).dom0)
    kernel = str(GUESTS / "crash.elf")
    domid = toolstack.create(DomainConfig("crashed", kernel=kernel, target_memory_kib=32 << 10, cmdline="no-handler"))
    events = toolstack.subscribe()
    toolstack.unpause(domid)
    event = events.get(60)
    assert event is not None and event.reason == SHUTDOWN_crash
    return toolstack, domid


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


def test_an_nmi_for_a_vcpu_that_is_none_is_refused(crashed: tuple[EmbeddedToolstack, int]) -> None:
    toolstack, domid = crashed
    with pytest.raises(InvalidRequest, match="no vCPU 7"):
        toolstack.trigger(domid, Trigger.NMI, 7)
