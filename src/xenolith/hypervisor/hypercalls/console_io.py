"""console_io: the emergency console (public/xen.h, CONSOLEIO_*).

Release builds of Xen refuse it to a domU.  Here every domain may write, into a log of its own: what a kernel prints
before its console driver runs is the best hint at why it does not boot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xenolith.abi.errno import E2BIG, EFAULT, ENOSYS
from xenolith.abi.hypercalls import INT_MAX, CONSOLEIO_read, CONSOLEIO_write
from xenolith.hypervisor.guest_memory import copy_from_guest

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Domain, Vcpu

MOST_AT_ONCE: Final = 1 << 20
CHUNK: Final = 4096


def do_console_io(vcpu: Vcpu, cmd: int, count: int, buffer: int) -> int:
    """console_io. Nothing is ever there to be read."""
    cmd, count = cmd & 0xFFFFFFFF, count & 0xFFFFFFFF
    if cmd == CONSOLEIO_write:
        return _write(vcpu, count, buffer)
    if cmd == CONSOLEIO_read:
        return -E2BIG if count > INT_MAX else 0
    return -ENOSYS


def _write(vcpu: Vcpu, count: int, buffer: int) -> int:
    """Page by page, as far as the buffer can be read; more than MOST_AT_ONCE is cut off with -E2BIG."""
    domain: Domain = vcpu.domain
    done = 0
    while done < min(count, MOST_AT_ONCE):
        size = min(CHUNK - (buffer + done & CHUNK - 1), count - done)
        data = copy_from_guest(vcpu, buffer + done, size)
        if data is None:
            return -EFAULT
        domain.emergency_console.write(data)
        done += size
    return 0 if done >= count else -E2BIG
