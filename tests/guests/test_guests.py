"""Every tiny guest, on every engine: each checks one mechanism from the inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from .catalogue import CATALOGUE, Guest

if TYPE_CHECKING:
    from machines import Ending

pytestmark = pytest.mark.usefixtures("handlers")


@pytest.mark.parametrize("guest", [pytest.param(guest, id=guest.name) for guest in CATALOGUE])
def test_guest(guest: Guest, boot_guest: Callable[..., Ending], engine_name: str) -> None:
    ending = boot_guest(guest.path, guest.cmdline, guest.vcpus, guest.memory_mib)
    sees_host_tables = engine_name != "unicorn"
    assert not guest.complaints(ending.console, ending.shutdown_reason, sees_host_tables)
