"""Saving: a domain stands still, and all that it is goes into a stream.

Standing still is one thing for all uses.  The domain is paused; its back-ends finish what it asked for and then
leave its memory alone; with the domain's lock held, what was posted to it is delivered, and from then on nothing of it
changes until the context is left.  It needs no help of the guest's, which does not notice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final

import numpy as np

from xenolith.abi.x86 import PAGE_SHIFT
from xenolith.dom0.migration import stream
from xenolith.dom0.migration.services import ServicesRecord, gather
from xenolith.dom0.migration.stream import MOST_PAGES, Writer
from xenolith.hypervisor.domain_record.kinds import RecordError

if TYPE_CHECKING:
    from xenolith.dom0.services import Dom0, GuestDomain
    from xenolith.hypervisor.control import StillDomain
    from xenolith.hypervisor.domain_record.kinds import Plain
    from xenolith.machine.memory import Frames

WORDS_PER_PAGE: Final = 512

OnPages = Callable[[int, int], None]  # how many pages were looked at, of how many


@contextmanager
def held(dom0: Dom0, domain: GuestDomain) -> Iterator[ServicesRecord]:
    """A domain that is paused and left alone by its back-ends; what they know of it. It stays paused afterwards."""
    domid, spec, built = domain.domid, domain.spec, domain.built
    dom0.control.pause(domid)
    check_free(domain)
    with ExitStack() as going_on:
        for device in domain.devices:
            going_on.callback(device.hold())
        domain.console.hold()
        going_on.callback(domain.console.go_on)
        if domain.channel is not None:
            domain.channel.hold()
            going_on.callback(domain.channel.go_on)
        connection = dom0.xenstore.hold(domid)
        going_on.callback(dom0.xenstore.go_on, domid)
        yield ServicesRecord(
            console_mfn=built.console_mfn,
            console_port=built.console_port,
            scrollback=domain.console.scrollback,
            store_mfn=built.store_mfn,
            store_port=built.store_port,
            connection=connection,
            nodes=gather(dom0.xenstore, domid, spec.uuid),
        )


def check_free(domain: GuestDomain) -> None:
    """Raises RecordError for a domain that cannot leave its process or be copied."""
    if domain.shares:
        raise RecordError("it has a shared folder, whose open files exist in this process alone")


def save(dom0: Dom0, domain: GuestDomain, writer: Writer, description: Plain, on_pages: OnPages) -> None:
    """Write a domain to a stream; it stays where it is, paused once more than before.

    `description` is the toolstack's, to make the domain by. Raises RecordError where the domain cannot travel, then
    without the pause, like OSError of the writer's.
    """
    try:
        with held(dom0, domain) as services, dom0.control.standing_still(domain.domid) as still:
            info = dom0.control.info(domain.domid)
            sizes = {"max_pages": info.ceiling_pages, "vcpus": info.max_vcpus, "engine": info.engine}
            writer.json(stream.DESCRIPTION, {**sizes, "toolstack": description})
            write_pages(writer, still, on_pages)
            writer.frames(still.frames)
            writer.json(stream.STATE, {"domain": still.record, "services": services.plain()})
            writer.end()
    except BaseException:
        dom0.control.unpause(domain.domid)
        raise


def write_pages(writer: Writer, still: StillDomain, on_pages: OnPages) -> None:
    """Every frame of a domain's that is not all zeros."""
    mfns = still.frames.mfns[still.populated[still.frames.mfns]]
    for done, (first, count) in runs(mfns):
        on_pages(done, len(mfns))
        write_frames(writer, still.memory, filled(still.memory, first, count))
    on_pages(len(mfns), len(mfns))


def filled(memory: memoryview, first: int, count: int) -> Frames:
    """Which of consecutive frames are not all zeros; their MFNs."""
    words = np.frombuffer(memory[first << PAGE_SHIFT : (first + count) << PAGE_SHIFT], dtype=np.uint64)
    any_bits = np.bitwise_or.reduce(words.reshape(-1, WORDS_PER_PAGE), axis=1)
    return np.flatnonzero(any_bits).astype(np.uint64) + np.uint64(first)


def write_frames(writer: Writer, memory: memoryview, mfns: Frames) -> None:
    """Write frames of this memory, in ascending order."""
    for _, (first, count) in runs(mfns):
        writer.pages(first, memory[first << PAGE_SHIFT : (first + count) << PAGE_SHIFT])


def runs(numbers: Frames) -> Iterator[tuple[int, tuple[int, int]]]:
    """Runs of consecutive numbers among ascending ones, MOST_PAGES at most: where each begins, its first and length."""
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    begin = 0
    for end in (*breaks.tolist(), len(numbers)):
        while begin < end:
            count = min(end - begin, MOST_PAGES)
            yield begin, (int(numbers[begin]), count)
            begin += count
