"""Domains in files: `xl save` and `xl restore`.

A file is complete or as it was before (`whole_file`). What the toolstack needs besides to make the domain again, its
configuration, goes into the description at the beginning.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final

from xenolith.dom0.migration import stream
from xenolith.dom0.migration.restore import Received, Receiver
from xenolith.dom0.migration.save import save
from xenolith.dom0.migration.series import OpenBase
from xenolith.dom0.services import Dom0, GuestDomain
from xenolith.hypervisor.control import DomainCreateError, RecordError
from xenolith.toolstack.client import OnProgress, Progress, ToolstackError
from xenolith.toolstack.config.domain import DomainConfig
from xenolith.toolstack.daemon.codec import CodecError, decode, encode
from xenolith.toolstack.whole_file import whole_file

MOST_TOKEN: Final = 64  # characters of it that tell one relocation from another


def save_domain(
    dom0: Dom0, domain: GuestDomain, config: DomainConfig, path: Path, compress: bool, progress: OnProgress
) -> None:
    """Write a domain to a file; it is paused once more afterwards. Raises ToolstackError, then without the pause."""
    on_pages = _reporter("saving the domain", progress)
    try:
        with whole_file(path) as file:
            save(dom0, domain, stream.Writer(file, compress), {"config": encode(config)}, on_pages)
    except RecordError as error:
        raise ToolstackError(f"Domain {domain.domid} cannot be saved: {error}.") from error
    except OSError as error:
        raise ToolstackError(f"cannot write {path}: {error.strerror}") from error


def _reporter(stage: str, progress: OnProgress) -> Callable[[int, int], None]:
    return lambda done, total: progress(Progress(stage, done, total))


class Arriving:
    """A domain that comes in a stream. Methods raise ToolstackError."""

    def __init__(self, dom0: Dom0, source: BinaryIO, open_base: OpenBase | None = None) -> None:
        """`open_base`: where it may be a checkpoint that goes on from others."""
        try:
            self._receiver = Receiver(dom0.control, source, open_base)
            self.series = self._receiver.series
            toolstack = self._receiver.toolstack
            said = toolstack if isinstance(toolstack, dict) else {}
            self.config: DomainConfig = decode(DomainConfig, said.get("config"))
            self.token: str = decode(str, said.get("token", ""))[:MOST_TOKEN]
        except (RecordError, CodecError) as error:
            raise ToolstackError(f"This is no domain that can be restored: {error}.") from error

    def wait_for_word(self) -> None:
        """Wait until the sender gives the domain away."""
        try:
            self._receiver.wait_for_word()
        except RecordError as error:
            raise ToolstackError(f"The sender has kept the domain: {error}.") from error

    def receive(self) -> Received:
        """Read the rest."""
        try:
            return self._receiver.receive()
        except (RecordError, DomainCreateError) as error:
            raise ToolstackError(f"This is no domain that can be restored: {error}.") from error


def open_saved(path: Path) -> BinaryIO:
    """A file that a domain was saved to. Raises ToolstackError."""
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise ToolstackError(f"cannot read {path}: {error.strerror}") from error
