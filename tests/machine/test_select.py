"""Which engine is taken, and what is said about it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from xenolith.machine.engines import select
from xenolith.machine.engines.kvm import api, host
from xenolith.machine.engines.kvm.traits import CAUTIOUS
from xenolith.machine.engines.protocol import EngineError


@pytest.fixture
def kvm_at(monkeypatch: pytest.MonkeyPatch) -> object:
    """Make KVM's device be some other file."""

    def move(path: str) -> None:
        monkeypatch.setattr(api, "DEVICE", path)
        host.host_traits.cache_clear()

    yield move
    host.host_traits.cache_clear()


@pytest.mark.parametrize(
    ("device", "reason"),
    [("/nonexistent/kvm", "No such file"), ("/dev/null", "not a KVM device")],
)
def test_without_a_usable_device_auto_takes_unicorn_with_one_line_of_warning(
    kvm_at: object, caplog: pytest.LogCaptureFixture, device: str, reason: str
) -> None:
    kvm_at(device)  # type: ignore[operator]
    choice = select.choose("auto")
    assert choice.name == "unicorn"
    assert reason in choice.reason
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert reason in warnings[0].getMessage()
    assert "\n" not in warnings[0].getMessage()


def test_without_permission_the_reason_says_what_to_do(
    kvm_at: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, _flags: int) -> int:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(api.os, "open", refuse)
    kvm_at("/dev/kvm")  # type: ignore[operator]
    with pytest.raises(EngineError, match=r"Permission denied .*group"):
        select.choose("kvm")


def test_kvm_asked_for_by_name_and_not_usable_is_an_error(kvm_at: object) -> None:
    kvm_at("/nonexistent/kvm")  # type: ignore[operator]
    with pytest.raises(EngineError, match=r"kvm engine cannot run here.*No such file"):
        select.choose("kvm")


def test_a_failed_self_test_counts_as_no_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise EngineError("/dev/kvm opens, but does not run ring-3 code as it must: UD2 gave nothing")

    monkeypatch.setattr(host, "host_traits", broken)
    assert select.choose("auto").name == "unicorn"
    with pytest.raises(EngineError, match=r"UD2 gave nothing"):
        select.choose("kvm")


@pytest.mark.parametrize(("exit_cost_ns", "engine"), [(3_000, "kvm"), (40_000, "adaptive")])
def test_auto_takes_unicorn_along_where_traps_on_kvm_are_dear(
    monkeypatch: pytest.MonkeyPatch, exit_cost_ns: int, engine: str
) -> None:
    monkeypatch.setattr(host, "host_traits", lambda: replace(CAUTIOUS, exit_cost_ns=exit_cost_ns))
    assert select.choose("auto").name == engine
    assert select.choose("kvm").name == "kvm"
    assert select.choose("adaptive").name == "adaptive"


def test_unicorn_asked_for_by_name_does_not_look_at_kvm(kvm_at: object, caplog: pytest.LogCaptureFixture) -> None:
    kvm_at("/nonexistent/kvm")  # type: ignore[operator]
    assert select.choose("unicorn").name == "unicorn"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_an_unknown_engine_is_named_with_the_ones_there_are() -> None:
    with pytest.raises(ValueError, match=r"'xen'.*auto, unicorn, kvm, adaptive"):
        select.choose("xen")
