"""From a domain that stands still to a core file: what `coredump` needs, asked of the control interface."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from xenolith.abi import vcpu_context
from xenolith.abi.vcpu_context import VcpuContext, VGCF_in_kernel
from xenolith.hypervisor.control import Control
from xenolith.machine.memory import Frames
from xenolith.toolstack.client import OnProgress, ToolstackError
from xenolith.toolstack.coredump import REGISTERS, Mapping, MemoryRun, VcpuState, write_core
from xenolith.toolstack.whole_file import whole_file

CHUNK_PAGES: Final = 256


def dump_domain(control: Control, domid: int, name: str, path: Path, progress: OnProgress) -> None:
    """Write a core of a domain that is paused or has shut down."""
    vcpus = [_vcpu(context) for context in control.contexts(domid)]
    mappings = [Mapping(run.va, run.pfn, run.pages) for run in control.linear_runs(domid)]
    memory = _memory(control, domid)
    try:
        with whole_file(path) as file:
            write_core(file, name, vcpus, memory, mappings, progress)
    except OSError as error:
        raise ToolstackError(f"cannot write the core file {path}: {error.strerror}") from error


def _vcpu(context: VcpuContext) -> VcpuState:
    kernel = context.flags & VGCF_in_kernel
    values = context.regs._asdict() | {
        "fs_base": context.fs_base,
        "gs_base": context.gs_base_kernel if kernel else context.gs_base_user,
        "orig_rax": (1 << 64) - 1,  # in no system call, as far as a debugger of programs need know
    }
    return VcpuState({register: values[register] for register in REGISTERS}, vcpu_context.pack(context))


def _memory(control: Control, domid: int) -> list[MemoryRun]:
    own = control.own_memory(domid)
    if not len(own.pfns):
        return []
    breaks = np.flatnonzero(np.diff(own.pfns) != 1) + 1
    parts = zip(np.split(own.pfns, breaks), np.split(own.mfns, breaks), strict=True)
    return [
        MemoryRun(int(pfns[0]), len(pfns), [int(mfn) for mfn in mfns], _chunks(control, domid, mfns))
        for pfns, mfns in parts
    ]


def _chunks(control: Control, domid: int, mfns: Frames) -> Iterator[bytes]:
    """The contents of frames, a chunk for each stretch that is consecutive in machine memory too."""
    for stretch in np.split(mfns, np.flatnonzero(np.diff(mfns.astype(np.int64)) != 1) + 1):
        for start in range(0, len(stretch), CHUNK_PAGES):
            part = stretch[start : start + CHUNK_PAGES]
            yield control.read_frames(domid, int(part[0]), len(part))
