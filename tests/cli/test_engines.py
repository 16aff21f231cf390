"""`xenolith engines` tells what was found and why."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from xenolith.cli.engines import engines
from xenolith.machine import native
from xenolith.machine.engines.kvm import api, host


@pytest.fixture
def no_kvm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(api, "DEVICE", "/nonexistent/kvm")
    host.host_traits.cache_clear()
    logger = logging.getLogger("xenolith")
    level = logger.level
    yield
    logger.setLevel(level)
    host.host_traits.cache_clear()


@pytest.mark.usefixtures("no_kvm")
def test_without_kvm_each_engine_that_needs_it_is_refused_with_the_reason() -> None:
    done = CliRunner().invoke(engines)
    lines = dict(line.split(":", 1) for line in done.stdout.splitlines())
    found = {name.strip(): text for name, text in lines.items()}
    assert done.exit_code == 0
    assert found["unicorn"] == " works: Unicorn"
    for name in ("kvm", "adaptive"):
        assert found[name].startswith(" refused: ")
        assert "No such file" in found[name]
    assert found["auto"].startswith(" unicorn: Unicorn, because KVM cannot be used")


@pytest.mark.parametrize(
    ("mode", "group", "advice"),
    [(0o660, 7, "it is for the group"), (0o600, 0, "it is for root alone"), (0o660, 0, "it is for root alone")],
)
def test_who_may_not_open_kvm_learns_whom_to_ask(
    monkeypatch: pytest.MonkeyPatch, mode: int, group: int, advice: str
) -> None:
    monkeypatch.setattr(os, "stat", lambda path: SimpleNamespace(st_gid=group, st_mode=mode))
    assert api._who_may_open("/dev/kvm").startswith(advice)


def test_it_tells_what_is_wrong_with_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XENOLITH_NATIVE", raising=False)
    monkeypatch.setenv("CC", "no-such-compiler")
    native._compiler.cache_clear()
    try:
        lines = CliRunner().invoke(engines).stdout.splitlines()
    finally:
        native._compiler.cache_clear()
    assert "native   : traps are Python's: CC=no-such-compiler names no program that is here" in lines


def test_it_tells_who_handles_traps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XENOLITH_NATIVE", "off")
    done = CliRunner().invoke(engines)
    assert "native   : traps are Python's: XENOLITH_NATIVE=off" in done.stdout.splitlines()
