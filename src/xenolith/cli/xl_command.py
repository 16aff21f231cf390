"""The frame of an `xl` subcommand: options as getopt reads them, usage as xl prints it, exit statuses as scripts know.

xl's commands are older than click's conventions: options and operands mix, long options may be abbreviated, an unknown
option is `option `z' not supported.` with status 2, help goes to stdout. `XlCommand` keeps that and is still a click
command, so that it can stand in any click group and is completed by the shell.
"""

from __future__ import annotations

import getopt
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import click
from click.shell_completion import CompletionItem

from xenolith.toolstack.client import Client, Supervision, ToolstackError

USAGE_ERROR = 2


@dataclass(frozen=True, slots=True)
class Toolstack:
    """A connection to a machine: what can be asked of it, and who follows its domains."""

    client: Client
    supervision: Supervision


def connect_to_daemon(socket: Path | None = None) -> Toolstack:
    """The toolstack of the daemon at `socket`, by default this user's; it is started if it does not run."""
    from xenolith.toolstack.daemon.remote import RemoteClient

    client = RemoteClient.connect(socket)
    return Toolstack(client, client)


def connect_to_running_daemon() -> Toolstack:
    """The toolstack of this user's daemon, if it runs; completing a word must not start one."""
    from xenolith.toolstack.daemon.remote import RemoteClient
    from xenolith.toolstack.daemon.run_directory import default_socket

    client = RemoteClient(default_socket())
    return Toolstack(client, client)


@dataclass(slots=True)
class Session:
    """What all subcommands of one invocation share."""

    connect: Callable[[], Toolstack]
    dry_run: bool = False
    _toolstack: Toolstack | None = field(default=None, repr=False)

    @property
    def toolstack(self) -> Toolstack:
        """The machine; connecting to it (and starting it, if need be) happens when it is first needed."""
        if self._toolstack is None:
            self._toolstack = self.connect()
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


class XlCommand(click.Command):
    """One subcommand. `action` gets the session, the options and the operands, and returns the exit status."""

    def __init__(
        self,
        name: str,
        action: Action,
        summary: str,
        synopsis: str,
        *,
        options: str = "",
        short: str = "",
        long: Mapping[str, str] | None = None,
        operands: int = 0,
        modifies: bool = True,
        can_dry_run: bool = False,
        completes: str = "domains",
    ) -> None:
        """`short` is a getopt string, `long` maps long options to their letters, `operands` are the least required."""
        super().__init__(name, add_help_option=False, short_help=summary, help=summary)
        self.xl_name = name
        self.action = action
        self.summary = summary
        self.synopsis = synopsis
        self.options_text = options
        self.short = short
        self.long = dict(long or {})
        self.operands = operands
        self.modifies = modifies
        self.can_dry_run = can_dry_run
        self.completes = completes

    def usage(self) -> str:
        flags = "vtT" + "f" * self.modifies + "N" * self.can_dry_run
        text = f"Usage: xl [-{flags}] {self.xl_name} {self.synopsis}\n\n{self.summary}.\n\n"
        return text + (f"Options:\n\n{self.options_text}\n" if self.options_text else "")

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

    def _parse(self, arguments: Sequence[str]) -> tuple[Options, list[str]]:
        takes_value = {letter for letter, colon in zip(self.short, self.short[1:], strict=False) if colon == ":"}
        long = [name + "=" * (letter in takes_value) for name, letter in self.long.items()]
        try:
            found, operands = getopt.gnu_getopt(list(arguments), self.short + "h", [*long, "help"])
        except getopt.GetoptError as error:
            name = error.opt if len(error.opt) == 1 else f"--{error.opt}"
            raise Failure(f"option `{name}' not supported.", USAGE_ERROR) from None
        letters = self.long | {"help": "h"}
        return {letters.get(option.lstrip("-"), option.lstrip("-")): value for option, value in found}, operands

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        if incomplete.startswith("-"):
            letters = {f"-{letter}" for letter in self.short if letter != ":"}
            names = letters | {f"--{name}" for name in self.long} | {"-h"}
            return [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]
        if self.completes == "files":
            return [CompletionItem(incomplete, type="file")]
        if self.completes == "domains" and isinstance(ctx.obj, Session):
            try:
                names = {domain.name for domain in ctx.obj.client.domains()}
            except (ToolstackError, OSError):
                return []
            return [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]
        return []


def complain(message: str, status: int = 1) -> int:
    """Print to stderr; the status to return."""
    click.echo(message, err=True)
    return status


def resolve(session: Session, word: str) -> int:
    """The domid that a word on the command line means: a number is one, anything else is a name."""
    if word.isascii() and word.isdigit():
        return int(word)
    for domain in session.client.domains():
        if domain.name == word:
            return domain.domid
    raise Failure(f"{word} is an invalid domain identifier (rc=-6)")
