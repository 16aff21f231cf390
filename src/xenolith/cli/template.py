"""`xenolith template`: guests that are booted once, of which clones stand ready for `xenolith run --template`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import click

from xenolith.cli.progress import progress_bar, tell_of_downloads
from xenolith.cli.xl_command import connect_to_daemon
from xenolith.toolstack import guests, run_network, run_root
from xenolith.toolstack.api import debian, load_config
from xenolith.toolstack.client import Execution, ToolstackError
from xenolith.toolstack.config.domain import absolute_paths
from xenolith.toolstack.errors import UsageError
from xenolith.toolstack.run_root import RootError
from xenolith.toolstack.run_template import equip

_DISK_HELP = "Give the guest a disk, as of `xenolith run`; FILE stays as it is. May be repeated."


@click.group()
def template() -> None:
    """Guests that are booted once, of which clones stand ready."""


@template.command()
@click.option("--memory", "memory_mib", type=click.IntRange(min=1), default=128, show_default=True, metavar="MiB")
@click.option("--vcpus", type=click.IntRange(min=1), default=1, show_default=True, metavar="N")
@click.option("--kernel", default=guests.DEFAULT_KERNEL, show_default=True, metavar="K", help="As of `xenolith run`.")
@click.option(
    "--cfg",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="A domain of this xl.cfg instead, with its memory and vCPUs; the guest must have our agent.",
)
@click.option("--root", default="", metavar="DIR|TAR|IMAGE", help=run_root.HELP)
@click.option("--disk", "disks", multiple=True, metavar="FILE[,ro]", help=_DISK_HELP)
@click.option("--net", is_flag=False, flag_value="", metavar="[RULES]", help=run_network.NET_HELP)
@click.option("--ready", type=click.IntRange(0, 1000), default=4, show_default=True, help="Clones to keep ready.")
@click.argument("name")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def create(
    memory_mib: int,
    vcpus: int,
    kernel: str,
    cfg: Path | None,
    root: str,
    disks: Sequence[str],
    net: str | None,
    ready: int,
    name: str,
    command: Sequence[str],
) -> None:
    """Boot a guest, run COMMAND (after --) in it to warm it up, and freeze it as the template NAME.

    What COMMAND leaves in the guest's memory and files, and what it leaves running, is there in each clone. Disks stay
    as they are: the template and each clone write to overlays of their own.
    """
    tell_of_downloads()
    try:
        if cfg is None:
            devices = bool(root or disks) or net is not None
            config = debian(name, kernel, memory_mib=memory_mib, vcpus=vcpus, devices=devices)
        else:
            config = load_config(cfg)
        equip(config, root, disks, net)
        warm_up = Execution(command=tuple(command)) if command else None
        with progress_bar() as progress:
            client = connect_to_daemon().client
            client.create_template(name, absolute_paths(config, Path.cwd()), warm_up, ready, progress)
    except (ToolstackError, RootError, UsageError) as error:
        raise click.ClickException(str(error)) from error


@template.command("list")
def list_() -> None:
    """List the templates of the daemon."""
    try:
        templates = connect_to_daemon().client.templates()
    except ToolstackError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{'NAME':<20} {'MEMORY':>8} {'VCPUS':>5} {'READY':>7} {'RUNS':>7}  MADE")
    for each in templates:
        made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.made))
        ready = f"{each.ready}/{each.wanted}"
        click.echo(f"{each.name:<20} {each.memory_kib >> 10:>4} MiB {each.vcpus:>5} {ready:>7} {each.runs:>7}  {made}")
        if each.problem:
            click.echo(f"  {each.problem}")


@template.command()
@click.argument("names", nargs=-1, required=True)
def rm(names: Sequence[str]) -> None:
    """Forget templates, and the clones that stand ready; those that run go on."""
    try:
        client = connect_to_daemon().client
        for name in names:
            client.remove_template(name)
    except ToolstackError as error:
        raise click.ClickException(str(error)) from error
