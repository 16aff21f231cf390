"""Working inside the guest of a domain: `xenolith exec`, `cp`, `logs`, `ps` and `wait`.

What a command prints goes to standard output as it is, as with ssh; what we say about it, and on a terminal a console's
history and a list of processes, has nothing in it that a terminal would obey.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Final

import click

from xenolith.cli.terminal import RawTerminal, signals_carried, terminal_size, write_all
from xenolith.cli.xl_command import connect_to_daemon
from xenolith.ready import readable
from xenolith.toolstack.agent.files import Files
from xenolith.toolstack.agent.running import printable
from xenolith.toolstack.client import (
    LIMITS,
    Client,
    DomainNotFound,
    Execution,
    InvalidRequest,
    ProcessEnd,
    ProcessStream,
    ToolstackError,
    find_by_name,
    find_domain,
)

LEAVE: Final = b"\x1d"  # Ctrl-]
FORWARDED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
OUTPUT_FAILED: Final = 118
CANNOT_RUN: Final = 125
_CHUNK: Final = 64 << 10
Show = Callable[[int, bytes], None]  # prints on a descriptor
_REASONS: Final = ("poweroff", "reboot", "suspend", "crash", "watchdog", "soft-reset")

EXIT_STATUS_HELP: Final = """\b
Exit status:
  the COMMAND's own; 128 + n if signal n ended it
  118  standard output could not be written
  119  the time given with --timeout was over; it was killed
  125  there is no such domain, or its guest has no agent that answers, or not any more
  126  COMMAND could not be started: no such --workdir or --user, or it may not be run
  127  there is no such COMMAND
"""


class CannotRun(click.ClickException):
    exit_code = CANNOT_RUN


def find(client: Client, name: str) -> int:
    """The domid of a guest by its name or number. Raises ToolstackError."""
    domid = find_by_name(client, name)
    if domid is None and name.isascii() and name.isdigit():
        with suppress(DomainNotFound):
            domid = find_domain(client, int(name)).domid
    if not domid:
        raise InvalidRequest(f"There is no guest {name!r}.")
    return domid


def variables(given: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE, or NAME with the value that it has here."""
    found = {}
    for argument in given:
        name, equals, value = argument.partition("=")
        if not equals and name not in os.environ:
            raise click.UsageError(f"--env {name}: there is no such variable here; give it a value, as in {name}=...")
        found[name] = value if equals else os.environ[name]
    return found


def _limits(given: Sequence[str]) -> dict[str, int]:
    found = {}
    for argument in given:
        name, _, value = argument.partition("=")
        if name not in LIMITS or not value.isascii() or not value.isdigit():
            raise click.UsageError(f"--limit {argument}: it is NAME=NUMBER with one of {', '.join(LIMITS)}")
        found[name] = int(value)
    return found


@click.command("exec", epilog=EXIT_STATUS_HELP, context_settings={"allow_interspersed_args": False})
@click.option("-i", "--interactive", is_flag=True, help="COMMAND reads our standard input.")
@click.option("-t", "--tty", is_flag=True, help="COMMAND has a terminal; Ctrl-] leaves it.")
@click.option(
    "--env", "-e", "environment", multiple=True, metavar="NAME[=VALUE]", help="Set a variable, or pass ours on."
)
@click.option("--workdir", "-w", default="/root", show_default=True, metavar="DIR", help="Where COMMAND starts.")
@click.option("--user", "-u", default="", metavar="USER[:GROUP]", help="Run as this user: a number or a name.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Kill COMMAND then.")
@click.option(
    "--limit", "limits", multiple=True, metavar="NAME=NUMBER", help=f"A limit of setrlimit(2): {', '.join(LIMITS)}."
)
@click.argument("domain")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def execute(
    interactive: bool,
    tty: bool,
    environment: Sequence[str],
    workdir: str,
    user: str,
    timeout: float | None,
    limits: Sequence[str],
    domain: str,
    command: Sequence[str],
) -> None:
    """Run a COMMAND inside the guest of a DOMAIN.

    Its standard output and standard error are ours, apart; its exit status is ours; signals that we get are passed on.
    The guest must have our agent, as the guests of `xenolith guest debian` have; one that boots is waited for.
    """
    if command[0] == "--":
        command = command[1:]
    if not command:
        raise click.UsageError("there is no COMMAND")
    kind = {"TERM": os.environ["TERM"]} if tty and os.environ.get("TERM") else {}
    wanted = Execution(
        command=tuple(command),
        environment=kind | variables(environment),
        directory=workdir,
        user=user,
        terminal=(terminal_size(1) or (24, 80)) if tty else None,
        timeout=timeout,
        limits=_limits(limits),
    )
    try:
        client = connect_to_daemon().client
        process = client.execute(find(client, domain), wanted)
    except ToolstackError as error:
        raise CannotRun(str(error)) from error
    sys.exit(accompany(process, reads=interactive, terminal=tty))


def run_in_clone(
    template: str, command: Sequence[str], environment: dict[str, str], directory: str, user: str, timeout: float | None
) -> int:
    """`xenolith run --template`, where that is not `warm`'s: with a terminal if ours is one. The exit status."""
    if not command:
        raise click.UsageError("--template runs a COMMAND, of which there is none")
    on_terminal = os.isatty(0) and os.isatty(1)
    kind = {"TERM": os.environ["TERM"]} if on_terminal and os.environ.get("TERM") else {}
    wanted = Execution(
        command=tuple(command),
        environment=kind | environment,
        directory=directory,
        user=user,
        terminal=(terminal_size(1) or (24, 80)) if on_terminal else None,
        timeout=timeout,
    )
    try:
        process = connect_to_daemon().client.run_template(template, wanted)
    except ToolstackError as error:
        raise CannotRun(str(error)) from error
    return accompany(process, reads=True, terminal=on_terminal)


def accompany(process: ProcessStream, *, reads: bool, terminal: bool, show: Show = write_all) -> int:
    """Connect a process to our streams, our terminal and our signals until its end; the exit status."""
    woken, wake = os.pipe()
    feeder = threading.Thread(target=_feed, args=(process, woken, terminal), name="input", daemon=True)
    raw = RawTerminal(0)
    try:
        with signals_carried(FORWARDED, process.signal, lambda size: process.resize(*size)), raw:
            if not reads:
                process.end_input()
            elif terminal:
                raw.enter()
            if reads:
                feeder.start()
            end = _print(process, show)
            os.write(wake, b"x")
            if feeder.ident:
                feeder.join()
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            return 128 + signal.SIGPIPE
        print(f"xenolith: standard output cannot be written: {error.strerror}", file=sys.stderr)
        return OUTPUT_FAILED
    finally:
        process.close()
        os.close(wake)
    if end.message:
        print(f"xenolith: {end.message}", file=sys.stderr)
    return end.status


def _print(process: ProcessStream, show: Show) -> ProcessEnd:
    while not isinstance(item := process.read(), ProcessEnd):
        if item is not None:
            show(2 if item.errors else 1, item.data)
    return item


def _feed(process: ProcessStream, woken: int, terminal: bool) -> None:
    """Our input to the process, until either ends."""
    try:
        while woken not in readable(0, woken):
            data = os.read(0, _CHUNK)
            before, leaving, _ = data.partition(LEAVE) if terminal and os.isatty(0) else (data, b"", b"")
            process.write(before)
            if leaving:
                process.close()
                return
            if not data:
                break
    except OSError:
        pass  # it cannot be read, which is its end
    process.end_input()


@click.command()
@click.argument("source")
@click.argument("destination")
def cp(source: str, destination: str) -> None:
    """Copy a file or directory into a guest or out of it.

    One of SOURCE and DESTINATION is DOMAIN:PATH. It is copied to DESTINATION, or into it if that is a directory. A
    path of this machine's with a colon in it begins with / or ./.
    """
    (there, from_path), (into, to_path) = _place(source), _place(destination)
    if bool(there) == bool(into):
        raise click.UsageError("one of the two must be in a domain, as DOMAIN:PATH")
    try:
        client = connect_to_daemon().client
        domid = find(client, there or into)
        files = Files(lambda wanted: client.execute(domid, wanted))
        if into:
            files.put(from_path, to_path or "/root")
        else:
            files.get(from_path, to_path)
    except ToolstackError as error:
        raise click.ClickException(str(error)) from error


def _place(argument: str) -> tuple[str, str]:
    """The domain ("": this machine) and the path."""
    domain, colon, path = argument.partition(":")
    return (domain, path) if colon and domain and "/" not in domain else ("", argument)


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on with what is printed from now on.")
@click.argument("domain")
def logs(follow: bool, domain: str) -> None:
    """Print what a DOMAIN has printed recently on its console."""
    try:
        client = connect_to_daemon().client
        domid = find(client, domain)
        if not follow:
            _show(1, client.console_history(domid))
            return
        console = client.open_console(domid)
    except ToolstackError as error:
        raise click.ClickException(str(error)) from error
    try:
        while data := console.read():
            _show(1, data)
    finally:
        console.close()


def _show(descriptor: int, data: bytes) -> None:
    """What a guest says of itself: no terminal is to obey it."""
    if os.isatty(descriptor):
        data = printable(data.replace(b"\r", b"")).encode()
    write_all(descriptor, data)


@click.command()
@click.argument("domain")
def ps(domain: str) -> None:
    """List the processes inside the guest of a DOMAIN."""
    try:
        client = connect_to_daemon().client
        wanted = Execution(command=("ps", "-o", "pid,ppid,user,vsz,stat,args"), directory="/")
        process = client.execute(find(client, domain), wanted)
    except ToolstackError as error:
        raise CannotRun(str(error)) from error
    sys.exit(accompany(process, reads=False, terminal=False, show=_show))


@click.command()
@click.option("--timeout", type=click.FloatRange(min=0), metavar="SECONDS", help="Give up then, with status 119.")
@click.argument("domain")
def wait(timeout: float | None, domain: str) -> None:
    """Wait until a DOMAIN has ended; print how: poweroff, reboot, suspend, crash, or destroyed."""
    from xenolith.toolstack.api import Domain, Machine, State, Timeout

    try:
        toolstack = connect_to_daemon()
        client = toolstack.client
        domid = find(client, domain)
        guest = Domain(Machine(client, toolstack.supervision, ExitStack()), domid)
        state = guest.wait(timeout=timeout)
        reason = guest.info.shutdown_reason if state is State.SHUTDOWN else None
    except DomainNotFound:
        reason = None
    except Timeout:
        sys.exit(119)
    except ToolstackError as error:
        raise click.ClickException(str(error)) from error
    click.echo("destroyed" if reason is None else _REASONS[reason] if reason < len(_REASONS) else f"reason {reason}")
