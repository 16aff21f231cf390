"""`xenolith guest`: obtain a guest to boot, and say where it is."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from xenolith.debian.initramfs import InitramfsError, build_initramfs
from xenolith.debian.packages import DEFAULT_KERNEL, DebianGuest, GuestUnavailable, obtain, refresh, write_whole


@click.group()
def guest() -> None:
    """Obtain a guest operating system to boot."""


@guest.command()
@click.option(
    "--kernel-version",
    "kernel",
    metavar="KERNEL",
    default=DEFAULT_KERNEL,
    show_default=True,
    help="6.1, 6.12, 6.1-cloud; a suite's newest: trixie, sid, sid-cloud, bookworm-backports; or a package's name.",
)
@click.option("--update", "update", is_flag=True, help="Fetch package lists first and take the newest kernel.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def debian(kernel: str, update: bool, as_json: bool) -> None:
    """Obtain Debian's stock kernel and a static busybox, without root.

    apt downloads them and checks their signatures; they are kept in the XDG cache directory, with an initramfs
    that starts a shell on the console.
    """
    try:
        found = refresh(kernel) if update else obtain(kernel)
        initramfs = _shell_initramfs(found)
    except (GuestUnavailable, InitramfsError) as error:
        raise click.ClickException(str(error)) from error
    paths = {name: str(value) for name, value in asdict(found).items() if value} | {"initramfs": str(initramfs)}
    if as_json:
        click.echo(json.dumps(paths))
        return
    for name, value in paths.items():
        click.echo(f"{name:<10} {value}")


def _shell_initramfs(found: DebianGuest) -> Path:
    """The guest's initramfs with a shell, beside its busybox; written anew, since building it takes milliseconds."""
    path = found.busybox.with_name("shell.cpio")
    write_whole(path, build_initramfs(found.busybox))
    return path
