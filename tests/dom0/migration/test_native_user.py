"""Domains whose programs run in stub processes are saved, relocated while they run, and cloned like all others."""

from __future__ import annotations

from pathlib import Path

import pytest

from machines import unicorn_with_stubs

from . import test_checkpoint, test_clone, test_live, test_save

pytestmark = pytest.mark.slow


@pytest.fixture
def engine_name(monkeypatch: pytest.MonkeyPatch) -> str:
    return unicorn_with_stubs(monkeypatch)


def test_it_goes_on_where_it_was_saved(engine_name: str) -> None:
    test_save.test_a_guest_goes_on_where_it_was_saved(engine_name, vcpus=1)


def test_it_goes_on_from_any_checkpoint(engine_name: str, tmp_path: Path) -> None:
    test_checkpoint.go_on_from_any_checkpoint(engine_name, tmp_path, vcpus=1)


def test_it_and_its_clones_go_on_each_for_itself(engine_name: str) -> None:
    test_clone.test_parent_and_clones_go_on_each_for_itself(engine_name, vcpus=1)


def test_it_is_relocated_again_and_again(engine_name: str, tmp_path: Path) -> None:
    test_live.relocate_again_and_again(engine_name, tmp_path, vcpus=1, times=3)
