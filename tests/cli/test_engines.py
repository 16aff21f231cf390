"""`xenolith engines` tells what was found and why."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from xenolith.cli.engines import engines
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


def test_it_tells_who_handles_traps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XENOLITH_NATIVE", "off")
    done = CliRunner().invoke(engines)
    assert "native   : traps are Python's: XENOLITH_NATIVE=off" in done.stdout.splitlines()
