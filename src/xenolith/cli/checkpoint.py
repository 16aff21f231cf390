"""A domain as it was a moment ago, here or at another daemon: `xenolith checkpoint`, `rollback`, `protect`, ..."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, Final

import click

from xenolith.cli.xl_command import Failure, Session, connect_to_daemon, resolve, shown
from xenolith.toolstack.client import Checkpoint, ToolstackError

KEPT: Final = 10
_DIRECTORY = click.option(
    "--to",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="The directory of the checkpoints; by default one of this user's, by the domain's name.",
)


def _with_session(action: Callable[..., None]) -> Callable[..., None]:
    """What goes wrong is told in a sentence."""

    @wraps(action)
    def wrapped(ctx: click.Context, /, *values: Any, **named: Any) -> None:
        try:
            action(ctx.find_object(Session) or Session(connect_to_daemon), *values, **named)
        except (Failure, ToolstackError) as error:
            raise click.ClickException(str(error)) from error

    return click.pass_context(wrapped)


def _directory(name: str, chosen: Path | None) -> Path:
    if chosen is not None:
        return chosen.absolute()
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state).absolute() / "xenolith" / "checkpoints" / name.replace("/", "_")


def _name(session: Session, domain: str) -> str:
    """The name of a domain, which may be gone."""
    if not domain.isascii() or not domain.isdigit():
        return domain
    return session.client.config(resolve(session, domain)).name


@click.command()
@click.argument("domain")
@click.option("--every", type=click.FloatRange(min=0), metavar="SECONDS", help="And again and again; 0: no more.")
@click.option("--keep", type=click.IntRange(min=1), default=KEPT, show_default=True, help="How many are kept at least.")
@_DIRECTORY
@_with_session
def checkpoint(session: Session, domain: str, every: float | None, keep: int, directory: Path | None) -> None:
    """Keep what DOMAIN is at this moment, its memory and its disks, without stopping it.

    Only what has changed since the last checkpoint is written. Disks that it can write to must have the format overlay.
    """
    domid = resolve(session, domain)
    to = _directory(session.client.config(domid).name, directory)
    if every is not None:
        session.client.checkpoint_every(domid, to, every, keep)
        click.echo(f"every {every:g} s into {shown(str(to))}" if every else "no more checkpoints")
        return
    made = session.client.checkpoint(domid, to, keep)
    if made.remark:
        click.echo(f"The domain had to stand still for all of it: {made.remark}", err=True)
    click.echo(f"checkpoint {made.number}: {made.pages} pages at a standstill of {made.stood_ns / 1e6:.1f} ms")


@click.command()
@click.argument("domain")
@_DIRECTORY
@_with_session
def checkpoints(session: Session, domain: str, directory: Path | None) -> None:
    """List the checkpoints of DOMAIN, which may be gone."""
    found = session.client.checkpoints(_directory(_name(session, domain), directory))
    click.echo(f"{'NUMBER':>6}  {'TAKEN':<19}  {'MiB':>7}  {'GOES ON FROM':<12}  DISKS")
    for each in found:
        click.echo(_line(each))


def _line(each: Checkpoint) -> str:
    taken = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.taken))
    base = each.base.partition(".")[0] or "-"
    line = f"{each.number:>6}  {taken}  {each.size_bytes / (1 << 20):7.1f}  {base:<12}  {len(each.disks)}"
    return shown(line)


@click.command()
@click.argument("domain")
@click.argument("number", required=False, type=click.IntRange(min=1))
@click.option("--paused", "-p", is_flag=True, help="Leave it paused.")
@_DIRECTORY
@_with_session
def rollback(session: Session, domain: str, number: int | None, paused: bool, directory: Path | None) -> None:
    """Let DOMAIN be what it was at checkpoint NUMBER, or the last one: its memory and its disks.

    What it is now is lost, and so are later checkpoints.
    """
    found = session.client.checkpoints(_directory(_name(session, domain), directory))
    wanted = [each for each in found if number in (None, each.number)]
    if not wanted:
        raise Failure(f"There is no checkpoint {number} of {domain}." if number else f"{domain} has no checkpoint.")
    session.makes_domains = True
    domid = session.client.rollback(wanted[-1].path)
    session.toolstack.supervision.supervise(domid)
    if not paused:
        session.client.unpause(domid)
    click.echo(f"{shown(domain)} goes on from checkpoint {wanted[-1].number} as domain {domid}")


@click.command()
@click.argument("address", required=False)
@click.option("--stop", is_flag=True, help="Let nobody come any more, at no address.")
@_with_session
def listen(session: Session, address: str | None, stop: bool) -> None:
    """Let other daemons come to ADDRESS, unix:/PATH or tls:HOST:PORT, to relocate domains here or have them held.

    For TLS the directory XENOLITH_TLS, by default ~/.config/xenolith/tls, has cert.pem, key.pem and ca.pem.
    """
    if bool(address) == stop:
        raise click.UsageError("either an address or --stop")
    session.makes_domains = True
    session.client.listen(address or "")


@click.command()
@click.argument("domain", required=False)
@click.option("--to", "address", help="The other daemon: unix:/PATH or tls:HOST:PORT, where it listens.")
@click.option("--every", type=click.IntRange(min=1), default=100, show_default=True, help="An epoch, in milliseconds.")
@click.option("--stop", is_flag=True, help="Let the other daemon forget it.")
@_with_session
def protect(session: Session, domain: str | None, address: str | None, every: int, stop: bool) -> None:
    """Have another daemon hold DOMAIN, memory and disks, and go on with it when this one dies.

    What the domain sends to the network leaves when the other daemon holds the state that it was sent from. Without
    DOMAIN: list those that are held.
    """
    if domain is None:
        for each in session.client.protections():
            state = each.failure or (
                f"epoch {each.epochs}: {each.pages} pages, {each.blocks} blocks, "
                f"stood {each.stood_ns / 1e6:.1f} ms, held after {each.took_ns / 1e6:.1f} ms"
            )
            click.echo(shown(f"{each.domid} at {each.to}: {state}"))
        return
    domid = resolve(session, domain)
    if stop:
        session.client.protect(domid, "", 0)
        return
    if address is None:
        raise click.UsageError("who is to hold it? (--to)")
    session.client.protect(domid, address, every / 1000)
    click.echo(f"{shown(domain)} is held by {address}")
