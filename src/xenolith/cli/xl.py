"""The `xl` command: Xen's toolstack on the command line.

`xl [-vfNtT] <subcommand> [args]`. The subcommands are in the modules `xl_create`, `xl_list`, `xl_domain` and `top`;
what is missing of Xen's own says so by name. A subcommand may be abbreviated as long as it stays unambiguous.

`xl` is a click group of its own; another group may include its subcommands with `subcommand`, giving them a `Session`
as the context's object.
"""

from __future__ import annotations

import getopt
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from textwrap import TextWrapper
from typing import Any, Final

import click

from xenolith.cli.xl_command import (
    Session,
    Toolstack,
    XlCommand,
    complain,
    connect_to_daemon,
    connect_to_running_daemon,
)

NOT_YET: Final = frozenset(
    """
    block-attach block-detach block-list button-press cd-eject cd-insert channel-list cpupool-cpu-add
    cpupool-cpu-remove cpupool-create cpupool-destroy cpupool-list cpupool-migrate cpupool-numa-split cpupool-rename
    debug-keys devd getenforce loadpolicy mem-max mem-set migrate migrate-receive network-attach network-detach
    network-list pci-assignable-add pci-assignable-list pci-assignable-remove pci-attach pci-detach pci-list
    psr-cat-set psr-cat-show psr-cmt-attach psr-cmt-detach psr-cmt-show psr-hwinfo psr-mba-set psr-mba-show
    qemu-monitor-command remus restore resume save sched-credit sched-credit2 sched-rtds set-parameters setenforce
    sharing suspend usb-list usbctrl-attach usbctrl-detach usbdev-attach usbdev-detach vcpu-pin vcpu-set
    vdispl-attach vdispl-detach vdispl-list vkb-attach vkb-detach vkb-list vncviewer vsnd-attach vsnd-detach
    vsnd-list vtpm-attach vtpm-detach vtpm-list
    """.split()  # noqa: SIM905
)
"""Xen's other subcommands."""

MODULES: Final = {
    "create": "xl_create",
    "config-update": "xl_create",
    "list": "xl_list",
    "destroy": "xl_domain",
    "shutdown": "xl_domain",
    "reboot": "xl_domain",
    "pause": "xl_domain",
    "unpause": "xl_domain",
    "console": "xl_domain",
    "dump-core": "xl_domain",
    "vcpu-list": "xl_list",
    "vm-list": "xl_list",
    "info": "xl_list",
    "domid": "xl_list",
    "domname": "xl_list",
    "rename": "xl_domain",
    "trigger": "xl_domain",
    "sysrq": "xl_domain",
    "dmesg": "xl_list",
    "top": "top",
    "uptime": "xl_list",
    "claims": "xl_list",
}
"""The module of each subcommand, imported when it is used; the order is that of the usage list."""


def load(name: str) -> XlCommand:
    """The subcommand of this name."""
    module = import_module(f"xenolith.cli.{MODULES[name]}")
    commands: tuple[XlCommand, ...] = module.COMMANDS
    return next(command for command in commands if command.xl_name == name)


_NAMES: Final = TextWrapper(78, initial_indent=" ", subsequent_indent=" ", break_on_hyphens=False)


def usage() -> str:
    """The list that a bare `xl` prints."""
    lines = ["Usage xl [-vfNtT] <subcommand> [args]\n", "xl full list of subcommands:\n"]
    lines += [f" {name:<19} {load(name).summary}" for name in MODULES]
    lines.append("\nNot implemented yet, of Xen's other subcommands:\n")
    return "\n".join(lines) + "\n" + _NAMES.fill(" ".join(sorted(NOT_YET))) + "\n"


class NotYet(XlCommand):
    """A subcommand of Xen's that is missing here; it takes any arguments, to say so."""

    def __init__(self, name: str) -> None:
        super().__init__(name, self._refuse, "Not implemented yet", "", completes="nothing")

    def run(self, session: Session, arguments: Sequence[str]) -> int:
        return self._refuse(session, {}, arguments)

    def _refuse(self, session: Session, options: object, operands: Sequence[str]) -> int:
        return complain(f"xl: {self.xl_name}: xenolith does not implement this subcommand of Xen yet.")


def _print_help(session: Session, options: object, operands: Sequence[str]) -> int:
    command = subcommand(operands[0]) if operands else None
    if command is not None:
        click.echo(command.usage(), nl=False)
    elif operands:
        click.echo(f'command "{operands[0]}" not implemented')
    else:
        click.echo(usage(), nl=False)
    return 0


HELP = XlCommand("help", _print_help, "Print this list, or how to use a subcommand", "[--long] [Subcommand]")


def subcommand(word: str) -> XlCommand | None:
    """The subcommand that a word stands for: its name, or an abbreviation of only one name."""
    if word == "help":
        return HELP
    names = [*MODULES, *NOT_YET]
    found = [word] if word in names else [name for name in names if name.startswith(word)]
    if len(found) != 1:
        return None
    return load(found[0]) if found[0] in MODULES else NotYet(found[0])


class XlGroup(click.Group):
    """`xl` itself: global options, then a subcommand."""

    def __init__(self, connect: Callable[[], Toolstack] = connect_to_daemon) -> None:
        super().__init__("xl", add_help_option=False, no_args_is_help=False)
        self.connect = connect

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            options, rest = getopt.getopt(args, "vfNtT", ["socket="])
        except getopt.GetoptError as error:
            complain(f"xl: invalid option -- '{error.opt}'\nunknown global option")
            ctx.exit(1)
        if not rest and not ctx.resilient_parsing:
            click.echo(usage(), nl=False)
            ctx.exit(1)
        if ctx.obj is None:
            ctx.obj = Session(connect_to_running_daemon if ctx.resilient_parsing else self.connect)
        ctx.obj.dry_run = any(option == "-N" for option, _ in options)
        for option, value in options:
            if option == "--socket":
                ctx.obj.connect = partial(connect_to_daemon, Path(value))
        # Where click's own group looks for the subcommand and its arguments.
        ctx._protected_args, ctx.args = rest[:1], rest[1:]
        return ctx.args

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*MODULES, "help"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return subcommand(cmd_name)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str, click.Command, list[str]]:
        command = subcommand(args[0])
        if command is None:
            complain("command not implemented")
            ctx.exit(1)
        return command.xl_name, command, args[1:]


xl = XlGroup()


def main(*arguments: Any) -> None:
    """The entry point of the command `xl`."""
    xl(list(arguments) or None, prog_name="xl")
