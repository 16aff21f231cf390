"""The FIFO event channel ABI: what a domain shares with ring 0 in place of two bitmaps (Xen: event_fifo.c).

Every port has an *event word* in an array of pages that the guest provides: PENDING, MASKED, LINKED, and a link to
another port.  Every vCPU has 16 queues, one for each priority, whose heads are in a *control block* that the guest
provides too.  To raise an event ring 0 sets PENDING and puts the port at the tail of its queue, unless it is masked or
in a queue already; the guest takes ports from the head.  So the order of events is kept, the important come first, and
there are 2**17 ports.

The guest changes the words at the same time, and may write what it likes: links are only written here, never followed.
A word whose page the guest has not provided yet is masked, and remembers in `port_queues` that it is pending.

The caller of everything here is on the domain's own thread, or holds its lock while it stands still.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xenolith.abi.errno import EINVAL, ENOSPC, EOPNOTSUPP
from xenolith.abi.event_fifo import (
    CONTROL_BLOCK_HEADS,
    CONTROL_BLOCK_SIZE,
    EVENT_ARRAY_PAGES,
    EVENT_WORDS_PER_PAGE,
    EVTCHN_FIFO_BUSY,
    EVTCHN_FIFO_LINKED,
    EVTCHN_FIFO_MASKED,
    EVTCHN_FIFO_MAX_QUEUES,
    EVTCHN_FIFO_PENDING,
    EVTCHN_FIFO_PRIORITY_DEFAULT,
    LINK_MASK,
)
from xenolith.abi.hypercalls import EVTCHN_2L_NR_CHANNELS
from xenolith.abi.layout import SHARED_EVTCHN_PENDING
from xenolith.abi.x86 import PAGE_SHIFT, PAGE_SIZE
from xenolith.hypervisor import paging
from xenolith.hypervisor.frames import TYPE_WRITABLE
from xenolith.machine.atomic import clear_bit, compare_exchange_32, set_bit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xenolith.hypervisor.domain import Domain, Vcpu

P: Final = 1 << EVTCHN_FIFO_PENDING
M: Final = 1 << EVTCHN_FIFO_MASKED
L: Final = 1 << EVTCHN_FIFO_LINKED
BUSY: Final = 1 << EVTCHN_FIFO_BUSY
LINK_ATTEMPTS: Final = 4  # at a word that the guest changes all the time, although BUSY is set

# Of a port, in Domain.port_queues: its priority, the queue it was put in last, whether it is pending without a word.
PRIORITY, LAST_PRIORITY, LAST_VCPU, EARLY = range(4)
QUEUE_BYTES: Final = 4


def word_address(domain: Domain, port: int) -> int:
    """Machine address of a port's event word; 0: it has none yet."""
    page = domain.event_pages[port // EVENT_WORDS_PER_PAGE]
    return page and page + port % EVENT_WORDS_PER_PAGE * 4


def _set(domain: Domain, word: int, bit: int) -> int:
    page = word & -PAGE_SIZE
    return set_bit(domain.memory.address + page, (word - page << 3) + bit)


def _clear(domain: Domain, word: int, bit: int) -> int:
    page = word & -PAGE_SIZE
    return clear_bit(domain.memory.address + page, (word - page << 3) + bit)


# --- what the guest provides -----------------------------------------------------------------------


def init_control(domain: Domain, vcpu: Vcpu, mfn: int, offset: int, valid_ports: int) -> int:
    """Give a vCPU its control block; the first one changes the ABI, and keeps what is pending.

    0, or a negative errno.
    """
    if offset > PAGE_SIZE - CONTROL_BLOCK_SIZE or offset & 7 or vcpu.control_block:
        return -EINVAL
    if paging.get_page_and_type(domain, mfn, TYPE_WRITABLE):
        return -EINVAL
    vcpu.control_block = (mfn << PAGE_SHIFT) + offset
    if not domain.fifo:
        bitmap = domain.shared_info + SHARED_EVTCHN_PENDING
        pending = domain.memory.b[bitmap : bitmap + EVTCHN_2L_NR_CHANNELS // 8]
        for port in range(valid_ports):
            reset_port(domain, port)
            domain.port_queues[port * QUEUE_BYTES + EARLY] = pending[port >> 3] >> (port & 7) & 1
        _choose(domain, True)
    return 0


def _choose(domain: Domain, fifo: bool) -> None:
    for vcpu in domain.vcpus:
        vcpu.fifo = fifo


def expand_array(domain: Domain, mfn: int) -> int:
    """Add a page of event words. 0, or a negative errno; what is pending there is then to be raised."""
    if not domain.fifo:
        return -EOPNOTSUPP
    slot = event_pages(domain)
    if slot == EVENT_ARRAY_PAGES:
        return -ENOSPC
    if paging.get_page_and_type(domain, mfn, TYPE_WRITABLE):
        return -EINVAL
    domain.event_pages[slot] = mfn << PAGE_SHIFT
    return 0


def event_pages(domain: Domain) -> int:
    """How many pages of event words there are."""
    return next((slot for slot in range(EVENT_ARRAY_PAGES) if not domain.event_pages[slot]), EVENT_ARRAY_PAGES)


def references(domain: Domain) -> Iterator[tuple[int, int | None]]:
    """Frames that the ABI holds, for the invariant checker."""
    for vcpu in domain.vcpus:
        if vcpu.control_block:
            yield vcpu.control_block >> PAGE_SHIFT, TYPE_WRITABLE
    for slot in range(event_pages(domain)):
        yield domain.event_pages[slot] >> PAGE_SHIFT, TYPE_WRITABLE


def state(domain: Domain) -> dict[str, object] | None:
    """As plain data, for domain_record.ports."""
    if not domain.fifo:
        return None
    blocks = [vcpu.control_block for vcpu in domain.vcpus]
    return {
        "controls": [[block >> PAGE_SHIFT, block % PAGE_SIZE] if block else None for block in blocks],
        "tails": [list(vcpu.queue_tails) for vcpu in domain.vcpus],
        "pages": [page >> PAGE_SHIFT for page in domain.event_pages[: event_pages(domain)]],
        "queues": bytes(domain.port_queues).hex(),
    }


def give_up(domain: Domain) -> None:
    """Back to two bitmaps (EVTCHNOP_reset), or the domain's end. Its ports are closed."""
    for mfn, _ in list(references(domain)):
        paging.put_page_and_type(domain, mfn)
    _choose(domain, False)
    domain.event_pages[:] = [0] * EVENT_ARRAY_PAGES
    for vcpu in domain.vcpus:
        vcpu.control_block = 0
        vcpu.queue_tails[:] = [0] * len(vcpu.queue_tails)


# --- ports -----------------------------------------------------------------------------------------


def reset_port(domain: Domain, port: int) -> None:
    """A port is new."""
    domain.port_queues[port * QUEUE_BYTES + PRIORITY] = EVTCHN_FIFO_PRIORITY_DEFAULT
    domain.port_queues[port * QUEUE_BYTES + EARLY] = 0


def take_early(domain: Domain, port: int) -> bool:
    """Whether a port was pending before it had a word, which is to be asked once."""
    at = port * QUEUE_BYTES + EARLY
    early, domain.port_queues[at] = domain.port_queues[at], 0
    return bool(early)


def set_priority(domain: Domain, port: int, priority: int) -> int:
    if priority >= EVTCHN_FIFO_MAX_QUEUES:
        return -EINVAL
    domain.port_queues[port * QUEUE_BYTES + PRIORITY] = priority
    return 0


def busy(domain: Domain, port: int) -> bool:
    """Whether the guest has yet to take a port from its queue: it cannot be anything else before."""
    word = word_address(domain, port)
    return bool(word and domain.memory.d[word >> 2] & L)


def pending(domain: Domain, port: int) -> bool:
    word = word_address(domain, port)
    return bool(word and domain.memory.d[word >> 2] & P)


def clear_pending(domain: Domain, port: int) -> None:
    """The port is closed. The guest takes it from its queue, and finds nothing pending."""
    domain.port_queues[port * QUEUE_BYTES + EARLY] = 0
    word = word_address(domain, port)
    if word:
        _clear(domain, word, EVTCHN_FIFO_PENDING)


def set_pending(domain: Domain, vcpu: Vcpu, port: int) -> tuple[bool, bool]:
    """Raise an event for a vCPU. Whether it was not pending before, and whether the vCPU is to be notified."""
    word = word_address(domain, port)
    if not word:
        domain.port_queues[port * QUEUE_BYTES + EARLY] = 1
        return False, False
    was_pending = _set(domain, word, EVTCHN_FIFO_PENDING)
    return not was_pending, link(domain, vcpu, port, word)


def unmask(domain: Domain, vcpu: Vcpu, port: int) -> tuple[bool, bool]:
    """EVTCHNOP_unmask: as `set_pending`, if it is pending."""
    word = word_address(domain, port)
    if not word:
        return False, False
    _clear(domain, word, EVTCHN_FIFO_MASKED)
    return False, bool(domain.memory.d[word >> 2] & P) and link(domain, vcpu, port, word)


def link(domain: Domain, vcpu: Vcpu, port: int, word: int) -> bool:
    """Put a port at the tail of its queue, if it is to be in one; whether the vCPU is to be notified."""
    memory, control = domain.memory, vcpu.control_block
    if memory.d[word >> 2] & (M | L) or not control or _set(domain, word, EVTCHN_FIFO_LINKED):
        return False
    queues, at = domain.port_queues, port * QUEUE_BYTES
    priority = queues[at + PRIORITY]
    last = domain.vcpus[queues[at + LAST_VCPU]].queue_tails
    if last[queues[at + LAST_PRIORITY]] == port:  # that queue is empty: nothing may follow this port there
        last[queues[at + LAST_PRIORITY]] = 0
    queues[at + LAST_PRIORITY], queues[at + LAST_VCPU] = priority, vcpu.vcpu_id
    tail = vcpu.queue_tails[priority]
    vcpu.queue_tails[priority] = port
    if tail and _set_link(domain, tail, port):
        return False
    memory.d[control + CONTROL_BLOCK_HEADS + priority * 4 >> 2] = port
    return not set_bit(memory.address + control, priority)


def _set_link(domain: Domain, tail: int, port: int) -> bool:
    """Let a port follow another that is in a queue; False if that is in none, so that the queue is empty.

    What never stands still is in none, either: a guest that does this loses its own events.
    """
    word = word_address(domain, tail)
    if not word:
        return False
    memory = domain.memory
    address = memory.address + word
    for _ in range(LINK_ATTEMPTS):
        seen = memory.d[word >> 2]
        if not seen & L:
            break
        if compare_exchange_32(address, seen, seen & ~(BUSY | LINK_MASK) & 0xFFFFFFFF | port) == seen:
            return True
        _set(domain, word, EVTCHN_FIFO_BUSY)  # the guest waits before it clears LINKED, or MASKED
    _clear(domain, word, EVTCHN_FIFO_BUSY)  # it may not be left: Linux would wait for ever
    return False
