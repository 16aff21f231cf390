"""Domains in files: `xl save` and `xl restore`.

A file is complete or as it was before (`whole_file`). What the toolstack needs besides to make the domain again, its
configuration, goes into the description at the beginning.
"""

from __future__ import annotations

import re
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
from xenolith.toolstack.daemon.codec import CodecError, Json, decode, encode
from xenolith.toolstack.whole_file import whole_file

MOST_TOKEN: Final = 64  # characters of it that tell one relocation from another
_CONTROL: Final = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udc7f\udd00-\udfff]")  # and what cannot be encoded


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


def configuration(toolstack: Json) -> DomainConfig:
    """Of a domain that comes from elsewhere, by what its toolstack says. Raises CodecError."""
    said = toolstack.get("config") if isinstance(toolstack, dict) else None
    _check_texts(said)
    return decode(DomainConfig, said)


def _check_texts(value: Json) -> None:
    """They are printed on terminals here."""
    if isinstance(value, str) and _CONTROL.search(value):
        raise CodecError(f"its configuration says {value[:60]!r}")
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_texts(each)


class Arriving:
    """A domain that comes in a stream. Methods raise ToolstackError."""

    def __init__(self, dom0: Dom0, source: BinaryIO, open_base: OpenBase | None = None) -> None:
        """`open_base`: where it may be a checkpoint that goes on from others."""
        try:
            self._receiver = Receiver(dom0.control, source, open_base)
            self.series = self._receiver.series
            toolstack = self._receiver.toolstack
            self.config = configuration(toolstack)
            said = toolstack if isinstance(toolstack, dict) else {}
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
