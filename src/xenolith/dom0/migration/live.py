"""Live relocation: a domain goes to another daemon while it runs (Clark et al., NSDI 2005).

Pre-copy: all pages are sent while the domain runs, then those that were written to meanwhile, and so on, until there
are few left or no fewer come: the *writable working set*, which is sent in vain while the domain runs.  Then the domain
stands still, and the rest goes with its state.  Where the host's kernel cannot say what was written (write_tracking),
the domain stands still for all of it.

Who runs it.  The receiver makes the domain, paused, says so and waits.  Only then does the sender give the word, by
which the domain is the receiver's; the receiver lets it run and says so, and the sender ends its own.  Whatever goes
wrong before the word leaves the domain running here and nothing there.  If the connection breaks between the word and
the answer, the sender cannot know; its domain stays paused (`Undetermined`), for two must never run, until somebody has
asked the other side.  `keep` then lets it go on here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO, Final

from xenolith.abi.x86 import PAGE_SIZE
from xenolith.dom0.migration import stream
from xenolith.dom0.migration.changes import Changes
from xenolith.dom0.migration.save import check_free, held, write_pages
from xenolith.dom0.migration.stream import MOST_PAGES, Writer
from xenolith.hypervisor.control import DomainCreateError, NotTracked

if TYPE_CHECKING:
    from xenolith.dom0.backends.block import BlockBackend
    from xenolith.dom0.migration.services import ServicesRecord
    from xenolith.dom0.services import Dom0, GuestDomain
    from xenolith.dom0.xenbus import Device
    from xenolith.hypervisor.control import StillDomain
    from xenolith.hypervisor.domain_record.kinds import Plain

FEW_PAGES: Final = 64  # so few are sent at a standstill, in no time
MOST_ROUNDS: Final = 30
MOST_TIMES: Final = 3  # of the domain's memory sent while it runs
SHRINKS: Final = 0.8  # a round has to leave so much of what the last one left, or less

NS: Final = 1_000_000_000
LEAST_RATE: Final = 100e6 / 8  # bytes a second, where there is a limit
RATE_STEP: Final = 50e6 / 8  # that a round is faster than the domain wrote in the one before

DISKS_SECONDS: Final = 30.0  # that the other side may take to let go of disks and ports
DISKS_PAUSE: Final = 0.02

READY: Final = b"ready\n"
STARTED: Final = b"started\n"
_LINE: Final = 1000

OnRound = Callable[[str], None]


class Refused(Exception):
    """The other side did not take the domain; the text is what it said. It runs here."""


class Undetermined(Exception):
    """The connection broke when the word was given: the other side may run the domain. It is paused here.

    `disks` is what `keep` needs, if it does not run there.
    """

    def __init__(self, disks: Mapping[int, Device[BlockBackend]], why: str) -> None:
        super().__init__(why)
        self.disks = disks


@dataclass(frozen=True)
class Round:
    """Pages that were sent while the domain ran, and how many were written to meanwhile."""

    began_ns: int  # since the relocation began
    ended_ns: int
    pages: int
    written: int


@dataclass
class Figures:
    """What a relocation took."""

    rounds: list[Round] = field(default_factory=list)
    last_pages: int = 0  # sent while it stood still
    down_ns: int = 0  # from the standstill to the answer
    took_ns: int = 0

    @property
    def pages(self) -> int:
        """Sent while it ran."""
        return sum(each.pages for each in self.rounds)


def send(
    dom0: Dom0,
    domain: GuestDomain,
    out: BinaryIO,
    answers: BinaryIO,
    description: Plain,
    on_round: OnRound,
    on_ready: Callable[[], None],
    hang_up: Callable[[], None],
    limit: float = 0,
) -> Figures:
    """Send a domain to whoever reads `out`. It is paused here afterwards, to be ended.

    While the domain runs no more than `limit` bytes a second are sent, if it is not 0.
    `on_ready` is called when the other side has it, before it may run there; `hang_up` lets the other side see the end.
    Raises Refused, RecordError and OSError, after which it goes on here as if nothing had been, and Undetermined.
    """
    check_free(domain)
    control, domid = dom0.control, domain.domid
    writer, figures = Writer(out), Figures()
    info = control.info(domid)
    sizes = {"max_pages": info.ceiling_pages, "vcpus": info.max_vcpus, "engine": info.engine}
    writer.json(stream.DESCRIPTION, {**sizes, "toolstack": description})
    changes: Changes | None = None
    began = dom0.hypervisor.clock.now()
    try:
        changes = Changes(control, domid)
        _rounds(writer, changes, figures, on_round, dom0.hypervisor.clock.now, limit)
    except NotTracked as reason:
        on_round(f"the domain has to stand still: {reason}")
        if changes is not None:
            changes.close()
            changes = None
    try:
        _hand_over(dom0, domain, writer, answers, changes, figures, on_ready, hang_up)
    finally:
        if changes is not None:
            changes.close()
    figures.took_ns = dom0.hypervisor.clock.now() - began
    return figures


def _rounds(
    writer: Writer,
    changes: Changes,
    figures: Figures,
    on_round: OnRound,
    now: Callable[[], int],
    limit: float,
) -> None:
    """Send pages while the domain runs. Raises NotTracked.

    With a limit it begins slowly, and each round is so fast that the domain does not write faster (NSDI 2005, 5.2).
    """
    rate, start = min(LEAST_RATE, limit), now()
    mfns = changes.look()
    most = MOST_TIMES * max(len(mfns), FEW_PAGES)
    while True:
        began = now()
        on_round(f"round {len(figures.rounds) + 1}: {len(mfns)} pages" + (f" at {rate / 1e6:.0f} MB/s" if rate else ""))
        for at in range(0, len(mfns), MOST_PAGES):
            changes.say(writer, mfns[at : at + MOST_PAGES])
            if rate:
                writer.flush()
                time.sleep(max((at + MOST_PAGES) * PAGE_SIZE / rate - (now() - began) / NS, 0))
        writer.flush()
        ended, before = now(), len(mfns)
        mfns = changes.look()
        figures.rounds.append(Round(began - start, ended - start, before, len(mfns)))
        rate = (len(mfns) * PAGE_SIZE * NS / max(ended - began, 1) + RATE_STEP) if limit else 0
        enough = len(mfns) <= FEW_PAGES or len(figures.rounds) >= MOST_ROUNDS or figures.pages + len(mfns) > most
        hopeless = rate > limit if limit else len(figures.rounds) > 1 and len(mfns) > SHRINKS * before
        if enough or hopeless:
            changes.put_back()
            return


def _hand_over(
    dom0: Dom0,
    domain: GuestDomain,
    writer: Writer,
    answers: BinaryIO,
    changes: Changes | None,
    figures: Figures,
    on_ready: Callable[[], None],
    hang_up: Callable[[], None],
) -> None:
    """The standstill. Ends with the domain paused if all went well or nobody knows, and running otherwise."""
    clock = dom0.hypervisor.clock
    began = clock.now()
    disks = dict(domain.disks)
    try:
        with held(dom0, domain) as services:
            with dom0.control.standing_still(domain.domid) as still:
                figures.last_pages = last_pages(writer, still, changes)
                _write_state(writer, still, services)
            dom0.let_go(domain)
            writer.end()
            _expect(answers, READY)
            on_ready()
            writer.section(stream.GO, b"")
            writer.flush()  # the word is given when this returns: 32 bytes go at once or not at all
            try:
                _expect(answers, STARTED)
            except (OSError, Refused) as error:
                if isinstance(error, Refused) and str(error):
                    raise  # it says that it does not run the domain
                raise Undetermined(disks, str(error) or "the connection broke") from error
        figures.down_ns = clock.now() - began
    except Undetermined:
        raise
    except BaseException:
        hang_up()
        keep(dom0, domain, disks)
        raise


def keep(dom0: Dom0, domain: GuestDomain, disks: Mapping[int, Device[BlockBackend]]) -> None:
    """Let a domain go on here that stands still to be relocated. `disks`: what it had.

    The other side may not have let go of them yet, or of ports.  Raises DomainCreateError where it does not; then it
    stays paused.
    """
    deadline = time.monotonic() + DISKS_SECONDS
    while True:
        try:
            dom0.take_back(domain, disks)
        except DomainCreateError:
            if time.monotonic() > deadline:
                raise
            time.sleep(DISKS_PAUSE)
        else:
            dom0.control.unpause(domain.domid)
            return


def last_pages(writer: Writer, still: StillDomain, changes: Changes | None) -> int:
    """Write what is left to be said at a standstill, which is all where nobody knows; how many pages."""
    if changes is not None:
        return changes.say_rest(writer, still)
    before = writer.pages_written
    write_pages(writer, still, lambda done, total: None)
    return writer.pages_written - before


def _write_state(writer: Writer, still: StillDomain, services: ServicesRecord) -> None:
    writer.frames(still.frames)
    writer.json(stream.STATE, {"domain": still.record, "services": services.plain()})


def _expect(answers: BinaryIO, wanted: bytes) -> None:
    line = answers.readline(_LINE)
    if line != wanted:
        raise Refused(line.decode("utf-8", "replace").strip())
