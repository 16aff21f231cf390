"""A process that dies while its guests run leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys, threading
from xenolith.abi.x86 import RIP
from kvm.bare import CODE, Machine
machine = Machine()
machine.write_code("eb fe")
for number in range(2):
    cpu = machine.cpu(number)
    cpu.regs[RIP] = CODE
    threading.Thread(target=cpu.run, args=(lambda *trap: True,)).start()
print("running", flush=True)
"""


def test_sigkill_ends_all_of_it() -> None:
    path = os.pathsep.join((str(Path(__file__).parents[1]), *sys.path))
    before = set(Path("/dev/shm").iterdir())
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"running\n"
    process.send_signal(signal.SIGKILL)
    assert process.wait(20) == -signal.SIGKILL
    process.stdout.close()
    assert set(Path("/dev/shm").iterdir()) == before
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                session = (directory / "stat").read_text().rsplit(")", 1)[1].split()[3]
            except (OSError, IndexError):
                continue
            assert session != str(process.pid), "a process of the session is left"
