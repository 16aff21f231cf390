"""A toolstack in this process, on a machine that runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from xenolith.abi.hypercalls import SHUTDOWN_crash
from xenolith.toolstack.config.domain import DomainConfig
from xenolith.toolstack.embedded import EmbeddedToolstack

if TYPE_CHECKING:
    from machines import Machine

GUESTS = Path(__file__).parents[2] / "guests" / "prebuilt"


@pytest.fixture
def crashed(machine: Callable[[int], Machine]) -> tuple[EmbeddedToolstack, int]:
    """A toolstack with a domain that jumped to an address where nothing is."""
    toolstack = EmbeddedToolstack(machine(32).dom0)
    kernel = str(GUESTS / "crash.elf")
    domid = toolstack.create(DomainConfig("crashed", kernel=kernel, target_memory_kib=32 << 10, cmdline="no-handler"))
    events = toolstack.subscribe()
    toolstack.unpause(domid)
    event = events.get(60)
    assert event is not None and event.reason == SHUTDOWN_crash
    return toolstack, domid
