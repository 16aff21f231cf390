"""`xenolith run`: one domain in the foreground, its console on the terminal.

The main thread makes the domain and then only waits for the first thing that ends the run: the domain's end, a
signal, Ctrl-], or a closed output.  One thread carries the console to standard output, another standard input to the
console, and a third signals to the queue of notes that the main thread waits on.

Without a COMMAND the guest has the terminal: it is in raw mode while the domain runs and restored afterwards, and
what is typed, Ctrl-C too, goes to the guest.  With a COMMAND only what the command prints comes out (dom0/framing.py).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Final

import click

from xenolith.abi import hypercalls
from xenolith.cli import run_disks
from xenolith.debian.framing import CommandOutput, new_nonce
from xenolith.debian.initramfs import HostFile, InitramfsError, build_initramfs, kernel_arguments, needed_arguments
from xenolith.debian.modules import kernel_modules
from xenolith.debian.packages import DEFAULT_KERNEL, GuestUnavailable, obtain
from xenolith.dom0.backends.block import VbdSpec
from xenolith.dom0.console import Console, ConsoleClosed, Overflow
from xenolith.dom0.image import ImageError, KernelImage, load_image
from xenolith.dom0.power import power_on
from xenolith.dom0.services import Dom0, DomainSpec, GuestDomain
from xenolith.hypervisor.control import DomainCreateError, DomainInfo
from xenolith.machine.engines.protocol import EngineError

CTRL_RIGHT_BRACKET: Final = b"\x1d"
END_OF_FILE: Final = b"\x04"  # what a terminal sends for the end of its input
PANIC_LINES: Final = 100  # what Linux prints of a panic is forty to eighty
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Status(IntEnum):
    """Exit statuses of `xenolith run` beside the command's own; documented in its help."""

    POWEROFF = 0
    REBOOT = 120
    CRASH = 121
    SUSPEND = 122
    NO_STATUS = 123  # powered off, but the command never finished
    OTHER_END = 124  # the guest gave a shutdown reason that Xen does not define
    CANNOT_RUN = 125
    SIGNALLED = 128  # plus the signal's number


EXIT_STATUS_HELP: Final = """\b
Exit status:
  the COMMAND's own, if there is one and it finished;
  0    the guest powered off, or Ctrl-] was typed
  2    wrong usage
  120  the guest rebooted (a foreground run ends then)
  121  the guest crashed; the reason and its last lines are on standard error
  122  the guest suspended itself
  123  the guest powered off before COMMAND finished
  124  the guest ended for a reason unknown to Xen
  125  the domain could not be made; nothing was run
  129, 130, 141, 143  ended by SIGHUP, SIGINT, a closed output, SIGTERM
"""


class CannotRun(click.ClickException):
    """The domain could not be made."""

    exit_code = Status.CANNOT_RUN


@click.command(epilog=EXIT_STATUS_HELP, context_settings={"allow_interspersed_args": False, "auto_envvar_prefix": None})
@click.option(
    "--engine",
    type=click.Choice(["auto", "unicorn", "kvm", "adaptive"]),
    default="auto",
    envvar="XENOLITH_ENGINE",
    show_default=True,
    help="What executes guest code; auto takes kvm where it works. Environment: XENOLITH_ENGINE.",
)
@click.option("--memory", "memory_mib", type=click.IntRange(min=1), default=256, show_default=True, metavar="MiB")
@click.option("--vcpus", type=click.IntRange(min=1), default=1, show_default=True, metavar="N")
@click.option(
    "--kernel",
    default=DEFAULT_KERNEL,
    show_default=True,
    metavar="K",
    help="A bzImage or ELF file built for Xen PV, or a Debian kernel: 6.1, 6.12, 6.1-cloud, the newest of a suite "
    "(trixie, sid, sid-cloud, bookworm-backports), or a package's name.",
)
@click.option(
    "--ramdisk",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="R",
    help="A ramdisk of your own, instead of our initramfs with busybox.",
)
@click.option(
    "--cmdline",
    default="",
    metavar="STR",
    help="Kernel arguments: added to those that our initramfs needs, or all of them with --ramdisk or no Linux. Linux "
    "6.16 and later gets initcall_blacklist=print_s5_reset_status_mmio, without which it crashes on AMD processors.",
)
@click.option(
    "--file",
    "files",
    multiple=True,
    metavar="HOST[:GUEST]",
    help="Put a file or directory of the host into the initramfs; may be repeated.",
)
@click.option(
    "--module",
    "modules",
    multiple=True,
    metavar="NAME",
    help="Put a module of the Debian kernel into the initramfs, with those it needs, for modprobe; may be repeated.",
)
@click.option("--disk", "disks", multiple=True, metavar="FILE[,ro|cow]", help=run_disks.HELP)
@click.option("-v", "--verbose", is_flag=True, help="Say on standard error which engine was chosen, and why.")
@click.option("--stats", is_flag=True, help="Print trap counts, CPU time and boot time as JSON on standard error.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def run(
    engine: str,
    memory_mib: int,
    vcpus: int,
    kernel: str,
    ramdisk: Path | None,
    cmdline: str,
    files: Sequence[str],
    modules: Sequence[str],
    disks: Sequence[str],
    verbose: bool,
    stats: bool,
    command: Sequence[str],
) -> None:
    """Boot one domain in the foreground.

    Without COMMAND its console is on the terminal; Ctrl-] leaves. With COMMAND (after --) the guest runs it, its output
    is printed alone, and its exit status is ours.
    """
    logging.basicConfig(stream=sys.stderr, format="xenolith: %(message)s")
    for name in ("xenolith.machine.engines.select", "xenolith.debian"):
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.WARNING)
    nonce = new_nonce()
    vbds = run_disks.parse_disks(disks)
    make_spec = partial(_spec, kernel, ramdisk, cmdline, files, modules, vbds, command, nonce, memory_mib, vcpus)
    sys.exit(_run(make_spec, memory_mib, vcpus, engine, CommandOutput(nonce) if command else None, stats))


# --- the domain to make --------------------------------------------------------------------------------------


def _spec(
    kernel: str,
    ramdisk: Path | None,
    cmdline: str,
    files: Sequence[str],
    modules: Sequence[str],
    disks: tuple[VbdSpec, ...],
    command: Sequence[str],
    nonce: str,
    memory_mib: int,
    vcpus: int,
) -> DomainSpec:
    image = _image(kernel)
    if ramdisk is not None or image.guest_os.lower() != "linux":
        if command or files or modules:
            raise click.UsageError(
                "a COMMAND, --file and --module "
                + (
                    "need our initramfs, which --ramdisk replaces"
                    if ramdisk is not None
                    else f"need a Linux kernel; {kernel} says that it is {image.guest_os or 'nothing'}"
                )
            )
        archive = ramdisk.read_bytes() if ramdisk is not None else b""
    else:
        if modules and _is_file(kernel):
            raise click.UsageError("--module needs one of Debian's kernels, whose package has the modules")
        guest = obtain(DEFAULT_KERNEL if _is_file(kernel) else kernel)
        host_files = [HostFile.parse(argument) for argument in files]
        if disks and not _is_file(kernel):
            modules = [*modules, *run_disks.DISK_MODULES]
        nodes = kernel_modules(guest, modules) if modules else []
        archive = build_initramfs(guest.busybox, command=command or None, nonce=nonce, files=host_files, modules=nodes)
        cmdline = f"{kernel_arguments(vcpus, command=bool(command))} {cmdline}"
    return DomainSpec(
        name="run",
        image=image,
        kernel=kernel,
        ramdisk=archive,
        cmdline=f"{needed_arguments(image)} {cmdline}".strip(),
        memory_kib=memory_mib << 10,
        vcpus=vcpus,
        disks=disks,
    )


def _is_file(kernel: str) -> bool:
    return "/" in kernel or os.path.exists(kernel)


def _image(kernel: str) -> KernelImage:
    return load_image(Path(kernel) if _is_file(kernel) else obtain(kernel).elf)


# --- the run -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Left:
    """Ctrl-] was typed."""


@dataclass(frozen=True)
class _Signalled:
    signal: int


@dataclass(frozen=True)
class _ConsoleEnded:
    """All output of the domain has been written, and there will be no more."""


Note = _Left | _Signalled | _ConsoleEnded


class _Streams:
    """The domain's console on our standard streams."""

    def __init__(self, console: Console, framing: CommandOutput | None, notes: SimpleQueue[Note]) -> None:
        self.console = console
        self.framing = framing
        self.notes = notes
        self.first_output: float | None = None  # time.monotonic()
        self.command_began: float | None = None
        self._reader = console.open_reader(Overflow.WAIT)
        self._lock = threading.Lock()
        self._in_mid_line = False  # where the output stands
        self._input_ended = False
        self._stop, self._stopping = os.pipe()
        self._input: threading.Thread | None = None

    def start(self, on_terminal: bool) -> None:
        """Begin to carry output and, unless a command runs, input."""
        threading.Thread(target=self._carry_output, name="output", daemon=True).start()
        if self.framing is None:
            self._input = threading.Thread(target=self._carry_input, args=(on_terminal,), name="input", daemon=True)
            self._input.start()

    def stop(self) -> None:
        """Read no more input. The console has ended, so nobody waits for it."""
        os.write(self._stopping, b"x")
        if self._input:
            self._input.join()
        os.close(self._stop)
        os.close(self._stopping)

    def _carry_output(self) -> None:
        """Console to standard output, until the console ends."""
        try:
            while data := self._reader.read():
                self._print(self._filtered(data))
                self._note_prompt(in_mid_line=not data.endswith(b"\n"))
            if self.framing:
                self._print(self.framing.finish())
        except OSError:  # nobody reads any more, or the disk is full
            self.notes.put(_Signalled(signal.SIGPIPE))
        else:
            self.notes.put(_ConsoleEnded())

    def _filtered(self, data: bytes) -> bytes:
        """What is to be printed of the console's output."""
        now = time.monotonic()
        self.first_output = self.first_output or now
        if self.framing is None:
            return data
        output = self.framing.feed(data)
        if self.framing.started:
            self.command_began = self.command_began or now
        return output

    @staticmethod
    def _print(data: bytes) -> None:
        while data:
            data = data[os.write(1, data) :]

    def _carry_input(self, on_terminal: bool) -> None:
        """Standard input to the console, until either ends, `stop` is called or Ctrl-] is typed."""
        with contextlib.suppress(ConsoleClosed):
            while (data := self._read_input()) is not None:
                if on_terminal and CTRL_RIGHT_BRACKET in data:
                    self.console.write(data.partition(CTRL_RIGHT_BRACKET)[0])
                    self.notes.put(_Left())
                    return
                if not data:
                    self._end_input()
                    return
                self.console.write(data)

    def _end_input(self) -> None:
        with self._lock:
            self._input_ended = True
        self._note_prompt(self._in_mid_line)

    def _note_prompt(self, in_mid_line: bool) -> None:
        """After the end of our input, tell it to whoever asks: to each prompt, where output stops in mid-line.

        Told once and at once it would be lost: a terminal drops it when it changes its mode, as a starting shell does.
        """
        with self._lock:
            self._in_mid_line = in_mid_line
            if in_mid_line and self._input_ended:
                with contextlib.suppress(ConsoleClosed):
                    self.console.offer(END_OF_FILE)

    def _read_input(self) -> bytes | None:
        """Bytes of standard input, b"" at its end; None when it is time to stop."""
        try:
            ready, _, _ = select.select([0, self._stop], [], [])
            return None if self._stop in ready else os.read(0, 1024)
        except OSError:  # closed, or a terminal that hung up
            return b""


def _run(
    make_spec: Callable[[], DomainSpec],
    memory_mib: int,
    vcpus: int,
    engine: str,
    framing: CommandOutput | None,
    stats: bool,
) -> int:
    """Make the domain, let it run until it or somebody else ends the run; the exit status.

    The specification is made here and nowhere kept: a kernel image is 50 MiB.
    """
    started = time.monotonic()
    notes: SimpleQueue[Note] = SimpleQueue()
    try:
        with _signals_noted(notes), power_on([memory_mib], engine, pcpus=max(2, vcpus)) as dom0:
            domain = dom0.create(make_spec())
            streams = _Streams(domain.console, framing, notes)
            note = _foreground(dom0, domain, streams)
            emergency = dom0.control.emergency_output(domain.domid)
            if stats:
                print(json.dumps(_statistics(dom0, domain, streams, started), indent=2), file=sys.stderr)
    except (GuestUnavailable, ImageError, InitramfsError, OSError, EngineError, DomainCreateError) as error:
        raise CannotRun(str(error)) from error
    if isinstance(note, _Signalled):
        return Status.SIGNALLED + note.signal
    if isinstance(note, _Left):
        return Status.POWEROFF
    end = domain.wait()
    assert end is not None
    status = _status(end, streams)
    if status != Status.POWEROFF and streams.first_output is None:
        _show_last_lines("What it wrote with console_io", emergency)
    return status


def _foreground(dom0: Dom0, domain: GuestDomain, streams: _Streams) -> Note:
    """Run the domain on the terminal; what ended it."""
    with _terminal(raw=streams.framing is None) as on_terminal:
        streams.start(on_terminal)
        dom0.start(domain)
        note = streams.notes.get()
        if not isinstance(note, _ConsoleEnded):
            dom0.control.pause(domain.domid)
            domain.console.close()
        streams.stop()
    return note


def _status(end: DomainInfo, streams: _Streams) -> int:
    """The exit status for a domain that ended by itself; says on standard error what the guest cannot say."""
    framing = streams.framing
    match end.shutdown_reason:
        case hypercalls.SHUTDOWN_poweroff:
            if framing and framing.exit_status is not None:
                return framing.exit_status
            if framing is None:
                return Status.POWEROFF
            _complain("the guest powered off before the command finished", framing.preamble)
            return Status.NO_STATUS
        case hypercalls.SHUTDOWN_reboot:
            if framing:
                _complain("the guest rebooted before the command finished", framing.preamble)
            return Status.REBOOT
        case hypercalls.SHUTDOWN_suspend:
            return Status.SUSPEND
        case hypercalls.SHUTDOWN_crash:
            report = f": {end.crash_report}" if end.crash_report else ""
            _complain(f"the guest crashed{report}", streams.console.scrollback if framing else b"")
            return Status.CRASH
        case reason:
            _complain(f"the guest ended with the unknown shutdown reason {reason}", b"")
            return Status.OTHER_END


def _complain(what: str, console: bytes) -> None:
    """Say how the domain ended, and show the console's last lines where they have not been printed."""
    print(f"xenolith: {what}", file=sys.stderr)
    _show_last_lines("Last lines of its console", console)


def _show_last_lines(what: str, output: bytes) -> None:
    lines = output.decode("utf-8", "replace").splitlines()[-PANIC_LINES:]
    if lines:
        print(f"{what}:", *lines, sep="\n  ", file=sys.stderr)


def _statistics(dom0: Dom0, domain: GuestDomain, streams: _Streams, started: float) -> dict[str, object]:
    def since_start(moment: float | None) -> float | None:
        return None if moment is None else round(moment - started, 3)

    counters = dom0.control.counters(domain.domid)
    return {
        "engine": dom0.control.info(domain.domid).engine,
        "memory_mib": domain.spec.memory_kib >> 10,
        "vcpus": domain.spec.vcpus,
        "boot_seconds": since_start(streams.command_began),
        "first_output_seconds": since_start(streams.first_output),
        "total_seconds": since_start(time.monotonic()),
        "cpu_seconds": round(counters.cpu_time / 1e9, 3),
        "traps": counters.traps,
        "hypercalls": counters.hypercalls,
    }


# --- what must be put back -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _signals_noted(notes: SimpleQueue[Note]) -> Iterator[None]:
    """While this lasts, signals that ask us to end leave a note instead.

    Python runs a handler when the main thread next executes Python, and one that has just gone to wait for a note might
    never.  So a thread reads from the pipe that the interpreter's own, immediate handler writes each number into.
    """
    come, note = os.pipe()
    os.set_blocking(note, False)

    def carry() -> None:
        while numbers := os.read(come, 64):
            for number in numbers:
                notes.put(_Signalled(number))

    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    signal.set_wakeup_fd(note)
    thread = threading.Thread(target=carry, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(note)
        thread.join()
        os.close(come)


@contextlib.contextmanager
def _terminal(*, raw: bool) -> Iterator[bool]:
    """Raw mode if standard input is a terminal that the guest gets; whether it is."""
    if not raw or not os.isatty(0):
        yield False
        return
    before = termios.tcgetattr(0)
    try:
        tty.setraw(0)
        yield True
    finally:
        termios.tcsetattr(0, termios.TCSANOW, before)
