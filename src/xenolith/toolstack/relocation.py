"""Relocation between two daemons, over a UNIX socket at which somebody waits who reaches the other: `xl migrate` does.

The sender's daemon connects to the socket and sends the domain; so does the receiver's, and receives it. Whoever
listens passes the bytes on, both ways, over whatever there is: ssh, socat, a pipe.
"""

from __future__ import annotations

import io
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from xenolith.dom0.migration import live
from xenolith.dom0.services import Dom0, GuestDomain
from xenolith.hypervisor.control import RecordError
from xenolith.toolstack.client import OnProgress, Progress, ToolstackError
from xenolith.toolstack.config.domain import DomainConfig
from xenolith.toolstack.daemon.codec import encode

PATIENCE_SECONDS: Final = 120.0  # for the other side to do anything at all
BUFFER: Final = 1 << 20


@contextmanager
def connected(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """What can be read from and written to the socket at `path`. Raises ToolstackError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.settimeout(PATIENCE_SECONDS)
            connection.connect(str(path))
        except OSError as error:
            raise ToolstackError(f"cannot connect to {path}: {error.strerror or error}") from error
        out = io.BufferedWriter(connection.makefile("wb", 0), BUFFER)
        try:
            with io.BufferedReader(connection.makefile("rb", 0), BUFFER) as source:
                yield source, out
        finally:
            out.detach().close()  # what could not be sent is not to be sent now


def send_domain(
    dom0: Dom0,
    domain: GuestDomain,
    config: DomainConfig,
    path: Path,
    on_ready: Callable[[], None],
    progress: OnProgress,
) -> live.Figures:
    """Send a domain. It is paused afterwards, to be ended; with a ToolstackError it goes on, or the text says not."""
    stage = Progress("relocating the domain", 0, 0)
    with connected(path) as (answers, out):
        try:
            return live.send(
                dom0,
                domain,
                out,
                answers,
                {"config": encode(config)},
                lambda text: progress(Progress(text, stage.done, stage.total)),
                on_ready,
            )
        except live.Refused as refusal:
            raise ToolstackError(f"The other side did not take the domain: {refusal or 'it went away'}.") from refusal
        except live.Undetermined as error:
            raise ToolstackError(
                f"The connection broke when the domain was given away ({error}). The other side may run it: it stays "
                f"paused here as domain {domain.domid}. Look there before you unpause or destroy it."
            ) from error
        except RecordError as error:
            raise ToolstackError(f"Domain {domain.domid} cannot be relocated: {error}.") from error
        except OSError as error:
            raise ToolstackError(f"The connection broke: {error.strerror or error}.") from error
