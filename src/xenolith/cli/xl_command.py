"""The frame of an `xl` subcommand: options as getopt reads them, usage as xl prints it, exit statuses as scripts know.

xl's commands are older than click's conventions: options and operands mix, long options may be abbreviated, an unknown
option is `option `z' not supported.` with status 2, help goes to stdout. `XlCommand` keeps that and is still a click
command, so that it can stand in any click group and is completed by the shell.
"""

from __future__ import annotations

import getopt
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import click
from click.shell_completion import CompletionItem

from xenolith.cli import PIPE_CLOSED
from xenolith.toolstack.client import Client, Supervision, ToolstackError

USAGE_ERROR = 2


@dataclass(frozen=True, slots=True)
class Toolstack:
    """A connection to a machine: what can be asked of it, and who follows its domains."""

    client: Client
    supervision: Supervision
    surprise: str = ""  # what somebody who expects domains there should know


def connect_to_daemon(socket: Path | None = None) -> Toolstack:
    """The toolstack of the daemon at `socket`, by default this user's; it is started if it does not run."""
    from xenolith.toolstack.daemon.remote import RemoteClient
    from xenolith.toolstack.daemon.run_directory import SOCKET_VARIABLE

    client = RemoteClient.connect(socket, say=lambda text: complain(f"xenolith: {text}"))
    surprise = ""
    if client.is_new and (socket or os.environ.get(SOCKET_VARIABLE)):
        surprise = f"xenolith: there was no machine at {client.socket_path}; a new one was started, without domains."
    return Toolstack(client, client, surprise)


def connect_to_running_daemon() -> Toolstack:
    """The toolstack of this user's daemon, if it runs; completing a word must not start one."""
    from xenolith.toolstack.daemon.remote import RemoteClient
    from xenolith.toolstack.daemon.run_directory import default_socket

    client = RemoteClient.at(default_socket())
    return Toolstack(client, client)


@dataclass(slots=True)
class Session:
    """What all subcommands of one invocation share."""

    connect: Callable[[], Toolstack]
    dry_run: bool = False
    makes_domains: bool = False  # the command does, so that an empty machine is no surprise
    _toolstack: Toolstack | None = field(default=None, repr=False)

    @property
    def toolstack(self) -> Toolstack:
        """The machine; connecting to it (and starting it, if need be) happens when it is first needed."""
        if self._toolstack is None:
            self._toolstack = self.connect()
            if self._toolstack.surprise and not self.makes_domains:
                complain(self._toolstack.surprise)
        return self._toolstack

    @property
    def client(self) -> Client:
        return self.toolstack.client


Options: TypeAlias = Mapping[str, str]
"""The options given, by short letter; the value of one without argument is ''."""

Action: TypeAlias = Callable[[Session, Options, Sequence[str]], int]


class Failure(Exception):
    """A command that ends here with a message and a status."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a subcommand: its letter, perhaps a long name, the name of its value if it takes one."""

    letter: str
    text: str
    long: str = ""
    value: str = ""

    @property
    def flags(self) -> str:
        """How it is given."""
        flags = f"-{self.letter}" + (f" {self.value}" if self.value else "")
        return flags + (f", --{self.long}" + (f"={self.value}" if self.value else "")) * bool(self.long)

    def describe(self) -> str:
        """One line of the usage."""
        flags = self.flags
        return f"{flags:<24}{self.text}\n" if len(flags) < 24 else f"{flags}\n{'':24}{self.text}\n"


class XlCommand(click.Command):
    """One subcommand. `action` gets the session, the options and the operands, and returns the exit status."""

    def __init__(
        self,
        name: str,
        action: Action,
        summary: str,
        synopsis: str,
        options: Sequence[Option] = (),
        *,
        operands: int = 0,
        modifies: bool = True,
        can_dry_run: bool = False,
    ) -> None:
        """`operands` are the least required; what the words of the synopsis name is completed."""
        super().__init__(name, add_help_option=False, short_help=summary, help=summary)
        self.xl_name = name
        self.action = action
        self.summary = summary
        self.synopsis = synopsis
        self.options = options
        self.operands = operands
        self.modifies = modifies
        self.can_dry_run = can_dry_run

    def usage(self) -> str:
        flags = "vtT" + "f" * self.modifies + "N" * self.can_dry_run
        text = f"Usage: xl [-{flags}] {self.xl_name} {self.synopsis}\n\n{self.summary}.\n\n"
        described = "".join(option.describe() for option in self.options)
        return text + (f"Options:\n\n{described}\n" if described else "")

    def get_help(self, ctx: click.Context) -> str:
        return self.usage()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return ctx.args

    def invoke(self, ctx: click.Context) -> None:
        ctx.exit(self.run(ctx.find_object(Session) or Session(connect_to_daemon), ctx.args))

    def run(self, session: Session, arguments: Sequence[str]) -> int:
        """Run the command; everything that can go wrong becomes a message and a status."""
        if session.dry_run and not self.can_dry_run:
            return complain("command does not implement -N (dryrun) option")
        try:
            options, operands = self._parse(arguments)
            if "h" in options:
                click.echo(self.usage(), nl=False)
                return 0
            if len(operands) < self.operands:
                plural = "s" if self.operands > 1 else ""
                complain(f"'xl {self.xl_name}' requires at least {self.operands} argument{plural}.\n")
                click.echo(self.usage(), nl=False)
                return USAGE_ERROR
            return self.action(session, options, operands)
        except Failure as failure:
            return complain(str(failure), failure.status)
        except ToolstackError as error:
            return complain(str(error))
        except BrokenPipeError:
            return PIPE_CLOSED  # whoever read the output has enough

    def _parse(self, arguments: Sequence[str]) -> tuple[Options, list[str]]:
        short = "".join(option.letter + ":" * bool(option.value) for option in self.options)
        long = {option.long: option for option in self.options if option.long}
        names = [name + "=" * bool(option.value) for name, option in long.items()]
        try:
            found, operands = getopt.gnu_getopt(list(arguments), short + "h", [*names, "help"])
        except getopt.GetoptError as error:
            name = error.opt if len(error.opt) == 1 else f"--{error.opt}"
            raise Failure(f"option `{name}' not supported.", USAGE_ERROR) from None
        letters = {name: option.letter for name, option in long.items()} | {"help": "h"}
        return {letters.get(option.lstrip("-"), option.lstrip("-")): value for option, value in found}, operands

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        if incomplete.startswith("-"):
            names = {f"-{option.letter}" for option in self.options} | {"-h"}
            names |= {f"--{option.long}" for option in self.options if option.long}
            return [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]
        wanted = self._operand(len([word for word in ctx.args if not word.startswith("-")]))
        if re.search("file", wanted, re.IGNORECASE):
            return [CompletionItem(incomplete, type="file")]
        if re.search(r"\bDomain(Name)?\b", wanted) and isinstance(ctx.obj, Session):
            try:
                domains = {domain.name for domain in ctx.obj.client.domains()}
            except (ToolstackError, OSError):
                return []
            return [CompletionItem(name) for name in sorted(domains) if name.startswith(incomplete)]
        return []

    def _operand(self, index: int) -> str:
        """What the synopsis calls the operand of this index; the one before "..." may come again and again."""
        words = [word for word in self.synopsis.replace(", ...", "...").split() if word != "[options]"]
        if index < len(words):
            return words[index]
        return words[-1] if words and "..." in words[-1] else ""


def command(
    synopsis: str,
    summary: str,
    *options: Option,
    operands: int = 0,
    modifies: bool = True,
    can_dry_run: bool = False,
) -> Callable[[Action], XlCommand]:
    """A decorator that makes a function a subcommand of `xl`; `block_attach` is `xl block-attach`."""

    def make(action: Action) -> XlCommand:
        name = getattr(action, "__name__").strip("_").replace("_", "-")  # noqa: B009
        return XlCommand(
            name,
            action,
            summary,
            synopsis,
            options,
            operands=operands,
            modifies=modifies,
            can_dry_run=can_dry_run,
        )

    return make


def complain(message: str, status: int = 1) -> int:
    """Print to stderr; the status to return."""
    click.echo(printable(message), err=True)
    return status


def printable(text: str, keeping: str = "\n\t") -> str:
    """The text with what could command a terminal, or is no character at all, written as Python writes it.

    Names, and what guests say in the log, may have any bytes in them.
    """
    return "".join(
        character if character.isprintable() or character in keeping else ascii(character)[1:-1] for character in text
    )


def shown(name: str) -> str:
    """A name, on one line."""
    return printable(name, keeping="")


def resolve(session: Session, word: str) -> int:
    """The domid that a word on the command line means: a number is one, anything else is a name."""
    if word.isascii() and word.isdigit():
        return int(word)
    for domain in session.client.domains():
        if domain.name == word:
            return domain.domid
    raise Failure(f"{word} is an invalid domain identifier (rc=-6)")
