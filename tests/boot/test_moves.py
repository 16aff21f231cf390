"""A Linux guest that is moved between engines all the time computes what it would have computed anyway."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from pathlib import Path

import pytest

from machines import missing

pytestmark = pytest.mark.slow

PROGRAM = """
import sys
from xenolith.machine.engines.adaptive import engine as adaptive

TRAPS_BETWEEN_MOVES = adaptive.NATIVE_WINDOW = 40

class MovedCpu(adaptive.AdaptiveCpu):
    def __init__(self, engine, policy):
        super().__init__(engine, adaptive.POLICY_ON_REQUEST)
        self.seen = 0
        cpus.append(self)

    def run(self, on_trap):
        def moving(vector, error_code, address):
            self.seen += 1
            if not self.seen % TRAPS_BETWEEN_MOVES or self._window_is_over():
                self.request_move("kvm" if self.running_on == "unicorn" else "unicorn")
            return on_trap(vector, error_code, address)
        super().run(moving)

cpus = []
adaptive.AdaptiveCpu = MovedCpu
sys.argv = ["xenolith", "run", "--engine", "adaptive", *sys.argv[1:]]
from xenolith.cli.entry import xenolith
try:
    xenolith()
finally:
    print(cpus[0].moves, file=sys.stderr)
"""
ROUNDS = 2
SCRIPT = f"i=0; while [ $i -lt {ROUNDS} ]; do sha256sum /srv/data; cat /srv/data | cat | md5sum; i=$((i+1)); done"


def test_checksums_forks_and_pipes_are_exact_over_a_thousand_moves(tmp_path: Path) -> None:
    if reason := missing("adaptive"):
        pytest.skip(f"no adaptive engine here: {reason}")
    data = random.Random(5).randbytes(2_000_000)
    (tmp_path / "data").write_bytes(data)
    arguments = ["--file", f"{tmp_path}/data:/srv/data", "--", "sh", "-c", SCRIPT]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, timeout=280, check=False)
    assert (
        done.stdout.decode().splitlines()
        == [
            f"{hashlib.sha256(data).hexdigest()}  /srv/data",
            f"{hashlib.md5(data).hexdigest()}  -",
        ]
        * ROUNDS
    ), done.stderr.decode()
    assert done.returncode == 0
    assert int(done.stderr.split()[-1]) >= 1000


COUNTING = """
import sys
from xenolith.machine.engines.adaptive import engine as adaptive

class CountedCpu(adaptive.AdaptiveCpu):
    on_kvm = 0

    def run(self, on_trap):
        def counting(vector, error_code, address):
            if self._modes is not None and not self._modes.kernel_mode:
                CountedCpu.on_kvm += self.running_on == "kvm"
            return on_trap(vector, error_code, address)
        super().run(counting)

adaptive.AdaptiveCpu = CountedCpu
sys.argv = ["xenolith", "run", *sys.argv[1:]]
from xenolith.cli.entry import xenolith
try:
    xenolith()
finally:
    print(CountedCpu.on_kvm, file=sys.stderr)
"""


@pytest.mark.parametrize("engine", ["kvm", "adaptive"])
def test_a_program_that_computes_goes_to_kvm(engine: str) -> None:
    """Whatever its kernel has done to its segment registers while it booted."""
    if reason := missing("adaptive"):
        pytest.skip(f"no adaptive engine here: {reason}")
    loop = "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; echo $i"
    arguments = ["--engine", engine, "--", "sh", "-c", loop]
    done = subprocess.run([sys.executable, "-c", COUNTING, *arguments], capture_output=True, timeout=280, check=False)
    assert done.stdout == b"100000\n", done.stderr.decode()
    assert int(done.stderr.split()[-1]) > 0
