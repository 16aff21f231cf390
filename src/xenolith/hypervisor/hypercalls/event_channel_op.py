"""event_channel_op: what a guest asks of its event channels (public/event_channel.h; Xen: do_event_channel_op)."""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import TYPE_CHECKING, Final

from xenolith.abi.errno import EFAULT, EINVAL, ENOSYS, EPERM, ESRCH
from xenolith.abi.event_fifo import EVTCHN_FIFO_LINK_BITS
from xenolith.abi.hypercalls import (
    DOMID_SELF,
    EVTCHNOP_alloc_unbound,
    EVTCHNOP_bind_interdomain,
    EVTCHNOP_bind_ipi,
    EVTCHNOP_bind_pirq,
    EVTCHNOP_bind_vcpu,
    EVTCHNOP_bind_virq,
    EVTCHNOP_close,
    EVTCHNOP_expand_array,
    EVTCHNOP_init_control,
    EVTCHNOP_reset,
    EVTCHNOP_send,
    EVTCHNOP_set_priority,
    EVTCHNOP_status,
    EVTCHNOP_unmask,
    EVTCHNSTAT_closed,
    EVTCHNSTAT_interdomain,
    EVTCHNSTAT_ipi,
    EVTCHNSTAT_unbound,
    EVTCHNSTAT_virq,
    HYPERVISOR_event_channel_op,
)
from xenolith.abi.layout import U16, U32, U64
from xenolith.hypervisor.events import FREE, INTERDOMAIN, IPI, RESERVED, UNBOUND, VIRQ, binding_lock
from xenolith.hypervisor.guest_memory import READ, copy_from_guest, copy_to_guest, translate

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Domain, Vcpu

_ALLOC_UNBOUND = Struct("<HHI")  # dom, remote_dom, port
_BIND_INTERDOMAIN = Struct("<HHII")  # remote_dom, pad, remote_port, local_port
_BIND_VIRQ = Struct("<III")  # virq, vcpu, port
_BIND_PIRQ = Struct("<III")  # pirq, flags, port
_BIND_IPI = Struct("<II")  # vcpu, port
_BIND_VCPU = Struct("<II")  # port, vcpu
_STATUS = Struct("<HHI")  # dom, pad, port; then status and vcpu, then what the status tells of
_INIT_CONTROL = Struct("<QIIB7x")  # control_gfn, offset, vcpu, link_bits
_SET_PRIORITY = Struct("<II")  # port, priority
_EVTCHN_OP_SIZE = 28  # struct evtchn_op: the command and a union of the above
EVTCHNOP_reset_cont: Final = 14  # Xen's own continuation of a reset
STATUS: Final = {
    FREE: EVTCHNSTAT_closed,
    RESERVED: EVTCHNSTAT_closed,
    UNBOUND: EVTCHNSTAT_unbound,
    INTERDOMAIN: EVTCHNSTAT_interdomain,
    VIRQ: EVTCHNSTAT_virq,
    IPI: EVTCHNSTAT_ipi,
}
NR_PIRQS: Final = 56  # as Xen counts them on a machine with one I/O APIC of 24 pins; a domU may bind none of them


def domain_by_any_id(vcpu: Vcpu, domid: int) -> Domain | None:
    """The domain a guest names, DOMID_SELF being itself (Xen: rcu_lock_domain_by_any_id)."""
    if domid in (DOMID_SELF, vcpu.domain.domid):
        return vcpu.domain
    return vcpu.domain.hypervisor.domain(domid)


def _target(vcpu: Vcpu, domid: int) -> Domain | int:
    """The domain an operation is for: only a privileged one may name another (Xen: XSM_TARGET)."""
    domain = domain_by_any_id(vcpu, domid)
    if domain is None:
        return -ESRCH
    if domain is not vcpu.domain and not vcpu.domain.privileged:
        return -EPERM
    return domain


def _answer_port(vcpu: Vcpu, va: int, port: int) -> int:
    if port < 0:
        return port
    return 0 if copy_to_guest(vcpu, va, U32.pack(port)) else -EFAULT


def _op_alloc_unbound(vcpu: Vcpu, data: bytes, va: int) -> int:
    domid, remote_domid, _ = _ALLOC_UNBOUND.unpack(data)
    domain = _target(vcpu, domid)
    if isinstance(domain, int):
        return domain
    if remote_domid == DOMID_SELF:
        remote_domid = vcpu.domain.domid
    return _answer_port(vcpu, va + 4, domain.events.alloc_unbound(remote_domid))


def _op_bind_interdomain(vcpu: Vcpu, data: bytes, va: int) -> int:
    remote_domid, _, remote_port, _ = _BIND_INTERDOMAIN.unpack(data)
    remote = domain_by_any_id(vcpu, remote_domid)
    if remote is None:
        return -ESRCH
    return _answer_port(vcpu, va + 8, vcpu.domain.events.bind_interdomain(remote, remote_port))


def _op_bind_virq(vcpu: Vcpu, data: bytes, va: int) -> int:
    virq, vcpu_id, _ = _BIND_VIRQ.unpack(data)
    return _answer_port(vcpu, va + 8, vcpu.domain.events.bind_virq(virq, vcpu_id))


def _op_bind_ipi(vcpu: Vcpu, data: bytes, va: int) -> int:
    vcpu_id, _ = _BIND_IPI.unpack(data)
    return _answer_port(vcpu, va + 4, vcpu.domain.events.bind_ipi(vcpu_id))


def _op_bind_pirq(vcpu: Vcpu, data: bytes, va: int) -> int:
    pirq, _, _ = _BIND_PIRQ.unpack(data)
    return -EPERM if pirq < NR_PIRQS else -EINVAL


def _op_bind_vcpu(vcpu: Vcpu, data: bytes, va: int) -> int:
    port, vcpu_id = _BIND_VCPU.unpack(data)
    return vcpu.domain.events.bind_vcpu(port, vcpu_id)


def _op_close(vcpu: Vcpu, data: bytes, va: int) -> int:
    return vcpu.domain.events.close(U32.unpack(data)[0])


def _op_send(vcpu: Vcpu, data: bytes, va: int) -> int:
    return vcpu.domain.events.send(U32.unpack(data)[0])


def _op_unmask(vcpu: Vcpu, data: bytes, va: int) -> int:
    return vcpu.domain.events.unmask(U32.unpack(data)[0])


def _op_status(vcpu: Vcpu, data: bytes, va: int) -> int:
    domid, _, port = _STATUS.unpack(data)
    domain = domain_by_any_id(vcpu, domid)
    if domain is None:
        return -ESRCH
    channels = domain.events
    with binding_lock:
        if not channels.valid(port):
            return -EINVAL
        if domain is not vcpu.domain and not vcpu.domain.privileged:
            return -EPERM
        state = channels.state[port]
        answer = U32.pack(STATUS[state]) + U32.pack(channels.vcpu_id[port])
        if state == UNBOUND:
            answer += U16.pack(channels.remote_domid[port])
        elif state == INTERDOMAIN:
            answer += _STATUS.pack(channels.remote_domid[port], 0, channels.remote_port[port])
        elif state == VIRQ:
            answer += U32.pack(channels.virq[port])
    return 0 if copy_to_guest(vcpu, va + 8, answer) else -EFAULT


def _op_init_control(vcpu: Vcpu, data: bytes, va: int) -> int:
    mfn, offset, vcpu_id, _ = _INIT_CONTROL.unpack(data)
    status = vcpu.domain.events.init_control(vcpu_id, mfn, offset)
    if status:
        return status
    answer = _INIT_CONTROL.pack(mfn, offset, vcpu_id, EVTCHN_FIFO_LINK_BITS)
    return 0 if copy_to_guest(vcpu, va, answer) else -EFAULT


def _op_expand_array(vcpu: Vcpu, data: bytes, va: int) -> int:
    return vcpu.domain.events.expand_array(U64.unpack(data)[0])


def _op_set_priority(vcpu: Vcpu, data: bytes, va: int) -> int:
    return vcpu.domain.events.set_priority(*_SET_PRIORITY.unpack(data))


def _op_reset(vcpu: Vcpu, data: bytes, va: int) -> int:
    domain = _target(vcpu, U16.unpack(data)[0])
    if isinstance(domain, int):
        return domain
    if domain is not vcpu.domain and not domain.paused_by_control:
        return -EINVAL
    if domain is not vcpu.domain:
        domain.work_left = vcpu.domain.work_left
    if domain.events.reset():
        return 0
    return vcpu.restart_hypercall(HYPERVISOR_event_channel_op, EVTCHNOP_reset, va)


_OPERATIONS: Final[dict[int, tuple[int, Callable[[Vcpu, bytes, int], int]]]] = {
    EVTCHNOP_bind_interdomain: (_BIND_INTERDOMAIN.size, _op_bind_interdomain),
    EVTCHNOP_bind_virq: (_BIND_VIRQ.size, _op_bind_virq),
    EVTCHNOP_bind_pirq: (_BIND_PIRQ.size, _op_bind_pirq),
    EVTCHNOP_close: (4, _op_close),
    EVTCHNOP_send: (4, _op_send),
    EVTCHNOP_status: (_STATUS.size, _op_status),
    EVTCHNOP_alloc_unbound: (_ALLOC_UNBOUND.size, _op_alloc_unbound),
    EVTCHNOP_bind_ipi: (_BIND_IPI.size, _op_bind_ipi),
    EVTCHNOP_bind_vcpu: (_BIND_VCPU.size, _op_bind_vcpu),
    EVTCHNOP_unmask: (4, _op_unmask),
    EVTCHNOP_reset: (2, _op_reset),
    EVTCHNOP_reset_cont: (2, _op_reset),
    EVTCHNOP_init_control: (_INIT_CONTROL.size, _op_init_control),
    EVTCHNOP_expand_array: (8, _op_expand_array),
    EVTCHNOP_set_priority: (_SET_PRIORITY.size, _op_set_priority),
}


def do_event_channel_op(vcpu: Vcpu, cmd: int, arg: int) -> int:
    """event_channel_op: one operation on the domain's ports, its argument at `arg`."""
    cmd &= 0xFFFFFFFF
    if cmd == EVTCHNOP_send and arg & 3 == 0:  # the hot one
        address = translate(vcpu, arg, READ)
        if address < 0:
            return -EFAULT
        domain = vcpu.domain
        return domain.events.send(domain.memory.d[address >> 2])
    operation = _OPERATIONS.get(cmd)
    if operation is None:
        return -ENOSYS
    size, function = operation
    data = copy_from_guest(vcpu, arg, size)
    if data is None:
        return -EFAULT
    return function(vcpu, data, arg)


def do_event_channel_op_compat(vcpu: Vcpu, arg: int) -> int:
    """The first form of event_channel_op: command and argument in one structure."""
    data = copy_from_guest(vcpu, arg, _EVTCHN_OP_SIZE)
    if data is None:
        return -EFAULT
    cmd = U32.unpack_from(data)[0]
    if cmd > EVTCHNOP_unmask:
        return -ENOSYS
    return do_event_channel_op(vcpu, cmd, arg + 4)
