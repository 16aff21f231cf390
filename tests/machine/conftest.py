"""Engines without a hypervisor: a bare machine for each engine that works here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from bare import BareMachine


@pytest.fixture
def bare(engine_name: str) -> Iterator[BareMachine]:
    """A bare machine; the test runs once for each engine, and is skipped with the reason where one cannot run."""
    made = BareMachine(engine_name)
    yield made
    made.close()
