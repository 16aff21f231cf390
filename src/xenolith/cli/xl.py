"""The `xl` command: Xen's toolstack on the command line.

`xl [-vfNtT] <subcommand> [args]`. The subcommands are the functions with `@command` of the modules `xl_create`,
`xl_list`, `xl_domain`, `xl_resources`, `xl_cpupool`, `xl_block`, `xl_network`, `xl_relocate` and `top`; what is missing
of Xen's own says so by name. A subcommand may be abbreviated as long as it stays unambiguous.

`xl` is a click group of its own; another group may include its subcommands with `subcommand`, giving them a `Session`
as the context's object.
"""

from __future__ import annotations

import getopt
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from textwrap import TextWrapper
from typing import Final, NoReturn

import click

from xenolith.cli import (
    top,
    xl_block,
    xl_cpupool,
    xl_create,
    xl_domain,
    xl_list,
    xl_network,
    xl_relocate,
    xl_resources,
)
from xenolith.cli.process import run
from xenolith.cli.xl_command import (
    Session,
    Toolstack,
    XlCommand,
    complain,
    connect_to_daemon,
    connect_to_running_daemon,
)

OF_XEN: Final = """
    create config-update list destroy shutdown reboot pci-attach pci-detach pci-list pci-assignable-add
    pci-assignable-remove pci-assignable-list pause unpause console vncviewer save migrate restore migrate-receive
    suspend resume dump-core cd-insert cd-eject mem-max mem-set button-press vcpu-list vcpu-pin vcpu-set vm-list info
    sharing sched-credit sched-credit2 sched-rtds domid domname rename trigger sysrq debug-keys set-parameters dmesg
    top network-attach network-list network-detach channel-list block-attach block-list block-detach vtpm-attach
    vtpm-list vtpm-detach vkb-attach vkb-list vkb-detach vdispl-attach vdispl-list vdispl-detach vsnd-attach vsnd-list
    vsnd-detach uptime claims cpupool-create cpupool-list cpupool-destroy cpupool-rename cpupool-cpu-add
    cpupool-cpu-remove cpupool-migrate cpupool-numa-split getenforce setenforce loadpolicy remus devd psr-hwinfo
    psr-cmt-attach psr-cmt-detach psr-cmt-show psr-cat-set psr-cat-show psr-mba-set psr-mba-show usbctrl-attach
    usbctrl-detach usbdev-attach usbdev-detach usb-list qemu-monitor-command
    """.split()  # noqa: SIM905
"""The subcommands that Xen's has, in the order of its usage list."""

_MODULES: Final = (xl_create, xl_list, xl_domain, xl_resources, xl_cpupool, xl_block, xl_network, xl_relocate, top)


def _subcommands() -> dict[str, XlCommand]:
    """Whatever `@command` made a subcommand in one of the modules: first Xen's, in its order, then our own."""
    made = [value for module in _MODULES for value in vars(module).values() if isinstance(value, XlCommand)]
    found = {command.xl_name: command for command in made}
    ours = [name for name in found if name not in OF_XEN]
    return {name: found[name] for name in [*OF_XEN, *ours] if name in found}


SUBCOMMANDS: Final = _subcommands()

NOT_YET: Final = frozenset(OF_XEN) - SUBCOMMANDS.keys()


# Debian's bash completion takes the first word of every line with one space before it for a subcommand.
_NAMES: Final = TextWrapper(78, initial_indent="   ", subsequent_indent="   ", break_on_hyphens=False)


def usage() -> str:
    """The list that a bare `xl` prints."""
    lines = ["Usage xl [-vfNtT] <subcommand> [args]\n", "xl full list of subcommands:\n"]
    lines += [f" {name:<19} {command.summary}" for name, command in SUBCOMMANDS.items()]
    lines.append("\nNot implemented yet, of Xen's other subcommands:\n")
    return "\n".join(lines) + "\n" + _NAMES.fill(" ".join(sorted(NOT_YET))) + "\n"


class NotYet(XlCommand):
    """A subcommand of Xen's that is missing here; it takes any arguments, to say so."""

    def __init__(self, name: str) -> None:
        super().__init__(name, self._refuse, "Not implemented yet", "")

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
    names = [*SUBCOMMANDS, *NOT_YET]
    found = [word] if word in names else [name for name in names if name.startswith(word)]
    if len(found) != 1:
        return None
    return SUBCOMMANDS.get(found[0]) or NotYet(found[0])


class XlGroup(click.Group):
    """`xl` itself: global options, then a subcommand."""

    def __init__(self, connect: Callable[[], Toolstack] = connect_to_daemon) -> None:
        super().__init__("xl", add_help_option=False, no_args_is_help=False)
        self.connect = connect

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            options, rest = getopt.getopt(args, "vfNtTh", ["socket=", "help", "version"])
        except getopt.GetoptError as error:
            complain(f"xl: invalid option -- '{error.opt}'\nunknown global option")
            ctx.exit(1)
        if any(option in ("-h", "--help") for option, _ in options):
            click.echo(usage(), nl=False)
            ctx.exit(0)
        if any(option == "--version" for option, _ in options):
            click.echo(f"xl of xenolith {version('xenolith')}")
            ctx.exit(0)
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
        return [*SUBCOMMANDS, "help"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return subcommand(cmd_name)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str, click.Command, list[str]]:
        command = subcommand(args[0])
        if command is None:
            complain("command not implemented")
            ctx.exit(1)
        return command.xl_name, command, args[1:]


xl = XlGroup()


def main(*arguments: str) -> NoReturn:
    """The entry point of the command `xl`."""
    run("xl", lambda: xl, list(arguments) or None)
