"""The `xl` commands that take a domain away from where it is: save, restore, migrate, clone, suspend, resume."""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import click

from xenolith.cli.passage import Passage
from xenolith.cli.progress import progress_bar
from xenolith.cli.xl_command import Failure, Option, Options, Session, command, complain, resolve
from xenolith.cli.xl_create import STATUS_FAIL, read_config_file, start
from xenolith.toolstack.client import AfterSave, Progress, RelocationInfo, ToolstackError, Undetermined
from xenolith.toolstack.config.domain import absolute_paths
from xenolith.toolstack.peers import HAS_COME, HAS_NOT_COME, is_address

MOST_CLONES: Final = 10_000
_FORMAT: Final = "new xl format"


@command(
    "[options] <Domain> <CheckpointFile> [<ConfigFile>]",
    "Write a domain to a file and end it",
    Option("c", "Leave the domain running."),
    Option("p", "Leave the domain paused."),
    Option("z", "Compress the file (zstd).", long="compress"),
    operands=2,
)
def save(session: Session, options: Options, operands: Sequence[str]) -> int:
    domid = resolve(session, operands[0])
    path = Path(operands[1])
    after = AfterSave.RUN if "c" in options else AfterSave.PAUSE if "p" in options else AfterSave.DESTROY
    if len(operands) > 2:
        config = absolute_paths(read_config_file(operands[2]), Path.cwd())
        session.client.set_config(domid, config)
    complain(f"Saving to {path} {_FORMAT}")
    try:
        with progress_bar() as progress:
            session.client.save(domid, path.absolute(), after, "z" in options, progress)
    except ToolstackError as error:
        raise Failure(f"{error}\nFailed to save domain, resuming domain", STATUS_FAIL) from error
    return 0


@command(
    "[options] [<ConfigFile>] <CheckpointFile>",
    "Make a domain of a file that it was saved to",
    Option("F", "Stay in the foreground until the domain has ended."),
    Option("p", "Leave the domain paused."),
    Option("e", "Do not look after the domain when it ends."),
    Option("c", "Attach to the console when the domain has been restored."),
    Option("d", "Accepted for scripts, without effect."),
    operands=1,
)
def restore(session: Session, options: Options, operands: Sequence[str]) -> int:
    path = Path(operands[-1])
    config = absolute_paths(read_config_file(operands[0]), Path.cwd()) if len(operands) > 1 else None
    complain(f"Loading new save file {path} ({_FORMAT})")
    if config is None:
        complain(" Savefile contains xl domain config\nParsing config from <saved>")
    session.makes_domains = True
    try:
        with progress_bar() as progress:
            domid = session.client.restore(path.absolute(), config, progress)
    except ToolstackError as error:
        raise Failure(str(error), STATUS_FAIL) from error
    return start(session, options, domid, session.client.config(domid).name)


def _say_stage(stage: Progress) -> None:
    complain(f"migration sender: {stage.stage}")


_BANNER: Final = b"xl migration receiver ready, send binary domain data.\n"
SETTLE_SECONDS: Final = 300.0
_NO_PAUSE: Final = Option("p", "Leave the domain paused when it has come.")


@command(
    "[options] <Domain> <host>",
    "Relocate a running domain to another host",
    Option("C", "Send this configuration instead of the domain's.", value="CONFIG"),
    Option("s", "Reach the host by this command instead of ssh; by none, the host is itself a command.", value="SSH"),
    Option("e", "Have nobody look after the domain there when it ends."),
    _NO_PAUSE,
    Option("d", "Accepted for scripts, without effect.", long="debug"),
    Option("r", "Send no more than this while it runs, beginning slowly.", long="rate", value="MBIT"),
    Option("P", "Draw what it took, as PNG, PDF or SVG by the name.", long="plot", value="FILE"),
    operands=2,
)
def migrate(session: Session, options: Options, operands: Sequence[str]) -> int:
    domid = resolve(session, operands[0])
    if "C" in options:
        session.client.set_config(domid, absolute_paths(read_config_file(options["C"]), Path.cwd()))
    limit, plot = _rate(options), _plotter(options)
    if is_address(operands[1]):
        plot(_migrate_to_address(session, domid, operands[1], limit))
        return 0
    shell = options.get("s", "ssh")
    flags = "".join(f" -{flag}" for flag in "ep" if flag in options)
    line = f"exec {shell} {operands[1]} xl migrate-receive" if shell else operands[1]
    token = secrets.token_hex(16)
    with Passage() as passage, passage.to_command(line + flags if shell else line) as far:
        if far.banner(len(_BANNER)) != _BANNER:
            raise Failure("migration sender: unexpected answer of the other side\nmigration failed", STATUS_FAIL)
        complain("migration target: Ready to receive domain.")
        complain(f"Saving to migration stream {_FORMAT}")
        far.pass_on()
        try:
            took = session.client.send(domid, str(passage.socket), token, limit, _say_stage)
        except Undetermined as error:
            complain(f"{error}\nAsking the other side.")
            took = None
        except ToolstackError as error:
            raise Failure(f"{error}\nMigration failed", STATUS_FAIL) from error
    if took is None:
        _settle(session, domid, f"{line} -q {token}")
    _say_success(took)
    plot(took)
    return 0


def _rate(options: Options) -> float:
    """In bytes a second."""
    text = options.get("r", "0")
    if not text.isascii() or not text.isdigit():
        raise Failure(f"The rate must be a number of Mbit/s, not {text}.")
    return int(text) * 1e6 / 8


def _plotter(options: Options) -> Callable[[RelocationInfo | None], None]:
    """What draws a relocation, if that is wanted. Raises Failure where it cannot."""
    if "P" not in options:
        return lambda took: None
    try:
        from xenolith.cli.relocation_plot import plot
    except ImportError as error:
        raise Failure(f"--plot needs matplotlib (pip install 'xenolith[evaluation]'): {error}") from error
    return lambda took: plot(took, Path(options["P"])) if took is not None else None


def _say_success(took: RelocationInfo | None) -> None:
    if took is not None:
        sent = sum(each.pages for each in took.rounds) + took.last_pages
        complain(
            f"migration sender: {sent} pages in {took.took_ns / 1e9:.2f} s; it stood still for "
            f"{took.down_ns / 1e6:.0f} ms, in which {took.last_pages} of them were sent"
        )
    complain("migration sender: Target reports successful startup.\nMigration successful.")


def _migrate_to_address(session: Session, domid: int, address: str, limit: float) -> RelocationInfo | None:
    """The daemons talk to each other."""
    token = secrets.token_hex(16)
    took = None
    try:
        took = session.client.send(domid, address, token, limit, _say_stage)
    except Undetermined as error:
        complain(f"{error}\nAsking the other side.")
        _decide(session, domid, session.client.settle(token, address))
    except ToolstackError as error:
        raise Failure(f"{error}\nMigration failed", STATUS_FAIL) from error
    _say_success(took)
    return took


def _settle(session: Session, domid: int, line: str) -> None:
    """Whether the domain has come there says the other side. Raises Failure where it has not, or says nothing."""
    asked = subprocess.run(
        ["/bin/sh", "-c", line], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=SETTLE_SECONDS, check=False
    )
    if asked.stdout not in (HAS_COME, HAS_NOT_COME):
        raise Failure("It does not say. CHECK AT BOTH ENDS for a running instance.\nMigration failed", STATUS_FAIL)
    _decide(session, domid, asked.stdout == HAS_COME)


def _decide(session: Session, domid: int, has_come: bool) -> None:
    """Raises Failure where the domain stays here."""
    if has_come:
        session.client.destroy(domid)
        return
    session.client.unpause(domid)
    raise Failure("It has not come there and goes on here.\nMigration failed", STATUS_FAIL)


@command(
    "[options]",
    "Receive a domain on stdin and stdout; `xl migrate` on another host calls this",
    Option("e", "Do not look after the domain when it ends."),
    _NO_PAUSE,
    Option("d", "Accepted for scripts, without effect."),
    Option("q", "Say whether the domain with this token has come; if not, it will not come any more.", value="TOKEN"),
)
def migrate_receive(session: Session, options: Options, operands: Sequence[str]) -> int:
    session.makes_domains = True
    client, supervision = session.toolstack.client, session.toolstack.supervision
    if "q" in options:
        click.echo((HAS_COME if client.settle(options["q"]) else HAS_NOT_COME).decode(), nl=False)
        return 0
    with Passage() as passage, passage.to_standard_streams() as far:
        far.say(_BANNER)
        far.pass_on()
        try:
            domid = client.receive(passage.socket, "p" in options)
        except ToolstackError as error:
            said = f"migration target: {error}\nmigration target: Domain creation failed"
            raise Failure(said, STATUS_FAIL) from error
    if "e" not in options:
        supervision.supervise(domid)
    complain("migration target: Domain started successsfully.")
    return 0


@command(
    "[options] <Domain> [<Name>]",
    "Make copies of a running domain that share its memory",
    Option("n", "Make so many, called Name-1, Name-2, ... (Xenolith's own).", long="count", value="N"),
    Option("p", "Leave the copies paused."),
    operands=1,
)
def clone(session: Session, options: Options, operands: Sequence[str]) -> int:
    domid = resolve(session, operands[0])
    client, supervision = session.toolstack.client, session.toolstack.supervision
    name = operands[1] if len(operands) > 1 else f"{session.client.config(domid).name}-clone"
    names = [name]
    if "n" in options:
        if not options["n"].isascii() or not options["n"].isdigit() or not 1 <= int(options["n"]) <= MOST_CLONES:
            raise Failure(f"The number of clones must be 1 to {MOST_CLONES}, not {options['n']}.")
        names = [f"{name}-{number}" for number in range(1, int(options["n"]) + 1)]
    try:
        with progress_bar() as progress:
            made = client.clone(domid, names, progress)
    except ToolstackError as error:
        raise Failure(str(error), STATUS_FAIL) from error
    for each in made:
        supervision.supervise(each)
        if "p" not in options:
            client.unpause(each)
    for each, called in zip(made, names, strict=True):
        click.echo(f"{each} {called}")
    return 0


@command("<Domain>", "Have the guest suspend itself, keeping its memory", operands=1)
def suspend(session: Session, options: Options, operands: Sequence[str]) -> int:
    session.client.suspend(resolve(session, operands[0]))
    return 0


@command("<Domain>", "Let a suspended guest go on", operands=1)
def resume(session: Session, options: Options, operands: Sequence[str]) -> int:
    session.client.resume(resolve(session, operands[0]))
    return 0
