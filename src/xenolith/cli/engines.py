"""`xenolith engines`: which engines work on this host, and which one `auto` takes, with the reasons."""

from __future__ import annotations

import click

from xenolith.toolstack.host import survey


@click.command()
def engines() -> None:
    """Say which engines work on this host, and which one is taken by default."""
    for name, text in survey():
        click.echo(f"{name:9}: {text}")
