"""`xenolith run` with guests of our own, and what it says when it cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PREBUILT = Path(__file__).resolve().parents[2] / "guests" / "prebuilt"


def xenolith(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "xenolith", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, **changes},
    )


@pytest.mark.parametrize(
    ("how", "status", "said"),
    [
        ("shutdown reason=0", 0, ""),
        ("shutdown reason=1", 120, ""),
        ("shutdown reason=3", 121, "the guest crashed"),
        ("shutdown reason=7", 124, "unknown shutdown reason 7"),
        ("no-handler", 121, "the guest crashed: "),
    ],
)
def test_the_exit_status_says_how_the_guest_ended(engine_name: str, how: str, status: int, said: str) -> None:
    done = xenolith(
        "run", "--engine", engine_name, "--memory", "32", "--kernel", str(PREBUILT / "crash.elf"), "--cmdline", how
    )
    assert done.stdout.endswith(f"ending: {how}\n") or done.stdout.endswith(f"ending: {how}\r\n")
    assert done.returncode == status
    assert said in done.stderr


def test_the_smallest_guest_as_a_first_try_fails_nothing(engine_name: str) -> None:
    done = xenolith("run", "--engine", engine_name, "--memory", "32", "--kernel", str(PREBUILT / "hello.elf"))
    assert "FAILED=0" in done.stdout
    assert done.returncode == 0


def test_the_environment_chooses_the_engine(engine_name: str) -> None:
    done = xenolith(
        *("run", "--stats", "--memory", "32", "--kernel", str(PREBUILT / "hello.elf")), XENOLITH_ENGINE=engine_name
    )
    assert "hello from a PV guest" in done.stdout
    assert f'"engine": "{engine_name}"' in done.stderr


@pytest.mark.parametrize(("option", "said"), [("-v", "xenolith: engine: "), ("--verbose", "as asked for"), ("", "")])
def test_it_tells_the_engine_and_why_when_asked(engine_name: str, option: str, said: str) -> None:
    arguments = ["--engine", engine_name, "--memory", "32", "--kernel", str(PREBUILT / "hello.elf")]
    done = xenolith("run", *([option] if option else []), *arguments)
    assert done.returncode == 0
    assert said in done.stderr if said else done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--engine", "quantum"], 2, "quantum"),
        (["--memory", "0"], 2, "0 is not in the range"),
        (["--kernel", "/none/such"], 125, "/none/such"),
        (["--kernel", "not a kernel"], 125, "'not a kernel' is not a kernel version"),
        (["--kernel", str(PREBUILT / "hello.elf"), "--", "uname"], 2, "need a Linux kernel"),
        (["--kernel", str(PREBUILT / "hello.elf"), "--ramdisk", __file__, "--", "uname"], 2, "a ramdisk of your own"),
        (["--kernel", str(PREBUILT / "hello.elf"), "--memory", "1"], 125, "give it more memory"),
        (["--kernel", str(PREBUILT / "hello.elf"), "--vcpus", "1000"], 125, "1000 vCPUs"),
        (["--kernel", str(PREBUILT / "hello.elf"), "--cmdline", "x" * 2000], 125, "2000 bytes"),
    ],
)
def test_what_cannot_be_run_is_refused_with_the_reason(arguments: list[str], status: int, said: str) -> None:
    done = xenolith("run", *arguments)
    assert said in done.stderr
    assert done.returncode == status
    assert "Traceback" not in done.stderr


def test_the_help_documents_every_exit_status() -> None:
    text = xenolith("run", "--help").stdout
    for status in ("0 ", "120", "121", "122", "123", "124", "125", "143"):
        assert status in text


def test_asking_for_help_imports_no_engine() -> None:
    begin = "import sys\nfrom xenolith.cli.entry import xenolith"
    code = f"{begin}\ntry: xenolith()\nexcept SystemExit: pass\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    assert "Commands:" in done.stdout
    assert not {"numpy", "unicorn", "rich"} & set(done.stdout.split())
