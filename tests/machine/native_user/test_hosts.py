"""Where stubs work: for ordinary users, in containers, under others' filters; and what is said where they do not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from xenolith.machine.engines.protocol import EngineError
from xenolith.machine.engines.unicorn.user import host

PROBE = "from xenolith.machine.engines.unicorn.user import host; print(host.missing())"
FILTERED = """
import ctypes, sys
from struct import pack
from xenolith.machine.engines.unicorn.user import code
refused = [int(number) for number in sys.argv[1].split(",")]
rules = [({4: 0xC000003E, 0: number}, 0x50001) for number in refused]
program = code._program(rules, code.ALLOW)
buffer = ctypes.create_string_buffer(program)
fprog = ctypes.create_string_buffer(pack("<HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer)))
libc = ctypes.CDLL(None, use_errno=True)
assert not libc.prctl(38, 1, 0, 0, 0)
assert not libc.syscall(317, 1, 0, fprog)
from xenolith.machine.engines.unicorn.user import host
print(host.missing())
"""
# ptrace, process_vm_readv and _writev, userfaultfd, bpf, perf_event_open, io_uring, mount, setns, keyctl, add_key: what
# a container's default profile refuses with EPERM
CONTAINERS = "101,310,311,323,321,298,425,426,427,165,308,250,248"


def said(*line: str) -> str:
    home = {**os.environ, "HOME": "/tmp", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, env=home)
    if done.returncode:
        pytest.skip(f"{line[0]} does not work here: {done.stderr[-200:]}")
    return done.stdout.strip()


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="only root becomes somebody else")
def test_stubs_work_for_an_ordinary_user_without_capabilities() -> None:
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]
    assert said(*user, "--no-new-privs", sys.executable, "-c", PROBE) == "None"


@pytest.mark.skipif(not shutil.which("unshare"), reason="unshare is not installed")
def test_stubs_work_in_namespaces_of_their_own() -> None:
    assert said("unshare", "-Urmpf", sys.executable, "-c", PROBE) == "None"


def test_stubs_work_under_a_containers_filter() -> None:
    assert said(sys.executable, "-c", FILTERED, CONTAINERS) == "None"


def test_a_host_that_refuses_seccomp_or_memfds_is_named() -> None:
    assert "seccomp with a user notification" in said(sys.executable, "-c", FILTERED, "317")
    assert "close_range" in said(sys.executable, "-c", FILTERED, "436")
    assert "cannot be executed" in said(sys.executable, "-c", FILTERED, "59,322")


def test_another_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(host.SETTING, "perhaps")
    with pytest.raises(EngineError, match="XENOLITH_NATIVE_USER=perhaps: it may be off, on or force"):
        host.setting()
