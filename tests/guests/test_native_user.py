"""Every tiny guest with its user mode in stub processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from machines import unicorn_with_stubs

from .catalogue import CATALOGUE, Guest

if TYPE_CHECKING:
    from machines import Ending


@pytest.fixture
def engine_name(monkeypatch: pytest.MonkeyPatch) -> str:
    return unicorn_with_stubs(monkeypatch)


@pytest.mark.parametrize("guest", [pytest.param(guest, id=guest.name) for guest in CATALOGUE])
def test_guest_with_programs_in_stubs(guest: Guest, boot_guest: Callable[..., Ending]) -> None:
    ending = boot_guest(guest.path, guest.cmdline, guest.vcpus, guest.memory_mib)
    assert not guest.complaints(ending.console, ending.shutdown_reason)
