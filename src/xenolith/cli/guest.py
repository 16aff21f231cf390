"""`xenolith guest`: obtain a guest to boot, and say where it is."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from xenolith.cli.progress import tell_of_downloads
from xenolith.toolstack import guests


@click.group()
def guest() -> None:
    """Obtain a guest operating system to boot."""


@guest.command()
@click.option(
    "--kernel-version",
    "kernel",
    metavar="KERNEL",
    default=guests.DEFAULT_KERNEL,
    show_default=True,
    help="6.1, 6.12, 6.1-cloud; a suite's newest: trixie, sid, sid-cloud, bookworm-backports; or a package's name.",
)
@click.option("--update", "update", is_flag=True, help="Fetch package lists first and take the newest kernel.")
@click.option(
    "--devices",
    is_flag=True,
    help="Put the drivers of disks, networks and shared directories into the initramfs (a larger download).",
)
@click.option(
    "--cfg",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write a configuration for `xl create`, of a domain that is called as the file.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def debian(kernel: str, update: bool, devices: bool, cfg: Path | None, as_json: bool) -> None:
    """Obtain Debian's stock kernel and a static busybox, without root.

    apt downloads them and checks their signatures; they are kept in the XDG cache directory, with an initramfs
    that starts a shell on the console.
    """
    tell_of_downloads()
    if cfg is not None and cfg.exists():
        raise click.ClickException(f"{cfg} exists already; name another file")
    try:
        found = guests.debian(kernel, devices=devices, update=update)
        if cfg is not None:
            with cfg.open("x") as file:
                file.write(found.config(cfg.stem))
    except (guests.NoGuest, OSError) as error:
        raise click.ClickException(str(error)) from error
    values = {name: str(value) for name, value in asdict(found).items() if value}
    if as_json:
        click.echo(json.dumps(values))
        return
    for name, value in values.items():
        click.echo(f"{name:<10} {value}")
    if cfg is not None:
        click.echo(f"{cfg} is ready: xl create -c {cfg}")
