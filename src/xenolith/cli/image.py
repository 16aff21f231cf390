"""`xenolith image`: root file systems to boot, made, listed and removed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from xenolith.cli.progress import tell_of_downloads
from xenolith.toolstack import guests, images
from xenolith.toolstack.errors import ToolstackError


@click.group()
def image() -> None:
    """Make and keep root file systems for guests, for `xenolith run --root` and `xl create`."""


@image.command()
@click.argument("name")
@click.option("--release", metavar="R", default="", help="bookworm, trixie, ...  [default: this machine's]")
@click.option("--package", "packages", multiple=True, metavar="P", help="Install this, too; may be repeated.")
@click.option(
    "--size", metavar="SIZE", help="Of the disk, such as 20G; what is not used takes no room.  [default: 4G or more]"
)
@click.option(
    "--kernel",
    default=guests.DEFAULT_KERNEL,
    show_default=True,
    metavar="K",
    help="The kernel whose modules it has, as in `xenolith run`.",
)
@click.option("--mirror", default="", metavar="URL", help="Where from.  [default: Debian's own]")
@click.option(
    "--ssh-key",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="A public key that may log in as root by ssh (with --package openssh-server).",
)
@click.option(
    "--cfg",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write a configuration for `xl create`, of a domain that is called as the file and keeps what it writes.",
)
def debian(
    name: str,
    release: str,
    packages: Sequence[str],
    size: str | None,
    kernel: str,
    mirror: str,
    ssh_key: Path | None,
    cfg: Path | None,
) -> None:
    """Install a Debian with systemd into a new image, without root.

    mmdebstrap installs, mke2fs makes the file system (Debian: apt install mmdebstrap uidmap e2fsprogs). Root has no
    password on the console. The image is kept in the XDG cache directory.
    """
    tell_of_downloads("xenolith.toolstack.images")
    if cfg is not None and cfg.exists():
        raise click.ClickException(f"{cfg} exists already; name another file")
    try:
        made = images.make_debian(
            name, release=release, packages=packages, size=size, kernel=kernel, mirror=mirror, ssh_key=ssh_key
        )
        if cfg is not None:
            with cfg.open("x") as file:
                file.write(made.config(cfg.stem))
    except (ToolstackError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{made.path} is ready: xenolith run --root {name} --net")
    if cfg is not None:
        click.echo(f"{cfg} is ready: xl create -c {cfg}")


@image.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def list_images(as_json: bool) -> None:
    """List the images, and the root file systems that runs keep for the next time."""
    kept = images.images()
    if as_json:
        click.echo(json.dumps([asdict(each) | {"path": str(each.path)} for each in kept]))
        return
    click.echo(f"{'NAME':<20} {'SIZE':>8} {'USED':>8}  MADE OF")
    for each in kept:
        sizes = f"{each.size_bytes >> 20:>7}M {each.used_bytes >> 20:>7}M"
        click.echo(f"{each.name:<20} {sizes}  {each.origin}")


@image.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def remove(names: Sequence[str]) -> None:
    """Remove images."""
    for name in names:
        try:
            images.remove(name)
        except ToolstackError as error:
            raise click.ClickException(str(error)) from error
