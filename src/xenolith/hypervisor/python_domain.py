"""A domain whose code is Python: its hypercalls are calls of these methods (design: dom0 is a domain like others).

dom0's services reach a guest through this, `Control` and xenstore.  Everything here names other domains by domid and is
subject to what they have granted: an event channel they left unbound for this domain, a frame their grant table permits
it to use.  A back-end's life:

    port = domain.bind_interdomain(domid, remote_port)       # both numbers from xenstore
    ring = domain.map_grant(domid, ring_ref)
    domain.set_handler(port, wake_the_backend)               # called from anywhere: it must only hand on
    ...
    with domain.map_grant(domid, gref, writable=False) as frame:   # or kept mapped: persistent grants
        os.pwrite(disk, frame.view[first:last], offset)
    domain.send(port)
    ...
    domain.unmap_grant(ring)
    domain.close(port)

A domain in Python has no shared_info and no memory: its ports call a handler, as a device calls an interrupt handler,
and it grants nothing.  A mapping holds the frame for as long as it lasts, whatever becomes of the granter: it is given
to nobody else, and if it is writable is no page table meanwhile.

Locking: methods may be called by any thread that holds no domain's lock, except `send`, which may be called anywhere.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self

from xenolith.abi.errno import ESRCH
from xenolith.abi.grant_table import GNTST_bad_copy_arg, GNTST_bad_domain, GNTST_bad_handle
from xenolith.abi.x86 import PAGE_SHIFT, PAGE_SIZE
from xenolith.hypervisor import ring0
from xenolith.hypervisor.events import Handler, binding_lock, post_code_written
from xenolith.hypervisor.grants import (
    COPIED,
    IS_PINNED,
    MAX_PINS,
    NOT_ALL_PINNED,
    NOT_PINNED,
    TO_UNPIN,
    Mapping,
    Pins,
)
from xenolith.hypervisor.lifecycle import create_dom0
from xenolith.machine.native import buffer_address

if TYPE_CHECKING:
    from types import TracebackType

    from xenolith.hypervisor.domain import Domain
    from xenolith.hypervisor.hypervisor import Hypervisor


__all__ = [
    "IS_PINNED",
    "MAX_PINS",
    "GrantBatch",
    "HypercallError",
    "MappedGrant",
    "Pins",
    "PythonDomain",
    "boot_dom0",
    "pins_natively",
]


class HypercallError(Exception):
    """A hypercall was refused. `status` is what it returned: a negative errno, or a negative GNTST_* of grants."""

    def __init__(self, what: str, status: int) -> None:
        super().__init__(f"{what}: refused with {status}")
        self.status = status


@dataclass(slots=True)
class MappedGrant:
    """A granted frame of another domain, mapped until `PythonDomain.unmap_grant`, which leaving it as a context does.

    `view` has its PAGE_SIZE bytes, to be written only if `writable`; `address` is where they are in this process, for
    native code.  Neither may be used any more once the frame is unmapped, nor may slices of the view.
    The granter changes the bytes whenever it likes: copy what is to be checked, once, and check the copy.
    """

    domid: int
    ref: int
    writable: bool
    view: memoryview
    address: int
    handle: int
    _mapper: PythonDomain = field(repr=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._mapper.unmap_grant(self)


def pins_natively() -> bool:
    """Whether a GrantBatch has `native_pin` and `native_unpin`."""
    return all(ring0.pin_addresses())


class GrantBatch:
    """Grants of one domain's that are used together, and for a moment only, as by a hypercall of many GNTTABOP_copy.

    Who uses it fills in `pins`, calls `pin`, moves data from and to the addresses, and calls `unpin`.  Native code does
    the same by `native_pin` and `native_unpin`, addresses of functions that take `granter` and the address of `pins`
    and answer how many of them remain for `pin` or `unpin` here; 0: there are no such functions.  One thread at a time.
    """

    def __init__(self, mapper: Domain, granter: Domain) -> None:
        self.pins: Final = Pins()
        self._pins_address: Final = ctypes.addressof(self.pins)
        self.granter: Final = ctypes.addressof(granter)
        self.native_pin, self.native_unpin = ring0.pin_addresses()
        self._copier: Final = ring0.grant_copier()
        self._mapper: Final = mapper
        self._granter: Final = granter

    def pin(self) -> None:
        """Pin those of `pins` that are not: the states of those that the granter permits become IS_PINNED."""
        pins, granter = self.pins, self._granter
        with granter.lock:
            for index in range(pins.begin, pins.count):
                if pins.states[index] == NOT_PINNED and not granter.dying:
                    mfn = granter.grants.pin(pins.refs[index], self._mapper.domid, pins.writable[index])
                    if mfn >= 0:
                        pins.states[index] = IS_PINNED
                        pins.mfns[index] = mfn
                        pins.addresses[index] = granter.memory.address + (mfn << PAGE_SHIFT)

    def copy(self, parts: Sequence[tuple[int, int, int]], local: bytearray | memoryview, to_guest: bool) -> bool:
        """Copy parts of frames (reference, offset, size) one after the other from or to `local`, which is as long.

        False, with nothing copied, where one is not granted. Raises HypercallError where one is not inside a frame.
        """
        pins, address = self.pins, buffer_address(local)
        pins.begin, pins.count = 0, len(parts)
        for index, (ref, offset, size) in enumerate(parts):
            _check_range(offset, size)
            pins.refs[index], pins.offsets[index], pins.sizes[index] = ref, offset, size
            pins.writable[index] = to_guest
        copier = self._copier
        answer = copier(self.granter, self._pins_address, address, to_guest) if copier is not None else NOT_ALL_PINNED
        if answer == COPIED:
            return True
        granted = answer == TO_UNPIN
        if not granted:
            self.pin()
            granted = all(pins.states[index] == IS_PINNED for index in range(len(parts)))
            if granted:
                self._move(parts, address, to_guest)
        self.unpin()
        return granted

    def _move(self, parts: Sequence[tuple[int, int, int]], address: int, to_guest: bool) -> None:
        for index, (_, offset, size) in enumerate(parts):
            part = self.pins.addresses[index] + offset
            target, source = (part, address) if to_guest else (address, part)
            ctypes.memmove(target, source, size)
            address += size

    def unpin(self) -> None:
        """Give all of them back; there are none any more."""
        pins, granter = self.pins, self._granter
        with granter.lock:
            for index in range(pins.count):
                state, pins.states[index] = pins.states[index], NOT_PINNED
                if state == IS_PINNED:
                    granter.grants.unpin(pins.refs[index], pins.writable[index])
                if state != NOT_PINNED and pins.writable[index]:
                    post_code_written(granter, pins.mfns[index])
        pins.begin = pins.count = 0


class PythonDomain:
    """The hypercalls of a domain whose code is Python."""

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._hypervisor = domain.hypervisor
        self._handlers: dict[int, Handler] = {}
        self._undelivered: set[int] = set()  # sent before there was a handler
        domain.events.interrupt = self._interrupt

    @property
    def domid(self) -> int:
        return self._domain.domid

    # --- event channels ----------------------------------------------------------------------------------

    def alloc_unbound(self, remote_domid: int) -> int:
        """A new port that `remote_domid` may bind to. Raises HypercallError."""
        return _port(self._domain.events.alloc_unbound(remote_domid), "no event channel")

    def bind_interdomain(self, domid: int, remote_port: int) -> int:
        """A new port, connected to one that the other domain left unbound for this one. Raises HypercallError."""
        remote = self._hypervisor.domain(domid)
        port = self._domain.events.bind_interdomain(remote, remote_port) if remote is not None else -ESRCH
        return _port(port, f"port {remote_port} of domain {domid}")

    def bind_virq(self, virq: int) -> int:
        """A new port for a virtual interrupt. Raises HypercallError."""
        return _port(self._domain.events.bind_virq(virq, 0), f"VIRQ {virq}")

    def close(self, port: int) -> None:
        """Free a port and forget its handler; nothing if it is free. Its eventfd is written to no more."""
        remote = self._domain.events.remote[port]
        with remote.lock if remote is not None else nullcontext(), binding_lock:
            self._domain.events.close(port)
            self._handlers.pop(port, None)
            self._undelivered.discard(port)

    def send(self, port: int) -> None:
        """Notify the other end of a port, if it has one. From any thread; takes no lock."""
        self._domain.events.send(port)

    def set_handler(self, port: int, handler: Handler, eventfd: int = -1) -> None:
        """Call `handler(port)` for every event from now on, and now if one came before.

        If there is an `eventfd`, adding 1 to it is as good as such a call, and cheaper for the sender.

        It is called on the thread of whoever sent, which may hold its domain's lock, so it must only hand on: set an
        event, release a semaphore.
        """
        self._handlers[port] = handler
        remote, remote_port = self._domain.events.remote[port], self._domain.events.remote_port[port]
        if remote is not None:
            with remote.lock, binding_lock:
                if self._domain.events.remote[port] is remote:
                    remote.events.bells[remote_port] = eventfd
        if port in self._undelivered:
            self._undelivered.discard(port)
            handler(port)

    def _interrupt(self, port: int) -> None:
        handler = self._handlers.get(port)
        if handler is None:
            self._undelivered.add(port)
            handler = self._handlers.get(port)
            if handler is None or port not in self._undelivered:
                return
            self._undelivered.discard(port)
        try:
            handler(port)
        except Exception as error:  # a broken back-end must not bring down the guest that rang
            self.log(f"d{self.domid}: the handler of event port {port} failed: {error!r}")

    # --- grants ------------------------------------------------------------------------------------------

    def map_grant(self, domid: int, ref: int, writable: bool = True) -> MappedGrant:
        """Map the frame of entry `ref` of a domain's grant table, which must be for this domain.

        Raises HypercallError: GNTST_bad_gntref, GNTST_general_error where the entry does not permit it, ...
        """
        granter = self._hypervisor.domain(domid)
        handle = _map(self._domain, granter, ref, writable)
        if handle < 0 or granter is None:
            raise HypercallError(f"grant {ref} of domain {domid}", handle)
        mapping = self._domain.grants.mapping(handle)
        assert mapping is not None
        page = granter.memory.page(mapping.mfn)
        address = granter.memory.address + (mapping.mfn << PAGE_SHIFT)
        return MappedGrant(domid, ref, writable, page if writable else page.toreadonly(), address, handle, self)

    def unmap_grant(self, grant: MappedGrant) -> None:
        """Give the frame back. Raises HypercallError if that was done before."""
        mapping = self._domain.grants.mapping(grant.handle) if grant.address else None
        if mapping is None:
            raise HypercallError(f"grant {grant.ref} of domain {grant.domid} is not mapped", GNTST_bad_handle)
        grant.view, grant.address = memoryview(b""), 0  # its handle will be another's
        granter = mapping.granter
        with granter.lock:
            self._domain.grants.forget_mapping(grant.handle)
            granter.grants.unpin(mapping.ref, mapping.writable)
        if mapping.writable:
            post_code_written(granter, mapping.mfn)

    def grant_batch(self, domid: int) -> GrantBatch:
        """For grants of this domain's that are to be used together. Raises HypercallError."""
        granter = self._hypervisor.domain(domid)
        if granter is None:
            raise HypercallError(f"grants of domain {domid}", GNTST_bad_domain)
        return GrantBatch(self._domain, granter)

    def read_grant(self, domid: int, ref: int, offset: int, size: int) -> bytes:
        """Copy bytes out of a granted frame (GNTTABOP_copy). Raises HypercallError."""
        _check_range(offset, size)
        with self.map_grant(domid, ref, writable=False) as grant:
            return bytes(grant.view[offset : offset + size])

    def write_grant(self, domid: int, ref: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Copy bytes into a granted frame (GNTTABOP_copy). Raises HypercallError."""
        _check_range(offset, len(data))
        with self.map_grant(domid, ref) as grant:
            grant.view[offset : offset + len(data)] = data

    # --- the rest of what a kernel asks for -----------------------------------------------------------------

    def wall_clock(self) -> int:
        """ns since 1970 (shared_info's wc_sec and the system time)."""
        return self._hypervisor.clock.wall()

    def log(self, text: str) -> None:
        """Write a line on the hypervisor's console (console_io)."""
        self._hypervisor.log(text)

    def power_off(self) -> None:
        """Switch the machine off (sched_op, SCHEDOP_shutdown of dom0). No other domain is left."""
        self._hypervisor.close()


def boot_dom0(hypervisor: Hypervisor) -> PythonDomain:
    """Make domain 0, whose one vCPU is the Python code that calls this. Once, before any other domain."""
    return PythonDomain(create_dom0(hypervisor))


def _map(mapper: Domain, granter: Domain | None, ref: int, writable: bool) -> int:
    """A handle, or a GNTST_* error."""
    if granter is None or granter.dying:
        return GNTST_bad_domain
    with granter.lock:
        mfn = granter.grants.pin(ref, mapper.domid, writable)
        if mfn < 0:
            return mfn
        handle = mapper.grants.add_mapping(Mapping(granter, ref, mfn, writable))
        if handle < 0:
            granter.grants.unpin(ref, writable)
    return handle


def _check_range(offset: int, size: int) -> None:
    if offset < 0 or size < 0 or offset + size > PAGE_SIZE:
        raise HypercallError(f"{size} bytes at {offset} are not inside a page", GNTST_bad_copy_arg)


def _port(port: int, what: str) -> int:
    if port < 0:
        raise HypercallError(what, port)
    return port
