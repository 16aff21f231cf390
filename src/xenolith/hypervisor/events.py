"""Event channels: Xen's asynchronous notifications (paper 3.2.1 and 3.4; public/event_channel.h).

An event channel is a *port* of a domain.  A port is bound to a port of another domain (interdomain), to a VIRQ, to
an interprocessor event, or waits for its peer (unbound).  Setting a port pending sets its bit in the domain's
shared_info; unless the guest has masked the port, also the bit of that word in the target vCPU's selector and the
vCPU's upcall_pending byte, upon which `traps` bounces to the event callback.  That is the 2-level ABI, which every
domain begins with; `event_fifo` has the words and queues of the other.

Who sets the bits.  A guest changes the same words with locked instructions.  Those are atomic against other
threads on KVM, but not on Unicorn, so the bits are set on the domain's own threads only: any other thread *posts* the
port (`post`), which takes no lock, and the domain *drains* what was posted at its next trap boundary (`drain`).
KVM runs several vCPUs of a domain at once, hence the bits are changed by locked instructions besides.

dom0 is Python and has no shared_info: its ports call a handler on the thread of whoever sent (python_domain).

Bindings of all domains change under one lock, `binding_lock`: the innermost of all locks, held for a few
assignments, so that binding two domains needs neither domain's lock.  Sending reads bindings without it.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from xenolith.abi.errno import EEXIST, EINVAL, ENOENT, ENOSPC, ENOSYS
from xenolith.abi.event_fifo import EVENT_WORDS_PER_PAGE, EVTCHN_FIFO_NR_CHANNELS
from xenolith.abi.extensions import VIRQ_XENOLITH_VIRTUAL_TIMER
from xenolith.abi.hypercalls import (
    EVTCHN_2L_NR_CHANNELS,
    NR_VIRQS,
    VIRQ_DEBUG,
    VIRQ_TIMER,
    VIRQ_XENOPROF,
    VIRQ_XENPMU,
    SHUTDOWN_watchdog,
)
from xenolith.abi.layout import SHARED_EVTCHN_MASK, SHARED_EVTCHN_PENDING, VCPU_INFO_PENDING_SEL
from xenolith.hypervisor import event_fifo
from xenolith.hypervisor.shutdown import domain_shutdown
from xenolith.machine.atomic import clear_bit, set_bit
from xenolith.machine.native import buffer_address

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Domain, Vcpu

DEFAULT_MAX_PORT: Final = 1023  # as xl.cfg's max_event_channels
PORTS_PER_BUCKET: Final = 64  # the port table grows by buckets; a port is valid once its bucket exists
CLOSE_WORK: Final = 2  # of Domain.work_left, for a port
MOST_BUSY: Final = 1024  # free ports that the guest has yet to take from its queues, passed over in search of another

# Port states (Xen: ECS_*).
FREE: Final = 0
RESERVED: Final = 1  # port 0
UNBOUND: Final = 2
INTERDOMAIN: Final = 3
VIRQ: Final = 5
IPI: Final = 6
PER_VCPU_VIRQS: Final = frozenset((VIRQ_TIMER, VIRQ_DEBUG, VIRQ_XENOPROF, VIRQ_XENPMU, VIRQ_XENOLITH_VIRTUAL_TIMER))

# Domain.posted holds ports, ~vcpu_id for a poll whose time is up, and these:
_WATCHDOG: Final = -(1 << 31)
_CODE_WRITTEN: Final = -(1 << 40)  # of a frame in Domain.code_written

Handler = Callable[[int], None]

binding_lock = threading.RLock()


class EventChannels:
    """A domain's ports, as flat tables indexed by port number.

    Methods that bind return a port or a negative errno, others 0 or a negative errno.
    """

    def __init__(self, domain: Domain, max_port: int = DEFAULT_MAX_PORT) -> None:
        self.domain = domain
        self.max_port = min(max_port, EVTCHN_FIFO_NR_CHANNELS - 1)
        count = self.max_port + 1
        self.valid_ports = min(count, PORTS_PER_BUCKET)
        self.state = bytearray(count)
        self.state[0] = RESERVED
        self.remote_domid = [0] * count  # unbound: who may bind; interdomain: the peer
        self.remote: list[Domain | None] = [None] * count
        self.remote_port = [0] * count
        self.virq = [0] * count
        self.vcpu_id = [0] * count  # the vCPU that is notified
        # eventfd that stands for the peer's handler, by which native code notifies it; -1: none. The domain's lock.
        self.bells = (ctypes.c_int32 * count)(*[-1] * count)
        domain.bells, domain.bell_count = ctypes.addressof(self.bells), count
        self.posted = bytearray(count)  # 1: the port is in Domain.posted
        queues = bytearray(count * event_fifo.QUEUE_BYTES)
        domain.port_queues, domain.queues_address = memoryview(queues), buffer_address(queues)
        self.pollers: list[Vcpu] = []  # vCPUs in SCHEDOP_poll
        self.interrupt: Handler | None = None  # of a domain in Python (python_domain), instead of bits in shared_info

    # --- binding ---

    def valid(self, port: int) -> bool:
        return 0 <= port < self.valid_ports

    def _allocate(self) -> int:
        bitmaps = not self.domain.fifo and self.domain.engine is not None  # a domain in Python has no shared_info
        end = min(self.max_port + 1, EVTCHN_2L_NR_CHANNELS) if bitmaps else self.max_port + 1
        port = 0
        for _ in range(MOST_BUSY):
            port = self.state.find(FREE, port + 1, end)
            if port < 0:
                return -ENOSPC
            if not self.domain.fifo or not event_fifo.busy(self.domain, port):
                self.make_valid(port)
                self.vcpu_id[port] = 0
                event_fifo.reset_port(self.domain, port)
                return port
        return -ENOSPC

    def make_valid(self, port: int) -> None:
        while port >= self.valid_ports:
            self.valid_ports = min(self.valid_ports + PORTS_PER_BUCKET, self.max_port + 1)

    def alloc_unbound(self, remote_domid: int) -> int:
        """A new port that `remote_domid` may bind to."""
        with binding_lock:
            port = self._allocate()
            if port > 0:
                self.state[port] = UNBOUND
                self.remote_domid[port] = remote_domid
        return port

    def bind_interdomain(self, remote: Domain, remote_port: int) -> int:
        """A new port connected to an unbound port of `remote` that waits for this domain."""
        theirs = remote.events
        with binding_lock:
            port = self._allocate()
            if port < 0:
                return port
            if (
                not theirs.valid(remote_port)
                or theirs.state[remote_port] != UNBOUND
                or theirs.remote_domid[remote_port] != self.domain.domid
            ):
                return -EINVAL
            self._connect(port, remote, remote_port)
            theirs._connect(remote_port, self.domain, port)
        self._notify_self(port)  # an event sent to the unbound port was lost: make the binder look
        return port

    def _connect(self, port: int, remote: Domain, remote_port: int) -> None:
        self.remote[port] = remote
        self.remote_domid[port] = remote.domid
        self.remote_port[port] = remote_port
        self.state[port] = INTERDOMAIN

    def bind_virq(self, virq: int, vcpu_id: int) -> int:
        """A new port for a virtual interrupt of a vCPU (global ones: vCPU 0)."""
        if virq >= NR_VIRQS or (virq not in PER_VCPU_VIRQS and vcpu_id):
            return -EINVAL
        if vcpu_id >= len(self.domain.vcpus):
            return -ENOENT
        vcpu = self.domain.vcpus[vcpu_id]
        with binding_lock:
            if vcpu.virq_port[virq]:
                return -EEXIST
            port = self._allocate()
            if port > 0:
                self.state[port] = VIRQ
                self.virq[port] = virq
                self.vcpu_id[port] = vcpu_id
                vcpu.virq_port[virq] = port
        return port

    def bind_ipi(self, vcpu_id: int) -> int:
        """A new port by which the domain notifies one of its own vCPUs."""
        if vcpu_id >= len(self.domain.vcpus):
            return -ENOENT
        with binding_lock:
            port = self._allocate()
            if port > 0:
                self.state[port] = IPI
                self.vcpu_id[port] = vcpu_id
        return port

    def bind_vcpu(self, port: int, vcpu_id: int) -> int:
        """Choose the vCPU that a port notifies; those bound to one vCPU by nature cannot move."""
        if vcpu_id >= len(self.domain.vcpus):
            return -ENOENT
        with binding_lock:
            if not self.valid(port):
                return -EINVAL
            state = self.state[port]
            if (state == VIRQ and self.virq[port] in PER_VCPU_VIRQS) or state not in (VIRQ, UNBOUND, INTERDOMAIN):
                return -EINVAL
            self.vcpu_id[port] = vcpu_id
        return 0

    def close(self, port: int) -> int:
        """Free a port. The peer of an interdomain port is unbound again, waiting for this domain."""
        with binding_lock:
            if not self.valid(port) or self.state[port] in (FREE, RESERVED):
                return -EINVAL
            if self.state[port] == VIRQ:
                self.domain.vcpus[self.vcpu_id_of_virq(port)].virq_port[self.virq[port]] = 0
            remote = self.remote[port]
            if remote is not None:
                theirs, their_port = remote.events, self.remote_port[port]
                theirs.state[their_port] = UNBOUND
                theirs.remote[their_port] = None
                theirs.remote_domid[their_port] = self.domain.domid
                theirs.bells[their_port] = self.bells[port] = -1
                self.remote[port] = None
            self.state[port] = FREE
        if self.domain.fifo:
            event_fifo.clear_pending(self.domain, port)
        elif self.domain.shared_info:
            clear_bit(self.domain.memory.address + self.domain.shared_info + SHARED_EVTCHN_PENDING, port)
        return 0

    def vcpu_id_of_virq(self, port: int) -> int:
        """The vCPU whose VIRQ this port is (a global one may notify another)."""
        return self.vcpu_id[port] if self.virq[port] in PER_VCPU_VIRQS else 0

    def close_all(self) -> bool:
        """Free every port: EVTCHNOP_reset, and the end of the domain. False: some are left, as no work was."""
        for port in range(1, self.valid_ports):
            if self.state[port] not in (FREE, RESERVED):
                if self.domain.work_left <= 0:
                    return False
                self.domain.work_left -= CLOSE_WORK
                self.close(port)
        return True

    def reset(self) -> bool:
        """EVTCHNOP_reset: free every port, and go back to the bitmaps. False: as `close_all`."""
        if not self.close_all():
            return False
        event_fifo.give_up(self.domain)
        self.valid_ports = min(self.valid_ports, EVTCHN_2L_NR_CHANNELS)
        return True

    def references(self) -> Iterator[tuple[int, int | None]]:
        """References to frames, as Domain.references."""
        return event_fifo.references(self.domain)

    # --- notification ---

    def send(self, port: int) -> int:
        """Notify the other end of an interdomain or IPI port. On the domain's own thread, or any of dom0's."""
        if not self.valid(port):
            return -EINVAL
        state = self.state[port]
        if state == INTERDOMAIN:
            remote, remote_port = self.remote[port], self.remote_port[port]
            if remote is self.domain:
                self._notify_self(remote_port)
            elif remote is not None:
                post(remote, remote_port)
            return 0
        if state == IPI:
            self.set_pending(port)
            return 0
        return 0 if state == UNBOUND else -EINVAL

    def _notify_self(self, port: int) -> None:
        if self.interrupt is not None:
            self.interrupt(port)
        else:
            self.set_pending(port)

    def set_pending(self, port: int) -> None:
        """Raise an event. The domain's own thread, holding its lock."""
        domain = self.domain
        if domain.fifo:
            vcpu = domain.vcpus[self.vcpu_id[port]]
            self._raised(port, vcpu, *event_fifo.set_pending(domain, vcpu, port))
        elif self._set_bits(port) and self.pollers:
            self._wake_pollers(port)

    def _raised(self, port: int, vcpu: Vcpu, is_new: bool, notify: bool) -> None:
        if notify:
            mark_events_pending(vcpu)
        if is_new and self.pollers:
            self._wake_pollers(port)

    def _set_bits(self, port: int) -> bool:
        """Set a port's bits (Xen: evtchn_2l_set_pending); whether it was not pending."""
        domain = self.domain
        memory = domain.memory
        shared_info = domain.shared_info
        if set_bit(memory.address + shared_info + SHARED_EVTCHN_PENDING, port):
            return False
        word = port >> 6
        if not memory.q[(shared_info + SHARED_EVTCHN_MASK >> 3) + word] >> (port & 63) & 1:
            vcpu = domain.vcpus[self.vcpu_id[port]]
            if not set_bit(memory.address + vcpu.info + VCPU_INFO_PENDING_SEL, word):
                mark_events_pending(vcpu)
        return True

    def _wake_pollers(self, port: int) -> None:
        scheduler = self.domain.hypervisor.scheduler
        for vcpu in self.pollers.copy():
            if vcpu.poll_port in (port, -1):
                scheduler.unblock(vcpu)

    # --- the FIFO ABI ---

    def init_control(self, vcpu_id: int, mfn: int, offset: int) -> int:
        """Give a vCPU its control block, in a frame of the domain's."""
        if vcpu_id >= len(self.domain.vcpus):
            return -ENOENT
        return event_fifo.init_control(self.domain, self.domain.vcpus[vcpu_id], mfn, offset, self.valid_ports)

    def expand_array(self, mfn: int) -> int:
        """Add a frame of the domain's to the event array, and raise what was pending there."""
        status = event_fifo.expand_array(self.domain, mfn)
        if not status:
            end = event_fifo.event_pages(self.domain) * EVENT_WORDS_PER_PAGE
            for port in range(end - EVENT_WORDS_PER_PAGE, min(end, self.valid_ports)):
                if event_fifo.take_early(self.domain, port):
                    self.set_pending(port)
        return status

    def set_priority(self, port: int, priority: int) -> int:
        """Choose the queue of a port's future events."""
        if not self.valid(port):
            return -EINVAL
        if not self.domain.fifo:
            return -ENOSYS
        return event_fifo.set_priority(self.domain, port, priority)

    # --- the bits of the guest ---

    def pending(self, port: int) -> bool:
        domain = self.domain
        if domain.fifo:
            return event_fifo.pending(domain, port)
        word = domain.memory.q[(domain.shared_info + SHARED_EVTCHN_PENDING >> 3) + (port >> 6)]
        return bool(word >> (port & 63) & 1)

    def unmask(self, port: int) -> int:
        """Clear a port's mask bit and notify its vCPU if the port is pending (Xen: evtchn_2l_unmask)."""
        if not self.valid(port):
            return -EINVAL
        if self.state[port] <= RESERVED:
            return 0
        domain = self.domain
        if domain.fifo:
            vcpu = domain.vcpus[self.vcpu_id[port]]
            self._raised(port, vcpu, *event_fifo.unmask(domain, vcpu, port))
            return 0
        shared_info = domain.memory.address + domain.shared_info
        if clear_bit(shared_info + SHARED_EVTCHN_MASK, port) and self.pending(port):
            vcpu = domain.vcpus[self.vcpu_id[port]]
            if not set_bit(domain.memory.address + vcpu.info + VCPU_INFO_PENDING_SEL, port >> 6):
                mark_events_pending(vcpu)
        return 0


# --- from any thread -------------------------------------------------------------------------------


def post(domain: Domain, port: int) -> None:
    """Set a port pending soon. From any thread; takes no lock."""
    channels = domain.events
    if channels.interrupt is not None:
        channels.interrupt(port)
        return
    if channels.posted[port]:
        return  # whoever posted it has kicked the domain, which has not looked yet
    channels.posted[port] = 1
    domain.posted.append(port)
    domain.hypervisor.scheduler.kick(domain.vcpus[channels.vcpu_id[port]])


def post_unblock(vcpu: Vcpu) -> None:
    """End a vCPU's SCHEDOP_poll soon, its time being up. From any thread; takes no lock."""
    vcpu.domain.posted.append(~vcpu.vcpu_id)
    vcpu.domain.hypervisor.scheduler.kick(vcpu)


def post_watchdog(domain: Domain) -> None:
    """A watchdog of the domain's has run out: it shuts down soon. From any thread; takes no lock."""
    domain.posted.append(_WATCHDOG)
    domain.hypervisor.scheduler.kick(domain.vcpus[0])


def post_code_written(domain: Domain, mfn: int) -> None:
    """Somebody outside the domain has written to one of its frames: code translated from it is stale."""
    if domain.executable_mapped is not None and mfn not in domain.code_written:
        domain.code_written.add(mfn)
        domain.posted.append(_CODE_WRITTEN)
        domain.hypervisor.scheduler.kick(domain.vcpus[0])


def drain(domain: Domain) -> None:
    """Apply what was posted. The domain's own thread, holding its lock."""
    posted = domain.posted
    channels = domain.events
    while posted:
        try:
            port = posted.popleft()
        except IndexError:
            return
        if port < 0:
            _apply_request(domain, port)
            continue
        channels.posted[port] = 0
        if channels.state[port] not in (FREE, UNBOUND):  # closed meanwhile
            channels.set_pending(port)


def _apply_request(domain: Domain, request: int) -> None:
    if request == _CODE_WRITTEN:
        if domain.code_written:  # two threads may have posted the same frame
            mfn = domain.code_written.pop()
            if domain.executable_mapped is not None:
                domain.executable_mapped(mfn)
        return
    if request == _WATCHDOG:
        domain_shutdown(domain, SHUTDOWN_watchdog)
        return
    vcpu = domain.vcpus[~request]
    if vcpu.poll_port:
        domain.hypervisor.scheduler.unblock(vcpu)


def mark_events_pending(vcpu: Vcpu) -> None:
    """The vCPU has something in its selector (Xen: vcpu_mark_events_pending)."""
    memory = vcpu.domain.memory.b
    if memory[vcpu.info]:
        return
    memory[vcpu.info] = 1
    scheduler = vcpu.domain.hypervisor.scheduler
    if vcpu.blocked:
        scheduler.unblock(vcpu)
    else:
        scheduler.kick(vcpu)


def send_vcpu_virq(vcpu: Vcpu, virq: int) -> None:
    """Raise a vCPU's virtual interrupt, if the domain has bound it. From any thread; takes no lock."""
    port = vcpu.virq_port[virq]
    if port:
        post(vcpu.domain, port)


def send_global_virq(domain: Domain, virq: int) -> None:
    """Raise a global virtual interrupt, on account of a domain, with dom0, which handles them all."""
    dom0 = domain.hypervisor.domain(0)
    if dom0 is not None:
        send_vcpu_virq(dom0.vcpus[0], virq)
