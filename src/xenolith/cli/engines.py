"""`xenolith engines`: which engines work on this host, and which one `auto` takes, with the reasons."""

from __future__ import annotations

import logging

import click

from xenolith.hypervisor import ring0
from xenolith.machine.engines.protocol import EngineError
from xenolith.machine.engines.select import ENGINES, choose
from xenolith.machine.memory import MachineMemory

_FRAMES = 1024  # of a machine to try an engine on


@click.command()
def engines() -> None:
    """Say which engines work on this host, and which one is taken by default."""
    logging.getLogger("xenolith").setLevel(logging.ERROR)  # the reasons are printed here
    for name in ENGINES:
        if name != "auto":
            click.echo(f"{name:9}: {_found(name)}")
    click.echo(f"{'native':9}: {_native()}")
    choice = choose()
    click.echo(f"{'auto':9}: {choice.name}: {choice.reason}")


def _native() -> str:
    """Whether the commonest traps are handled in native code, or what that lacks."""
    reason = ring0.missing()
    return f"traps are Python's: {reason.splitlines()[0]}" if reason else "the commonest traps are handled in C"


def _found(name: str) -> str:
    """Whether an engine works here, and what kind it is or what it lacks."""
    memory = MachineMemory(_FRAMES)
    try:
        choice = choose(name)
        choice.factory(memory).close()
    except EngineError as error:
        return f"refused: {error}"
    finally:
        memory.close()
    return f"works: {choice.title}{choice.kind and ': '}{choice.kind}"
