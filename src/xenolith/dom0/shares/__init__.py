"""Folders of the host that guests mount: a 9P server (diod) confined to it, and a relay that checks messages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class ShareError(Exception):
    """A folder cannot be shared; the text says why, to a person."""


@dataclass(frozen=True, kw_only=True)
class ShareSpec:
    """A folder for a domain. `tag` is what the guest mounts it by."""

    number: int
    tag: str
    path: Path
    writable: bool = True
