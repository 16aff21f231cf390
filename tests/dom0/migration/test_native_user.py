"""Domains whose programs run in stub processes are saved, relocated while they run, and cloned like all others."""

from __future__ import annotations

from pathlib import Path

import pytest

from xenolith.machine.engines.unicorn.user import host

from .test_checkpoint import test_a_guest_goes_on_from_any_checkpoint
from .test_clone import test_parent_and_clones_go_on_each_for_itself
from .test_live import relocate_again_and_again
from .test_save import test_a_guest_goes_on_where_it_was_saved

__all__ = [
    "test_a_guest_goes_on_from_any_checkpoint",
    "test_a_guest_goes_on_where_it_was_saved",
    "test_parent_and_clones_go_on_each_for_itself",
]

pytestmark = pytest.mark.slow


@pytest.fixture
def engine_name(monkeypatch: pytest.MonkeyPatch) -> str:
    """Unicorn, with all user mode in stubs."""
    if reason := host.missing():
        pytest.skip(f"no stub processes here: {reason}")
    monkeypatch.setenv(host.SETTING, host.FORCE)
    return "unicorn"


def test_a_guest_is_relocated_again_and_again(engine_name: str, tmp_path: Path) -> None:
    relocate_again_and_again(engine_name, tmp_path, vcpus=1)
