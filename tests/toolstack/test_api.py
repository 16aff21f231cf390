"""The Python API does what its page shows, and costs nothing until it is used."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import xenolith
from people import GUESTS, person_in

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


def test_the_examples_of_the_page_run_in_their_order(tmp_path: Path) -> None:
    for guest in ("hello.elf", "crash.elf"):
        (tmp_path / guest).write_bytes((GUESTS / guest).read_bytes())
    program = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    with person_in(tmp_path) as person:
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env=os.environ | person.environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
    assert "There is no guest with the name 'nobody'." in done.stdout
    assert (tmp_path / "crash.core").read_bytes()[:4] == b"\x7fELF"


def test_importing_the_package_imports_nothing_else() -> None:
    program = "import sys, xenolith; print([name for name in sys.modules if name.startswith(('xenolith.', 'numpy'))])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_name_exists() -> None:
    for name in xenolith.__all__:
        assert getattr(xenolith, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        getattr(xenolith, "nonsense")  # noqa: B009


def test_waiting_ends_when_the_time_is_up_and_when_the_domain_goes() -> None:
    with xenolith.power_on(64, engine="unicorn") as machine:
        config = xenolith.DomainConfig("a", kernel=str(GUESTS / "hello.elf"), target_memory_kib=32 << 10)
        domain = machine.create(config)
        with pytest.raises(xenolith.Timeout, match="is paused"):
            domain.wait(timeout=0)
        domain.destroy()
        assert domain.wait(timeout=0) is xenolith.State.GONE
