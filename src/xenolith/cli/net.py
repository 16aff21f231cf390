"""`xenolith net`: the virtual firewall-router of the daemon's machine."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from xenolith.cli.xl_command import Failure, Session, connect_to_daemon, resolve, shown
from xenolith.toolstack.client import NetworkInfo, ToolstackError

_OF_INTERFACE = click.option(
    "--vif", "devid", type=click.IntRange(min=0), default=0, show_default=True, help="Which of its interfaces."
)


class _Errors(click.Group):
    """What goes wrong is told in a sentence."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (Failure, ToolstackError) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Errors)
@click.pass_context
def net(ctx: click.Context) -> None:
    """Look at the network: who is attached, rules and their counters, packets."""
    ctx.obj = ctx.obj or Session(connect_to_daemon)


@net.command()
@click.argument("address", required=False)
@click.pass_obj
def join(session: Session, address: str | None) -> None:
    """Let domains here reach those of the daemon that listens at ADDRESS, unix:/PATH or tls:HOST:PORT, and they ours.

    Without ADDRESS print the networks that were joined.
    """
    if address is not None:
        session.client.join_network(address)
    else:
        for each in session.client.joined_networks():
            click.echo(each)


@net.command()
@click.pass_obj
def leave(session: Session) -> None:
    """Be a network of this daemon's domains alone again."""
    session.client.join_network("")


@net.command()
@click.argument("domain", required=False)
@click.pass_obj
def show(session: Session, domain: str | None) -> None:
    """Print all interfaces, or those of DOMAIN, with what they did and why their packets were dropped."""
    table = Table(box=None, header_style="reverse")
    for heading in ("DOMAIN", "ID", "VIF", "ADDRESS", "MAC", "RX packets", "RX bytes", "TX packets", "TX bytes"):
        table.add_column(heading, no_wrap=True, justify="left" if heading in ("DOMAIN", "ADDRESS", "MAC") else "right")
    table.add_column("PUBLISHED")
    table.add_column("DROPPED")
    for domid, name in _domains(session, domain):
        for each in session.client.networks(domid):
            counters = each.received_packets, each.received_bytes, each.sent_packets, each.sent_bytes
            dropped = dict(each.dropped) | ({"not taken": each.received_dropped} if each.received_dropped else {})
            table.add_row(
                Text(shown(name)),
                str(domid),
                str(each.devid),
                each.address,
                each.mac,
                *map(str, counters),
                " ".join(each.published),
                ", ".join(f"{reason} {count}" for reason, count in sorted(dropped.items())),
            )
    Console(width=None if sys.stdout.isatty() else 200).print(table)


@net.command()
@click.argument("domain", required=False)
@click.argument("rules_", metavar="[RULES]", required=False)
@_OF_INTERFACE
@click.option("--file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Read RULES from a file.")
@click.pass_obj
def rules(session: Session, domain: str | None, rules_: str | None, devid: int, file: Path | None) -> None:
    """Print rules with their counters, or give an interface others: they hold from its next packet on.

    RULES are separated by semicolons, for example "allow out tcp/443 to *.debian.org; deny in". An empty text takes all
    rules away.
    """
    if file is not None:
        rules_ = file.read_text()
    if rules_ is not None:
        if domain is None:
            raise click.UsageError("whose rules?")
        session.client.set_network_rules(resolve(session, domain), devid, rules_)
        return
    for domid, name in _domains(session, domain):
        for each in session.client.networks(domid):
            click.echo(f"{shown(name)} vif {each.devid}, {each.address}" + (":" if each.rules else ": no rules"))
            _print_rules(each)


def _print_rules(each: NetworkInfo) -> None:
    for rule in each.rules:
        click.echo(f"{rule.packets:12} packets {rule.bytes:14} bytes   {rule.text}")


@net.command()
@click.argument("domain")
@_OF_INTERFACE
@click.option("--write", "-w", type=click.Path(dir_okay=False, path_type=Path), help="Write into a file.")
@click.pass_obj
def dump(session: Session, domain: str, devid: int, write: Path | None) -> None:
    """Copy DOMAIN's packets in pcap's format, for `tcpdump -r -` or Wireshark, until it ends or Ctrl-C."""
    if write is None and sys.stdout.isatty():
        raise click.UsageError("pcap is not for a terminal: give a file by -w, or pipe it into tcpdump -nr -")
    stream = session.client.capture_network(resolve(session, domain), devid)
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(stream.close)
        out = cleanup.enter_context(write.open("wb")) if write else sys.stdout.buffer
        with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
            while data := stream.read():
                out.write(data)
                out.flush()


def _domains(session: Session, word: str | None) -> list[tuple[int, str]]:
    names = {domain.domid: domain.name for domain in session.client.domains()}
    if word is None:
        return [(domid, name) for domid, name in names.items() if domid]
    domid = resolve(session, word)
    return [(domid, names.get(domid, ""))]
