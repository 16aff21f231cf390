"""`xl create` and `xl config-update`: the commands that read a configuration file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import click

from xenolith.cli.progress import progress_bar
from xenolith.cli.xl_command import USAGE_ERROR, Failure, Option, Options, Session, command, complain, resolve
from xenolith.toolstack.client import DomainEvent, EventKind, ToolstackError, every, scheduler_parameters
from xenolith.toolstack.config.as_json import Json, domain_config_json, render
from xenolith.toolstack.config.cpus import HostTopology
from xenolith.toolstack.config.domain import DomainConfig, absolute_paths
from xenolith.toolstack.config.grammar import ConfigError
from xenolith.toolstack.config.reader import parse_domain_config

STATUS_FAIL, STATUS_INVALID = 3, 6  # xl exits with the negated libxl error


class _TooManyFiles(Exception):
    pass


def _sources(options: Options, operands: Sequence[str]) -> tuple[str | None, list[str]]:
    """The configuration file, and the key=value operands that are added to it as lines."""
    files = [word for word in operands if "=" not in word]
    if "f" in options:
        files.insert(0, options["f"])
    if len(files) > 1:
        raise _TooManyFiles
    return (files[0] if files else None), [word for word in operands if "=" in word]


def _read_file(path: str, status: int) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise Failure(f"Failed to read config file: {path}: {error.strerror}", status) from error


def _read_config(path: str, text: str, extra: Sequence[str]) -> DomainConfig:
    """The configuration of a file's text and the lines added to it; warnings are printed."""
    if extra:
        text += "\n" + "".join(line + "\n" for line in extra) + "\n"
    try:
        config, warnings = parse_domain_config(text, path, HostTopology.of_this_machine())
    except ConfigError as error:
        raise Failure("\n".join(error.diagnostics), error.status) from error
    for warning in warnings:
        complain(warning)
    return config


def read_config_file(path: str) -> DomainConfig:
    """The configuration in a file, which is named on stderr as xl does."""
    complain(f"Parsing config from {path}")
    return _read_config(path, _read_file(path, STATUS_FAIL), ())


_CONFIG_FILE: Final = Option("f", "Use this configuration file.", long="defconfig", value="FILE")
_QUIET: Final = Option("q", "Do not name the file that is read.", long="quiet")


@command(
    "<ConfigFile> [options] [vars]",
    "Create a domain from a configuration file",
    Option("c", "Attach to the console when the domain has been created."),
    Option("d", "Print the configuration that was read to stderr."),
    Option("e", "Do not look after the domain when it ends."),
    Option("F", "Stay in the foreground until the domain has ended."),
    _CONFIG_FILE,
    Option("n", "Print the resulting configuration and do nothing else.", long="dryrun"),
    Option("p", "Leave the domain paused."),
    _QUIET,
    can_dry_run=True,
)
def create(session: Session, options: Options, operands: Sequence[str]) -> int:
    try:
        path, extra = _sources(options, operands)
    except _TooManyFiles:
        click.echo(create.usage(), nl=False)
        return USAGE_ERROR
    if path is None:
        raise Failure("Config file not specified and none in save file", STATUS_INVALID)
    text = _read_file(path, STATUS_FAIL)
    if "q" not in options:
        complain(f"Parsing config from {path}")
    config = _read_config(path, text, extra)
    dry_run = "n" in options or session.dry_run
    if dry_run or "d" in options:
        click.echo(render(domain_config_json(config)), nl=False, err=not dry_run)
    if dry_run:
        return 0
    session.makes_domains = True
    for sentence in config.without_effect(scheduler_parameters(session.client, config)):
        complain(f"WARNING: {path}: {sentence}")
    try:
        with progress_bar() as progress:
            domid = session.client.create(absolute_paths(config, Path.cwd()), progress)
    except ToolstackError as error:
        raise Failure(str(error), STATUS_FAIL) from error
    return start(session, options, domid, config.name)


def start(session: Session, options: Options, domid: int, name: str) -> int:
    """Let somebody look after the new domain, let it run, and stay with it if that was asked for.

    Whatever interrupts that before the domain runs takes it away again.
    """
    client, supervision = session.toolstack.client, session.toolstack.supervision
    try:
        if "e" not in options:
            supervision.supervise(domid)
        events = supervision.watch(domid) if "F" in options and "e" not in options else None
        console = client.open_console(domid) if "c" in options else None
        if "p" not in options:
            client.unpause(domid)
    except BaseException:
        with suppress(ToolstackError):
            client.destroy(domid)
        raise
    if console is not None:
        from xenolith.cli.terminal import attach

        attach(console, b"\x1d")
    if events is not None:
        _announce(name, domid)
        for event in every(events):
            _report(name, event)
    return 0


def _announce(name: str, domid: int) -> None:
    complain(f"Waiting for domain {name} (domid {domid}) to die [pid {os.getpid()}]")


def _report(name: str, event: DomainEvent) -> None:
    if event.kind is EventKind.MESSAGE:
        complain(event.text)
    elif event.kind is EventKind.REBUILT and event.successor is not None:
        _announce(name, event.successor)
    elif event.kind is EventKind.DESTROYED:
        complain(f"Domain {event.domid} has been destroyed.")


@command(
    "<Domain> <ConfigFile> [options] [vars]",
    "Change the configuration from which a domain is built again when it reboots",
    _CONFIG_FILE,
    Option("d", "Print the configuration that was read."),
    _QUIET,
    can_dry_run=True,
)
def config_update(session: Session, options: Options, operands: Sequence[str]) -> int:
    if not operands:
        complain("xl config-update requires a domain argument")
        click.echo(config_update.usage(), nl=False)
        return 1
    complain(
        "WARNING: xl now has better capability to manage domain configuration, avoid using this command when possible"
    )
    domid = resolve(session, operands[0])
    try:
        path, extra = _sources(options, operands[1:])
    except _TooManyFiles:
        click.echo(create.usage(), nl=False)
        return USAGE_ERROR
    if path is None:
        raise Failure("Config file not specified")
    config = _read_config(path, _read_file(path, status=253), extra)
    if "d" in options or session.dry_run:
        document: Json = {"domid": None, "config": domain_config_json(config)}
        click.echo(render(document), nl=False)
    if not session.dry_run:
        complain(f"setting dom{domid} configuration")
        session.client.set_config(domid, absolute_paths(config, Path.cwd()))
    return 0
