"""The programs `xl` and `xenolith`. What a command needs is loaded when it is known which."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, NoReturn

from xenolith.cli.process import run

if TYPE_CHECKING:
    import click


def xl() -> NoReturn:
    """The program `xl`."""

    def load() -> click.Command:
        from xenolith.cli.xl import xl

        return xl

    run("xl", load)


def xenolith() -> NoReturn:
    """The program `xenolith`. Called by the name `xl` (a link, as scripts make them), it is `xl` in all respects."""
    if os.path.basename(sys.argv[0]) == "xl":
        xl()

    def load() -> click.Command | int:
        if sys.argv[1:2] == ["run"] and "--template" in "\0".join(sys.argv):
            from xenolith.cli import warm

            if (wanted := warm.parsed(sys.argv[2:])) is not None:
                return warm.run(*wanted)
        from xenolith.cli.main import xenolith

        return xenolith

    run("xenolith", load)
