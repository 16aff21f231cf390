"""`xenolith daemon`: the machine that the `xl` command talks to.

Started on demand by the first command, by hand, or by a service manager; docs/xl.md has an example for systemd.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from xenolith.toolstack.daemon.run_directory import Leftovers, RunDirectory, default_socket
from xenolith.toolstack.host import DEFAULT_SCHEDULER, ENGINES, SCHEDULERS, power_on

if TYPE_CHECKING:
    from xenolith.dom0.services import Dom0

DEFAULT_MEMORY_MIB = 4096  # of address space; host memory is used as guests touch theirs


class _Ready:
    """Tells whoever started the daemon what they should know, and in the end that it listens."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def say(self, text: str) -> None:
        if self._descriptor is not None:
            os.write(self._descriptor, text.encode() + b"\n")

    def finish(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@click.command()
@click.option(
    "--socket",
    "socket_path",
    type=click.Path(path_type=Path),
    help="Where to listen. Default: XENOLITH_SOCKET, or control.sock in the user's runtime directory.",
)
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default="auto",
    envvar="XENOLITH_ENGINE",
    show_default=True,
    help="What runs the guests. Environment: XENOLITH_ENGINE.",
)
@click.option(
    "--memory",
    "memory_mib",
    type=click.IntRange(min=1),
    default=DEFAULT_MEMORY_MIB,
    envvar="XENOLITH_MEMORY",
    show_default=True,
    metavar="MiB",
    help="Machine memory. Environment: XENOLITH_MEMORY.",
)
@click.option(
    "--pcpus",
    type=click.IntRange(min=1),
    default=os.cpu_count() or 1,
    envvar="XENOLITH_PCPUS",
    show_default="the host's",
    metavar="N",
    help="Number of pCPUs. Environment: XENOLITH_PCPUS.",
)
@click.option(
    "--scheduler",
    type=click.Choice(SCHEDULERS),
    default=DEFAULT_SCHEDULER,
    envvar="XENOLITH_SCHEDULER",
    show_default=True,
    help="The scheduling algorithm. Environment: XENOLITH_SCHEDULER.",
)
@click.option(
    "--host-cpus",
    envvar="XENOLITH_HOST_CPUS",
    metavar="CPUS",
    help="Pin the pCPUs to these CPUs of the host, one each, such as 0-3. Environment: XENOLITH_HOST_CPUS.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"], case_sensitive=False),
    default="info",
    show_default=True,
    help="What is logged.",
)
@click.option("--ready-fd", type=int, hidden=True, help="A descriptor to write to when the daemon listens.")
def daemon(
    socket_path: Path | None,
    engine: str,
    memory_mib: int,
    pcpus: int,
    scheduler: str,
    host_cpus: str | None,
    log_level: str,
    ready_fd: int | None,
) -> None:
    """Run a machine for the xl command, in the foreground.

    Log lines are JSON objects on stderr. SIGTERM shuts the guests down and ends the daemon.
    """
    from xenolith.toolstack.daemon.server import JsonFormatter, note

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end_early)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=log_level.upper(), handlers=[handler], force=True)
    ready = _Ready(ready_fd)
    directory = RunDirectory((socket_path or default_socket()).absolute())
    try:
        leftovers = directory.acquire()
        _tell_losses(leftovers, ready)
        _serve(directory, partial(_switched_on, memory_mib, engine, pcpus, scheduler, _numbers(host_cpus)), ready)
    except Exception as error:
        text = error.message if isinstance(error, click.ClickException) else str(error)
        note("the daemon cannot start", logging.ERROR, error=text)
        ready.say(text.replace("\n", " "))
        raise click.ClickException(text) from error
    finally:
        directory.release()
        ready.finish()


def _end_early(number: int, frame: object) -> None:
    """A signal that comes before there is a machine."""
    raise SystemExit(128 + number)


def _tell_losses(leftovers: Leftovers | None, ready: _Ready) -> None:
    from xenolith.toolstack.daemon.server import note

    if leftovers is not None:
        note("cleaned up after a daemon that was killed", logging.WARNING, lost=leftovers.describe())
        ready.say(leftovers.describe())


def _numbers(text: str | None) -> list[int]:
    """The CPUs of the host that are named."""
    from xenolith.toolstack.config.cpus import CpuSetError, HostTopology, parse_cpu_set

    try:
        return sorted(parse_cpu_set(text or "", HostTopology.of_this_machine()))
    except CpuSetError as error:
        raise click.ClickException(f"--host-cpus: {error}") from error


def _switched_on(memory_mib: int, engine: str, pcpus: int, scheduler: str, host_cpus: list[int]) -> Dom0:
    try:
        return power_on(memory_mib, engine, pcpus, scheduler, host_cpus)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    except (OSError, MemoryError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or "no memory left"
        raise click.ClickException(
            f"the host does not give what a machine of {memory_mib} MiB needs: {why} (see --memory, `ulimit -a`)"
        ) from error


def _serve(directory: RunDirectory, switch_on: Callable[[], Dom0], ready: _Ready) -> None:
    """Switch a machine on and serve it until a signal comes."""
    from xenolith.toolstack.daemon.server import Daemon, note, shut_guests_down
    from xenolith.toolstack.embedded import EmbeddedToolstack
    from xenolith.toolstack.supervisor import Supervisor

    with ExitStack() as cleanup:
        client = EmbeddedToolstack(switch_on(), xenstore_socket=directory.xenstore_socket_path)
        cleanup.callback(client.close)
        supervisor = Supervisor(client, directory.dump_path)
        client.on_arrival = supervisor.supervise
        server = Daemon(directory, client, supervisor)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, server.stop)
        signal.set_wakeup_fd(server.wake)  # else a signal that comes just before `serve` waits is seen after it
        ready.say("ready")
        ready.finish()
        server.serve()
        signal.set_wakeup_fd(-1)
        note("stopping")
        supervisor.close()  # from here on nothing is built again
        shut_guests_down(client)
        server.close()
        note("stopped")


if __name__ == "__main__":
    daemon()
