"""multicall: a batch of hypercalls in one trap (paper 3.2; public/xen.h, multicall_entry).

Each entry's result is written into it.  The batch stops where an entry cannot be read or its result not be written.
It is restarted, with the entries done taken off, when somebody wants the vCPU to leave or the trap's work is used up
(see paging): nothing has to wait for a long batch.  A hypercall inside it that restarts itself gets its new arguments
into its entry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xenolith.abi.errno import EFAULT, EINVAL, ENOSYS
from xenolith.abi.hypercalls import HYPERCALLS, HYPERVISOR_iret, HYPERVISOR_multicall
from xenolith.abi.layout import HYPERVISOR_VIRT_END, HYPERVISOR_VIRT_START, MULTICALL_ENTRY, U64
from xenolith.abi.x86 import MASK64
from xenolith.hypervisor import paging
from xenolith.hypervisor.guest_memory import READ, WRITE, copy_from_guest, copy_to_guest, translate

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Vcpu

ENTRY: Final = MULTICALL_ENTRY.size
RESULT: Final = 8  # offset in an entry
ARGUMENTS: Final = 16
CALL_WORK: Final = 2  # see paging
_unpack = MULTICALL_ENTRY.unpack
_unpack_from = MULTICALL_ENTRY.unpack_from


def do_multicall(vcpu: Vcpu, call_list: int, nr_calls: int) -> int:
    """multicall. One inside another is refused with -EINVAL."""
    if vcpu.in_multicall:
        return -EINVAL
    nr_calls &= 0xFFFFFFFF
    end = call_list + nr_calls * ENTRY
    if end > 1 << 64 or (call_list < HYPERVISOR_VIRT_END and end > HYPERVISOR_VIRT_START):
        return -EFAULT
    vcpu.in_multicall = True
    try:
        return _run(vcpu, call_list, nr_calls)
    finally:
        vcpu.in_multicall = False


def _run(vcpu: Vcpu, call_list: int, nr_calls: int) -> int:
    domain = vcpu.domain
    memory = domain.memory
    table, counts = domain.hypercalls, domain.hypercall_counts
    for index in range(nr_calls):
        va = call_list + index * ENTRY
        if index and (vcpu.kicked or not vcpu.may_run or domain.work_left <= 0):
            return _restart(vcpu, va, nr_calls - index)
        if domain.undo_count and not vcpu.call_begun and not paging.undo(domain):
            return _restart(vcpu, va, nr_calls - index)
        address = -1
        if vcpu.call_begun:  # by native code
            vcpu.call_begun = False
            number, *arguments = vcpu.call
            address = 0
        elif va & 7 or va & 0xFFF > 0x1000 - ENTRY:
            data = copy_from_guest(vcpu, va, ENTRY)
            if data is None:
                return -EFAULT
            number, _, *arguments = _unpack(data)
        else:
            address = translate(vcpu, va, READ)
            if address < 0:
                return -EFAULT
            number, _, *arguments = _unpack_from(memory.b, address)
        if number < HYPERCALLS:
            counts[number] += 1
            domain.work_left -= CALL_WORK
            function, count = table[number]
            vcpu.restarted = False
            result: int = function(vcpu, *arguments[:count])
            if vcpu.restarted:
                vcpu.restarted = False
                return _restart_entry(vcpu, va, nr_calls - index)
            if number == HYPERVISOR_iret:
                return result  # the guest goes on elsewhere
        else:
            result = -ENOSYS
        # The call may have changed the page tables, so the address is looked up anew.
        if address >= 0:
            address = translate(vcpu, va, WRITE)
            if address < 0:
                return -EFAULT
            memory.q[address + RESULT >> 3] = result & MASK64
        elif not copy_to_guest(vcpu, va + RESULT, U64.pack(result & MASK64)):
            return -EFAULT
    return 0


def _restart(vcpu: Vcpu, va: int, remaining: int) -> int:
    vcpu.in_multicall = False
    return vcpu.restart_hypercall(HYPERVISOR_multicall, va, remaining)


def _restart_entry(vcpu: Vcpu, va: int, remaining: int) -> int:
    """The call of the entry at `va` is to go on with other arguments."""
    arguments = b"".join(U64.pack(argument & MASK64) for argument in vcpu.restart_arguments)
    if not copy_to_guest(vcpu, va + ARGUMENTS, arguments):
        return -EFAULT
    return _restart(vcpu, va, remaining)
