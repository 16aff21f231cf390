"""Every tiny guest with its user mode in stub processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from xenolith.machine.engines.unicorn.user import host

from .catalogue import CATALOGUE, Guest

if TYPE_CHECKING:
    from machines import Ending


@pytest.fixture
def engine_name(monkeypatch: pytest.MonkeyPatch) -> str:
    """Unicorn, with all user mode in stubs."""
    if reason := host.missing():
        pytest.skip(f"no stub processes here: {reason}")
    monkeypatch.setenv(host.SETTING, host.FORCE)
    return "unicorn"


@pytest.mark.parametrize("guest", [pytest.param(guest, id=guest.name) for guest in CATALOGUE])
def test_guest_with_programs_in_stubs(guest: Guest, boot_guest: Callable[..., Ending]) -> None:
    ending = boot_guest(guest.path, guest.cmdline, guest.vcpus, guest.memory_mib)
    assert not guest.complaints(ending.console, ending.shutdown_reason)
