"""Running one domain, or one command in a domain of its own, from beginning to end in this process.

`run` is `xenolith.run`: it makes a machine with one domain, waits for the command, and gives its output and its status.
`foreground` is the same for whoever has streams and a terminal to offer, such as `xenolith run`: the caller's thread
makes the domain and then only waits for the first note that ends the run (`Note`); one thread carries the console to
the output, another the input to the console.

Without a command the guest has the console: what comes in is typed to it. With one, only what the command prints comes
out and the command reads what comes in, as `debian.framing` has it, or it has the console as its terminal.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Final

from xenolith.abi import hypercalls
from xenolith.debian.framing import END_OF_INPUT, CommandOutput, input_chunk, new_nonce, typed
from xenolith.debian.initramfs import (
    Command,
    HostFile,
    InitramfsError,
    build_initramfs,
    kernel_arguments,
    needed_arguments,
)
from xenolith.debian.modules import kernel_modules
from xenolith.debian.packages import DEFAULT_KERNEL, GuestUnavailable, obtain
from xenolith.debian.roots import RootError
from xenolith.dom0.channel import Channel
from xenolith.dom0.console import ConsoleClosed, Overflow
from xenolith.dom0.disks import DiskSource
from xenolith.dom0.image import ImageError, KernelImage, load_image
from xenolith.dom0.power import power_on
from xenolith.dom0.services import Dom0, DomainSpec, GuestDomain
from xenolith.hypervisor.control import DomainCreateError, DomainInfo
from xenolith.machine.engines.protocol import EngineError
from xenolith.ready import readable
from xenolith.toolstack.errors import RunError, ToolstackError, UsageError
from xenolith.toolstack.run_disks import DISK_MODULES, parse_disks
from xenolith.toolstack.run_network import NET_MODULES, parse_network
from xenolith.toolstack.run_root import find_root
from xenolith.toolstack.run_volumes import VOLUME_MODULES, parse_volumes

END_OF_FILE: Final = b"\x04"  # what a terminal sends for the end of its input
INPUT_BYTES: Final = 64 << 10  # of a command's input at once
PANIC_LINES: Final = 100  # what Linux prints of a panic is forty to eighty


class Status(IntEnum):
    """How a run ended, where it did not end with a command's own status."""

    POWEROFF = 0
    OUTPUT_FAILED = 118  # what it printed could not be written
    TIMEOUT = 119
    REBOOT = 120
    CRASH = 121
    SUSPEND = 122
    NO_STATUS = 123  # powered off, but the command never finished
    OTHER_END = 124  # the guest gave a shutdown reason that Xen does not define
    CANNOT_RUN = 125
    SIGNALLED = 128  # plus the signal's number


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What to run, and in which domain.

    `kernel` is a file built for Xen PV or one of Debian's (see `debian.packages.obtain`). `files` are HOST[:GUEST],
    `disks` FILE[,ro|cow][,FORMAT]; `net` are the rules of its network ("": none), None: it has none.
    `volumes` are folders of the host, HOST:GUEST[:ro].
    `root` is what the guest's root file system is made of (see `run_root`), copy-on-write; empty: our initramfs.
    `directory` is where the command starts: if not given, /root, or in a root what that says.
    `size` is that of the terminal, in rows and columns, where a person sees what the guest prints; with `terminal` the
    command has it as its own.  With `errors_apart` its standard error does not come out with its output.
    """

    command: Sequence[str] = ()
    kernel: str = DEFAULT_KERNEL
    ramdisk: Path | None = None
    cmdline: str = ""
    memory_mib: int = 256
    vcpus: int = 1
    engine: str = "auto"
    files: Sequence[str] = ()
    modules: Sequence[str] = ()
    root: str = ""
    disks: Sequence[str] = ()
    volumes: Sequence[str] = ()
    net: str | None = None
    publish: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    directory: str = ""
    user: str = ""
    terminal: bool = False
    errors_apart: bool = False
    size: tuple[int, int] | None = None
    verbose: bool = False


@dataclass(frozen=True)
class Completed:
    """A run that has ended.

    `returncode` is the command's, or one of `Status`; `message` says what ended it where the command did not, and
    `console` are the last lines of the console where they tell more and were not in the output.
    """

    returncode: int
    output: bytes = b""
    message: str = ""
    console: str = ""
    statistics: Mapping[str, object] = field(default_factory=dict)


def run(
    command: Sequence[str] = (),
    *,
    input: bytes = b"",
    timeout: float | None = None,
    kernel: str | Path = DEFAULT_KERNEL,
    ramdisk: str | Path | None = None,
    cmdline: str = "",
    memory_mib: int = 256,
    vcpus: int = 1,
    engine: str = "auto",
    files: Sequence[str] = (),
    modules: Sequence[str] = (),
    root: str | Path | None = None,
    disks: Sequence[str] = (),
    volumes: Sequence[str] = (),
    net: str | None = None,
    publish: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    directory: str = "",
    user: str = "",
) -> Completed:
    """Run a command in a domain of its own, as subprocess.run does in a process; or, without one, a kernel to its end.

    `input` is the command's standard input. After `timeout` seconds the domain is ended, with Status.TIMEOUT.
    Raises RunError when the domain cannot be made.
    """
    spec = RunSpec(
        command=command,
        kernel=str(kernel),
        ramdisk=None if ramdisk is None else Path(ramdisk),
        cmdline=cmdline,
        memory_mib=memory_mib,
        vcpus=vcpus,
        engine=engine,
        files=files,
        modules=modules,
        root="" if root is None else str(root),
        disks=disks,
        volumes=volumes,
        net=net,
        publish=publish,
        environment=environment or {},
        directory=directory,
        user=user,
    )
    pieces: list[bytes] = []
    source = os.memfd_create("input")
    try:
        with open(source, "wb", closefd=False) as file:
            file.write(input)
        os.lseek(source, 0, os.SEEK_SET)
        done = foreground(spec, source, pieces.append, timeout=timeout)
    finally:
        os.close(source)
    return Completed(done.returncode, b"".join(pieces), done.message, done.console, done.statistics)


# --- what ends a run -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """Somebody outside ends the run, with this status."""

    status: int
    message: str = ""


@dataclass(frozen=True)
class Resized:
    """The terminal has this size now, in rows and columns; the run goes on."""

    size: tuple[int, int]


@dataclass(frozen=True)
class _ConsoleEnded:
    """All output of the domain has been written, and there will be no more."""


@dataclass(frozen=True)
class _OutputFailed:
    error: OSError


Note = Ended | Resized | _ConsoleEnded | _OutputFailed
Notes = SimpleQueue[Note]


def foreground(
    spec: RunSpec,
    source: int,
    write: Callable[[bytes], object],
    notes: Notes | None = None,
    *,
    write_errors: Callable[[bytes], object] | None = None,
    escape: bytes = b"",
    started: Callable[[], None] = lambda: None,
    timeout: float | None = None,
) -> Completed:
    """Make the domain and let it run until it, or a note that somebody puts into `notes`, ends the run.

    `source` is a descriptor to read the input from; `write` takes the output and `write_errors` the command's standard
    error, where that is apart; their OSErrors end the run. The character `escape`, if any, ends it when it comes in.
    `started` is called when the command starts, or the domain without one. Raises RunError when the domain cannot be
    made.
    """
    notes = notes or SimpleQueue()
    began = time.monotonic()
    nonce = new_nonce()
    try:
        spec, root = with_root(spec)
        framing = CommandOutput(nonce) if spec.command else None
        if write_errors is None or framing is None or spec.terminal:
            spec = replace(spec, errors_apart=False)
        with power_on([spec.memory_mib], spec.engine, pcpus=max(2, spec.vcpus)) as dom0:
            domain = dom0.create(_domain_spec(spec, root, nonce))
            streams = _Streams(domain, spec, framing, source, write, write_errors, notes, escape, started)
            note = _attended(dom0, domain, streams, notes, timeout)
            emergency = dom0.control.emergency_output(domain.domid)
            statistics = _statistics(dom0, domain, streams, began)
    except (GuestUnavailable, RootError, ImageError, InitramfsError, OSError, EngineError, DomainCreateError) as error:
        raise RunError(str(error)) from error
    match note:
        case Ended(status, message):
            return Completed(status, message=message, statistics=statistics)
        case _OutputFailed(failure):
            raise OutputFailed(failure)
    end = domain.wait()
    assert end is not None
    status, message, console = _ending(end, streams)
    if status != Status.POWEROFF and streams.first_output is None:
        console = console or emergency
    return Completed(status, message=message, console=_last_lines(console), statistics=statistics)


class OutputFailed(ToolstackError):
    """What the guest printed could not be written; the run was ended."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"the output cannot be written: {error.strerror}")
        self.error = error


def _attended(dom0: Dom0, domain: GuestDomain, streams: _Streams, notes: Notes, timeout: float | None) -> Note:
    """Run the domain; what ended it."""
    streams.start()
    dom0.start(domain)
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        try:
            note = notes.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        except Empty:
            note = Ended(Status.TIMEOUT, f"{timeout:g} seconds are over")
        if not isinstance(note, Resized):
            break
        rows, columns = note.size
        path = f"/local/domain/{domain.domid}/console/size"
        dom0.xenstore.write(path, f"{rows} {columns}", ["n0", f"r{domain.domid}"])
    if not isinstance(note, _ConsoleEnded):
        dom0.control.pause(domain.domid)
        domain.console.close()
    streams.stop()
    return note


# --- the domain to make --------------------------------------------------------------------------------------


def with_root(spec: RunSpec) -> tuple[RunSpec, DiskSource | None]:
    """A run in which what its root says was filled in, and that root. Raises UsageError and RootError."""
    if not spec.root:
        return spec, None
    root = find_root(spec.root)
    config = root.config
    command = (*config.entrypoint, *(spec.command or config.command))
    return replace(
        spec,
        command=command,
        environment={**config.environment, **spec.environment},
        directory=spec.directory or config.directory or "/",
        user=spec.user or config.user,
    ), root.source


def _domain_spec(spec: RunSpec, root: DiskSource | None, nonce: str) -> DomainSpec:
    """The domain; kept nowhere, as a kernel image is 50 MiB."""
    image = _image(spec.kernel)
    cmdline = spec.cmdline
    if spec.ramdisk is not None or image.guest_os.lower() != "linux":
        if spec.command or spec.files or spec.modules or spec.volumes or root:
            raise UsageError(
                "a command, a root, files, volumes and modules "
                + (
                    "need our initramfs, which a ramdisk of your own replaces"
                    if spec.ramdisk is not None
                    else f"need a Linux kernel; {spec.kernel} says that it is {image.guest_os or 'nothing'}"
                )
            )
        archive = spec.ramdisk.read_bytes() if spec.ramdisk is not None else b""
    else:
        archive = _initramfs(spec, nonce)
        arguments = kernel_arguments(spec.vcpus, verbose=spec.verbose)
        if root:
            arguments += " root=/dev/xvda rw"
        cmdline = f"{arguments} {cmdline}"
    return DomainSpec(
        name="run",
        image=image,
        kernel=spec.kernel,
        ramdisk=archive,
        cmdline=f"{needed_arguments(image)} {cmdline}".strip(),
        memory_kib=spec.memory_mib << 10,
        vcpus=spec.vcpus,
        disks=parse_disks(spec.disks, root),
        nets=parse_network(spec.net, spec.publish),
        shares=parse_volumes(spec.volumes)[0],
    )


def _initramfs(spec: RunSpec, nonce: str) -> bytes:
    own_kernel = _is_file(spec.kernel)
    if spec.modules and own_kernel:
        raise UsageError("modules are taken from the package of one of Debian's kernels, not for one of your own")
    guest = obtain(DEFAULT_KERNEL if own_kernel else spec.kernel)
    networked = spec.net is not None or spec.publish
    modules = [
        *spec.modules,
        *(DISK_MODULES if (spec.disks or spec.root) and not own_kernel else ()),
        *(NET_MODULES if networked and not own_kernel else ()),
        *(VOLUME_MODULES if spec.volumes and not own_kernel else ()),
    ]
    command = None
    if spec.command:
        directory = spec.directory or "/root"
        command = Command(spec.command, nonce, spec.environment, directory, spec.user, spec.terminal, spec.errors_apart)
    return build_initramfs(
        guest.busybox,
        command=command,
        environment=spec.environment,
        size=spec.size,
        files=[HostFile.parse(argument) for argument in spec.files],
        modules=kernel_modules(guest, modules) if modules else (),
        mounts=parse_volumes(spec.volumes)[1],
    )


def _is_file(kernel: str) -> bool:
    return "/" in kernel or os.path.exists(kernel)


def _image(kernel: str) -> KernelImage:
    return load_image(Path(kernel) if _is_file(kernel) else obtain(kernel).elf)


# --- the streams ---------------------------------------------------------------------------------------------


class _Streams:
    """The domain's console on the streams of a run."""

    def __init__(
        self,
        domain: GuestDomain,
        spec: RunSpec,
        framing: CommandOutput | None,
        source: int,
        write: Callable[[bytes], object],
        write_errors: Callable[[bytes], object] | None,
        notes: Notes,
        escape: bytes,
        started: Callable[[], None],
    ) -> None:
        self.console = console = domain.console
        self.framing = framing
        self.first_output: float | None = None  # time.monotonic()
        self.command_began: float | None = None
        self._spec = spec
        self._source = source
        self._write = write
        self._notes = notes
        self._escape = escape
        self._started = started
        self._reader = console.open_reader(Overflow.WAIT)
        self._lock = threading.Lock()
        self._in_mid_line = False  # where the output stands
        self._input_ended = False
        self._stop, self._stopping = os.pipe()
        self._input = threading.Thread(target=self._carry_input, name="input", daemon=True)
        self._errors: threading.Thread | None = None
        if spec.errors_apart and domain.channel is not None and write_errors is not None:
            self._errors = threading.Thread(
                target=self._carry_errors, args=(domain.channel, write_errors), name="errors", daemon=True
            )

    def start(self) -> None:
        """Begin to carry output, and input once somebody reads it."""
        threading.Thread(target=self._carry_output, name="output", daemon=True).start()
        if self._errors is not None:
            self._errors.start()
        if self.framing is None:
            self._begin()

    def _begin(self) -> None:
        self._started()
        self._input.start()

    def stop(self) -> None:
        """Read no more input. The console has ended, so nobody waits for it."""
        os.write(self._stopping, b"x")
        if self._input.ident:
            self._input.join()
        os.close(self._stop)
        os.close(self._stopping)

    def _carry_output(self) -> None:
        """Console to output, until the console ends."""
        try:
            while data := self._reader.read():
                self._write(self._filtered(data))
                self._note_prompt(in_mid_line=not data.endswith(b"\n"))
            if self.framing:
                self._write(self.framing.finish())
        except OSError as error:
            self._notes.put(_OutputFailed(error))
        else:
            if self._errors is not None:
                self._errors.join()
            self._notes.put(_ConsoleEnded())

    def _carry_errors(self, channel: Channel, write: Callable[[bytes], object]) -> None:
        """The command's standard error to ours, until its console ends."""
        console = channel.open(None)
        if console is None:
            return
        reader = console.open_reader(Overflow.WAIT)
        try:
            while data := reader.read():
                write(data)
        except OSError as error:
            self._notes.put(_OutputFailed(error))

    def _filtered(self, data: bytes) -> bytes:
        """What is to be printed of the console's output."""
        now = time.monotonic()
        self.first_output = self.first_output or now
        if self.framing is None:
            return data
        output = self.framing.feed(data)
        if self.framing.started and self.command_began is None:
            self.command_began = now
            self._begin()
        return output

    def _carry_input(self) -> None:
        """Input to the console, until either ends, `stop` is called or the escape character comes."""
        framed = self.framing is not None and not self._spec.terminal
        sysrq = self.framing is not None and self.framing.sysrq
        with contextlib.suppress(ConsoleClosed):
            while (data := self._read_input()) is not None:
                if self._escape and self._escape in data:
                    self.console.write(typed(data.partition(self._escape)[0], sysrq=sysrq))
                    self._notes.put(Ended(Status.POWEROFF))
                    return
                if not data:
                    if framed:
                        self.console.write(END_OF_INPUT)
                    else:
                        self._end_input()
                    return
                self.console.write(input_chunk(data, sysrq=sysrq) if framed else typed(data, sysrq=sysrq))

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
        """Bytes of the input, b"" at its end; None when it is time to stop."""
        while True:
            try:
                ready = readable(self._source, self._stop)
                return None if self._stop in ready else os.read(self._source, INPUT_BYTES)
            except BlockingIOError:  # somebody else was faster; it is theirs too
                continue
            except OSError:  # closed, or a terminal that hung up
                return b""


# --- what is told of it --------------------------------------------------------------------------------------


def _ending(end: DomainInfo, streams: _Streams) -> tuple[int, str, bytes]:
    """For a domain that ended by itself: the status, what the guest cannot say, and a console that nobody has seen."""
    framing = streams.framing
    match end.shutdown_reason:
        case hypercalls.SHUTDOWN_poweroff:
            if framing is None:
                return Status.POWEROFF, "", b""
            if framing.exit_status is not None:
                return framing.exit_status, "", b""
            return Status.NO_STATUS, "the guest powered off before the command finished", framing.preamble
        case hypercalls.SHUTDOWN_reboot:
            if framing is None:
                return Status.REBOOT, "", b""
            return Status.REBOOT, "the guest rebooted before the command finished", framing.preamble
        case hypercalls.SHUTDOWN_suspend:
            return Status.SUSPEND, "the guest suspended itself", b""
        case hypercalls.SHUTDOWN_crash:
            report = f": {end.crash_report}" if end.crash_report else ""
            return Status.CRASH, f"the guest crashed{report}", streams.console.scrollback if framing else b""
        case reason:
            return Status.OTHER_END, f"the guest ended with the unknown shutdown reason {reason}", b""


def _last_lines(output: bytes) -> str:
    return "\n".join(output.decode("utf-8", "replace").splitlines()[-PANIC_LINES:])


def _statistics(dom0: Dom0, domain: GuestDomain, streams: _Streams, began: float) -> dict[str, object]:
    def since_start(moment: float | None) -> float | None:
        return None if moment is None else round(moment - began, 3)

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
