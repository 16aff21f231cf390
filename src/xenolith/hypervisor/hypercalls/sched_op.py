"""sched_op: what a domain asks of the scheduler about itself (public/sched.h)."""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import TYPE_CHECKING, Final

from xenolith.abi.errno import EFAULT, EINVAL, ENOSPC, ENOSYS, EPERM, ESRCH
from xenolith.abi.hypercalls import (
    SCHEDOP_block,
    SCHEDOP_pin_override,
    SCHEDOP_poll,
    SCHEDOP_remote_shutdown,
    SCHEDOP_shutdown,
    SCHEDOP_shutdown_code,
    SCHEDOP_watchdog,
    SCHEDOP_yield,
)
from xenolith.abi.layout import U32, VCPU_INFO_UPCALL_MASK
from xenolith.hypervisor.events import RESERVED, post_watchdog
from xenolith.hypervisor.guest_memory import address_ok, copy_from_guest
from xenolith.hypervisor.shutdown import domain_shutdown
from xenolith.hypervisor.time import NS_PER_SECOND, Timer

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Vcpu

MOST_POLLED_PORTS: Final = 128
WATCHDOGS: Final = 2
_POLL = Struct("<QIIQ")  # ports (a pointer), nr_ports, pad, timeout (system time, ns)
_REMOTE_SHUTDOWN = Struct("<HHI")  # domid, pad, reason
_WATCHDOG = Struct("<II")  # id, timeout (s)


def _events_pending(vcpu: Vcpu) -> bool:
    """Whether an upcall is due (Xen: local_events_need_delivery)."""
    memory = vcpu.domain.memory.b
    return bool(memory[vcpu.info] and not memory[vcpu.info + VCPU_INFO_UPCALL_MASK])


def _yield(vcpu: Vcpu, arg: int) -> int:
    vcpu.domain.hypervisor.scheduler.yield_(vcpu)
    return 0


def block(vcpu: Vcpu) -> None:
    """Unmask upcalls and sleep until one is due."""
    vcpu.domain.memory.b[vcpu.info + VCPU_INFO_UPCALL_MASK] = 0
    if not vcpu.domain.memory.b[vcpu.info] and not vcpu.nmi_pending:
        vcpu.domain.hypervisor.scheduler.block(vcpu)


def _block(vcpu: Vcpu, arg: int) -> int:
    block(vcpu)
    return 0


def _shutdown(vcpu: Vcpu, arg: int) -> int:
    data = copy_from_guest(vcpu, arg, 4)
    if data is None:
        return -EFAULT
    domain_shutdown(vcpu.domain, data[0])
    return 0


def _shutdown_code(vcpu: Vcpu, arg: int) -> int:
    """Name the reason of a later shutdown; the first counts."""
    data = copy_from_guest(vcpu, arg, 4)
    if data is None:
        return -EFAULT
    if vcpu.domain.shutdown_code is None:
        vcpu.domain.shutdown_code = data[0]
    return 0


def _poll(vcpu: Vcpu, arg: int) -> int:
    """Sleep until one of some ports is pending or a time has come, whatever is masked (Xen: do_poll)."""
    data = copy_from_guest(vcpu, arg, _POLL.size)
    if data is None:
        return -EFAULT
    ports_va, count, _, timeout = _POLL.unpack(data)
    if count > MOST_POLLED_PORTS:
        return -EINVAL
    if not address_ok(ports_va):
        return -EFAULT
    if _events_pending(vcpu):
        return 0
    channels = vcpu.domain.events
    port = 0
    for index in range(count):
        word = copy_from_guest(vcpu, ports_va + 4 * index, 4)
        if word is None:
            return -EFAULT
        port = U32.unpack(word)[0]
        if not channels.valid(port) or channels.state[port] <= RESERVED:
            return -EINVAL
        if channels.pending(port):
            return 0
    hypervisor = vcpu.domain.hypervisor
    vcpu.poll_port = port if count == 1 else -1
    channels.pollers.append(vcpu)
    hypervisor.scheduler.block(vcpu)
    if timeout:
        vcpu.timers.arm(vcpu.timers.poll, timeout)
    return 0


def _remote_shutdown(vcpu: Vcpu, arg: int) -> int:
    data = copy_from_guest(vcpu, arg, _REMOTE_SHUTDOWN.size)
    if data is None:
        return -EFAULT
    domain = vcpu.domain.hypervisor.domain(_REMOTE_SHUTDOWN.unpack(data)[0])
    if domain is None:
        return -ESRCH
    return -EPERM


def _watchdog(vcpu: Vcpu, arg: int) -> int:
    """Start (id 0), restart or stop (timeout 0) one of two watchdogs, each of which ends the domain."""
    data = copy_from_guest(vcpu, arg, _WATCHDOG.size)
    if data is None:
        return -EFAULT
    number, timeout = _WATCHDOG.unpack(data)
    if number > WATCHDOGS:
        return -EINVAL
    domain = vcpu.domain
    timers = domain.hypervisor.timers
    deadline = domain.hypervisor.clock.now() + timeout * NS_PER_SECOND
    if number == 0:
        if None not in domain.watchdogs:
            return -ENOSPC
        index = domain.watchdogs.index(None)
        timer = domain.watchdogs[index] = Timer(lambda: post_watchdog(domain))
        timers.set(timer, deadline)
        return index + 1
    existing = domain.watchdogs[number - 1]
    if existing is None:
        return -EINVAL
    if timeout:
        timers.set(existing, deadline)
    else:
        timers.cancel(existing)
        domain.watchdogs[number - 1] = None
    return 0


def _pin_override(vcpu: Vcpu, arg: int) -> int:
    return -EPERM  # for the hardware domain


_OPERATIONS: Final[dict[int, Callable[[Vcpu, int], int]]] = {
    SCHEDOP_yield: _yield,
    SCHEDOP_block: _block,
    SCHEDOP_shutdown: _shutdown,
    SCHEDOP_poll: _poll,
    SCHEDOP_remote_shutdown: _remote_shutdown,
    SCHEDOP_shutdown_code: _shutdown_code,
    SCHEDOP_watchdog: _watchdog,
    SCHEDOP_pin_override: _pin_override,
}


def do_sched_op(vcpu: Vcpu, cmd: int, arg: int) -> int:
    """sched_op."""
    operation = _OPERATIONS.get(cmd & 0xFFFFFFFF)
    return -ENOSYS if operation is None else operation(vcpu, arg)


def do_sched_op_compat(vcpu: Vcpu, cmd: int, arg: int) -> int:
    """The first form of sched_op: the shutdown reason is the argument itself."""
    cmd &= 0xFFFFFFFF
    if cmd == SCHEDOP_yield:
        return _yield(vcpu, arg)
    if cmd == SCHEDOP_block:
        return _block(vcpu, arg)
    if cmd == SCHEDOP_shutdown:
        domain_shutdown(vcpu.domain, arg & 0xFF)
        return 0
    return -ENOSYS
