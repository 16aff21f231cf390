"""The `xenolith` command: a group whose subcommands are imported when they are used.

Importing numpy, the engines and the parsers takes longer than printing a usage line, so every subcommand is a module
and an attribute, looked up only when it is called or its help is asked for.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Final

import click

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's, of which nothing here needs one, let alone all

SUBCOMMANDS: Final = {
    "run": ("xenolith.cli.run", "run", "Boot one domain in the foreground: a shell, or one command."),
    "demo": ("xenolith.cli.demo", "demo", "Boot several domains side by side and show that they are isolated."),
    "engines": ("xenolith.cli.engines", "engines", "Say which engines work on this host, and which is the default."),
    "guest": ("xenolith.cli.guest", "guest", "Obtain a guest operating system to boot."),
    "checkpoint": ("xenolith.cli.checkpoint", "checkpoint", "Keep what a domain is, once or every few seconds."),
    "checkpoints": ("xenolith.cli.checkpoint", "checkpoints", "List the checkpoints of a domain."),
    "rollback": ("xenolith.cli.checkpoint", "rollback", "Let a domain be what it was at a checkpoint."),
    "image": ("xenolith.cli.image", "image", "Make a root file system with a Debian in it; list and remove those."),
    "template": ("xenolith.cli.template", "template", "Guests booted once, of which clones stand ready for run."),
    "exec": ("xenolith.cli.inside", "execute", "Run a command inside the guest of a domain."),
    "cp": ("xenolith.cli.inside", "cp", "Copy files into a guest or out of it."),
    "logs": ("xenolith.cli.inside", "logs", "Print what a domain has printed on its console."),
    "ps": ("xenolith.cli.inside", "ps", "List the processes inside the guest of a domain."),
    "wait": ("xenolith.cli.inside", "wait", "Wait until a domain has ended, and say how."),
    "listen": ("xenolith.cli.checkpoint", "listen", "Let other daemons come, with domains to relocate or to hold."),
    "protect": ("xenolith.cli.checkpoint", "protect", "Have another daemon go on with a domain when this one dies."),
    "net": ("xenolith.cli.net", "net", "Look at the network: who is attached, rules and their counters, packets."),
    "daemon": ("xenolith.cli.daemon", "daemon", "Run a machine for the xl commands, in the foreground."),
    "help": ("xenolith.cli.main", "help_", "Print this list, or how to use a subcommand."),
}
"""Name -> (module, attribute, one line for the list)."""


class Subcommands(click.Group):
    """A group that knows its commands by name and loads them late."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in SUBCOMMANDS:
            return _xl_command(ctx, cmd_name)
        module, attribute, _ = SUBCOMMANDS[cmd_name]
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in SUBCOMMANDS.items()])
        with formatter.section("Domains of the daemon"):
            formatter.write_text("Xen's xl commands (create, list, console, shutdown, ...): `xl help` lists them.")


def _xl_command(ctx: click.Context, name: str) -> click.Command | None:
    """One of xl's subcommands, by its full name."""
    from xenolith.cli import xl
    from xenolith.cli.xl_command import Session, connect_to_daemon

    if name not in xl.SUBCOMMANDS:
        return None
    ctx.obj = ctx.obj or Session(connect_to_daemon)
    return xl.subcommand(name)


@click.group(cls=Subcommands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="xenolith", prog_name="xenolith")
def xenolith() -> None:
    """A Xen virtual machine monitor in Python."""


@click.command("help")
@click.argument("subcommand", required=False)
@click.pass_context
def help_(ctx: click.Context, subcommand: str | None) -> None:
    """Print the list of subcommands, or how to use one."""
    group = ctx.parent
    assert group is not None
    if subcommand is None:
        click.echo(group.get_help())
        return
    found = xenolith.get_command(group, subcommand)
    if found is None:
        raise click.UsageError(f"No such command {subcommand!r}.", group)
    with click.Context(found, group, subcommand) as of_command:
        click.echo(found.get_help(of_command))
