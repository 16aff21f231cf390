"""`xenolith run`: one domain in the foreground, its console on the terminal (`toolstack.foreground` does the work).

Without a COMMAND the guest has the terminal: it is in raw mode while the domain runs and restored afterwards, and
what is typed, Ctrl-C too, goes to the guest. With a COMMAND only what the command prints comes out. On a terminal, that
is the command's from its start to its end; elsewhere standard input is the command's, byte for byte.

Signals that ask us to end, and those that tell of a new size of the terminal, become notes to the run.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Final

import click
from click.core import ParameterSource

from xenolith.cli.inside import run_in_clone
from xenolith.cli.progress import tell_of_downloads
from xenolith.cli.terminal import RawTerminal, signals_carried, terminal_size, write_all
from xenolith.toolstack import run_disks, run_network, run_root, run_volumes
from xenolith.toolstack.errors import RunError, UsageError
from xenolith.toolstack.foreground import (
    Completed,
    Ended,
    Notes,
    OutputFailed,
    Resized,
    RunSpec,
    Status,
    foreground,
)
from xenolith.toolstack.host import ENGINES

CTRL_RIGHT_BRACKET: Final = b"\x1d"
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


EXIT_STATUS_HELP: Final = """\b
Exit status:
  the COMMAND's own, if there is one and it finished;
  0    the guest powered off, or Ctrl-] was typed
  2    wrong usage
  118  standard output could not be written (the disk is full); the guest was ended
  119  the time given with --timeout was over
  120  the guest rebooted (a foreground run ends then)
  121  the guest crashed; the reason and its last lines are on standard error
  122  the guest suspended itself
  123  the guest powered off before COMMAND finished
  124  the guest ended for a reason unknown to Xen
  125  the domain could not be made; nothing was run
  126  there is no such --workdir
  127  there is no such COMMAND
  129, 130, 141, 143  ended by SIGHUP, SIGINT, a closed output, SIGTERM
"""


class CannotRun(click.ClickException):
    """The domain could not be made."""

    exit_code = Status.CANNOT_RUN


@click.command(epilog=EXIT_STATUS_HELP, context_settings={"allow_interspersed_args": False, "auto_envvar_prefix": None})
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default="auto",
    envvar="XENOLITH_ENGINE",
    show_default=True,
    help="What executes guest code. auto takes unicorn where there is no usable /dev/kvm, kvm where its traps are "
    "cheap, and else adaptive, which is both in turns; see `xenolith engines`. Environment: XENOLITH_ENGINE.",
)
@click.option("--memory", "memory_mib", type=click.IntRange(min=1), default=256, show_default=True, metavar="MiB")
@click.option("--vcpus", type=click.IntRange(min=1), default=1, show_default=True, metavar="N")
@click.option(
    "--kernel",
    default=RunSpec.kernel,
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
@click.option("--root", default="", metavar="DIR|TAR|IMAGE", help=run_root.HELP)
@click.option("--disk", "disks", multiple=True, metavar="FILE[,ro|cow]", help=run_disks.HELP)
@click.option("--volume", "volumes", multiple=True, metavar="HOST:GUEST[:ro]", help=run_volumes.HELP)
@click.option("--net", is_flag=False, flag_value="", metavar="[RULES]", help=run_network.NET_HELP)
@click.option("--publish", multiple=True, metavar="[ADDRESS:]HOST:GUEST[/udp]", help=run_network.PUBLISH_HELP)
@click.option(
    "--env",
    "environment",
    multiple=True,
    metavar="NAME[=VALUE]",
    help="Set a variable for COMMAND or the shell, or pass ours on.",
)
@click.option(
    "--workdir",
    "directory",
    default="",
    metavar="DIR",
    help="Where COMMAND starts.  [default: /root; with --root what a container image says, or /]",
)
@click.option(
    "--user", default="", metavar="USER", help="Run COMMAND as this user: a number, or a name the guest knows."
)
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="End the guest then.")
@click.option(
    "--template",
    metavar="NAME",
    help="Run COMMAND in a clone of this template of the daemon's (see `xenolith template`); only --env, --workdir, "
    "--user and --timeout go with it. Its standard error is ours, apart.",
)
@click.option(
    "-v",
    "--verbose",
    is_flag=True,
    help="Show the kernel's messages, and say on standard error which engine was chosen, and why.",
)
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
    root: str,
    disks: Sequence[str],
    volumes: Sequence[str],
    net: str | None,
    publish: Sequence[str],
    environment: Sequence[str],
    directory: str,
    user: str,
    timeout: float | None,
    template: str | None,
    verbose: bool,
    stats: bool,
    command: Sequence[str],
) -> None:
    """Boot one domain in the foreground.

    Without COMMAND its console is on the terminal; Ctrl-] leaves. With COMMAND (after --) the guest runs it, its output
    is printed alone, and its exit status is ours. COMMAND reads our standard input; where that and our output are a
    terminal, it has a terminal, too. Its standard error comes out as ours; with its output, in order, where it has a
    terminal or both of ours are the same.
    """
    if template is not None:
        _only_with_template()
        sys.exit(run_in_clone(template, command, dict(map(_variable, environment)), directory, user, timeout))
    _log_to_standard_error(verbose)
    on_terminal = os.isatty(0) and (not command or os.isatty(1))
    spec = RunSpec(
        command=command,
        kernel=kernel,
        ramdisk=ramdisk,
        cmdline=cmdline,
        memory_mib=memory_mib,
        vcpus=vcpus,
        engine=engine,
        files=files,
        modules=modules,
        root=root,
        disks=disks,
        volumes=volumes,
        net=net,
        publish=publish,
        environment=_terminal_type(on_terminal) | dict(map(_variable, environment)),
        directory=directory,
        user=user,
        terminal=on_terminal,
        errors_apart=_errors_apart(),
        size=terminal_size(1) if on_terminal else None,
        verbose=verbose,
    )
    sys.exit(_run(spec, timeout, stats))


def _errors_apart() -> bool:
    """Whether our standard error leads elsewhere than our output."""
    try:
        return not os.path.sameopenfile(1, 2)
    except OSError:  # one of them is closed
        return False


_GO_WITH_TEMPLATE: Final = frozenset(("template", "environment", "directory", "user", "timeout", "command"))


def _only_with_template() -> None:
    """Raises UsageError for an option that says how to make a guest, which a template is already."""
    context = click.get_current_context()
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if given and parameter.name not in _GO_WITH_TEMPLATE:
            raise click.UsageError(f"{parameter.opts[0]} does not go with --template, which is a guest already")


def _log_to_standard_error(verbose: bool) -> None:
    """What the choice of an engine and the building of native code have to say, for -v; without, only failures."""
    tell_of_downloads("xenolith.debian.roots.store")
    for name in ("xenolith.machine", "xenolith.hypervisor", "xenolith.debian"):
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.ERROR)


def _variable(argument: str) -> tuple[str, str]:
    """NAME=VALUE, or NAME with the value that it has here."""
    name, equals, value = argument.partition("=")
    if not equals and name not in os.environ:
        raise click.UsageError(f"--env {name}: there is no such variable here; give it a value, as in {name}=...")
    return name, value if equals else os.environ[name]


def _terminal_type(on_terminal: bool) -> dict[str, str]:
    kind = os.environ.get("TERM", "")
    return {"TERM": kind} if on_terminal and kind else {}


def _run(spec: RunSpec, timeout: float | None, stats: bool) -> int:
    """Run it on our streams and our terminal; the exit status."""
    notes: Notes = SimpleQueue()
    raw = RawTerminal(0)
    try:
        with _signals_noted(notes), raw:
            done = foreground(
                spec,
                0,
                lambda data: write_all(1, data),
                notes,
                write_errors=lambda data: write_all(2, data),
                escape=CTRL_RIGHT_BRACKET if spec.terminal else b"",
                started=raw.enter if spec.terminal else lambda: None,
                timeout=timeout,
            )
    except UsageError as error:
        raise click.UsageError(str(error)) from error
    except RunError as error:
        raise CannotRun(str(error)) from error
    except OutputFailed as failure:
        if isinstance(failure.error, BrokenPipeError):
            return Status.SIGNALLED + signal.SIGPIPE
        with suppress(OSError):  # it may be what cannot be written
            print(f"xenolith: {failure}", file=sys.stderr)
        return Status.OUTPUT_FAILED
    _report(done)
    if stats:
        print(json.dumps(done.statistics, indent=2), file=sys.stderr)
    return done.returncode


def _report(done: Completed) -> None:
    """Say on standard error how the domain ended, and show its last lines where they have not been printed."""
    if done.message:
        print(f"xenolith: {done.message}", file=sys.stderr)
    if done.console:
        print("Its last lines:", *done.console.splitlines(), sep="\n  ", file=sys.stderr)


def _signals_noted(notes: Notes) -> AbstractContextManager[None]:
    """While this lasts, signals leave a note instead of what they do."""
    return signals_carried(
        SIGNALS,
        lambda number: notes.put(Ended(Status.SIGNALLED + number)),
        lambda size: notes.put(Resized(size)),
    )
