"""Every tiny guest runs with native trap handlers and with Python's, which are the reference."""

from __future__ import annotations

import pytest

from xenolith.machine import native


@pytest.fixture(params=["native", "python"])
def handlers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who handles traps."""
    if request.param == "python":
        monkeypatch.setenv("XENOLITH_NATIVE", "off")
    elif reason := native.missing():
        pytest.skip(f"no native code here: {reason}")
    return str(request.param)
