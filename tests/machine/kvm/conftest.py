"""Tests of the KVM engine on a bare machine; skipped, with the reason, where KVM does not work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from xenolith.machine.engines.kvm.host import host_traits
from xenolith.machine.engines.protocol import EngineError

from .bare import Machine

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    try:
        host_traits()
    except EngineError as error:
        for item in items:
            if item.path.parent == HERE:
                item.add_marker(pytest.mark.skip(reason=str(error)))


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    yield made
    made.close()
