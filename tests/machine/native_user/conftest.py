"""Guest-user mode in stub processes, on a bare machine and on a bare stub."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from bare import BareMachine
from stubs import Hostile, Unhandled

from xenolith.machine import native
from xenolith.machine.engines.unicorn.user import host


@pytest.fixture(autouse=True)
def _stubs_work() -> None:
    if reason := host.missing():
        pytest.skip(f"no stub processes here: {reason}")


@pytest.fixture(params=["python", "native"])
def forced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[BareMachine]:
    """A machine whose guest-user mode runs in stubs, by Python's loop, or by run.c, which leaves traps to it."""
    monkeypatch.setenv(host.SETTING, host.FORCE)
    made = BareMachine("unicorn")
    if request.param == "native":
        if reason := native.missing():
            pytest.skip(f"no native code here: {reason}")
        made.engine.cpu(0).attach(Unhandled())
    yield made
    made.close()


@pytest.fixture
def hostile() -> Iterator[Callable[[], Hostile]]:
    """Call it for a program in a stub of its own."""
    made: list[Hostile] = []

    def make() -> Hostile:
        made.append(Hostile())
        return made[-1]

    yield make
    for program in made:
        program.close()
