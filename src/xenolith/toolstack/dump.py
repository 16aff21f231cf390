"""From a domain that stands still to a core file: what `coredump` needs, asked of the control interface."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np

from xenolith.abi import vcpu_context
from xenolith.abi.vcpu_context import VcpuContext, VGCF_in_kernel
from xenolith.hypervisor.control import Control
from xenolith.machine.memory import Frames
from xenolith.toolstack.client import OnProgress, ToolstackError
from xenolith.toolstack.coredump import REGISTERS, Mapping, MemoryRun, SupportsWrite, VcpuState, write_core

CHUNK_PAGES: Final = 256


def dump_domain(control: Control, domid: int, name: str, path: Path, progress: OnProgress) -> None:
    """Write a core of a domain that is paused or has shut down.

    A file is complete or what it was before; a symbolic link stays one, and what it leads to is written. A device is
    written to as it is. Anything else that is there already is refused.
    """
    vcpus = [_vcpu(context) for context in control.contexts(domid)]
    mappings = [Mapping(run.va, run.pfn, run.pages) for run in control.linear_runs(domid)]
    memory = _memory(control, domid)
    try:
        with _core_file(path) as file:
            write_core(file, name, vcpus, memory, mappings, progress)
    except OSError as error:
        raise ToolstackError(f"cannot write the core file {path}: {error.strerror}") from error


@contextmanager
def _core_file(path: Path) -> Iterator[SupportsWrite]:
    try:
        kind = path.stat().st_mode
    except FileNotFoundError:
        kind = stat.S_IFREG
    if stat.S_ISCHR(kind) or stat.S_ISBLK(kind):
        with open(path, "wb", opener=lambda name, flags: os.open(name, os.O_WRONLY | os.O_NOCTTY)) as device:
            yield device
        return
    if not stat.S_ISREG(kind):
        raise ToolstackError(f"cannot write the core file {path}: it is neither a file nor a device")
    target = path.resolve()
    # Its name may be as long as names may be.
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name[:100]}.", delete=False) as file:
        aside = Path(file.name)
        try:
            yield file
            file.close()
            aside.replace(target)
        except BaseException:
            aside.unlink()
            raise


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
