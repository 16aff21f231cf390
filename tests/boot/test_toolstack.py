"""The toolstack and a stock Debian guest: what needs a kernel that answers."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import xenolith
from people import Person, person_in
from xenolith.debian.initramfs import build_initramfs
from xenolith.debian.packages import obtain

from .conftest import DEADLINE_SECONDS

pytestmark = pytest.mark.slow


@pytest.fixture
def person(tmp_path: Path) -> Iterator[Person]:
    with person_in(tmp_path) as person:
        yield person


@pytest.fixture
def debian(person: Person) -> str:
    """The configuration of a Debian guest with a shell on its console, for `person`."""
    guest = obtain("6.1-cloud")
    (person.directory / "initrd").write_bytes(build_initramfs(guest.busybox))
    lines = ['name="deb"', f'kernel="{guest.elf}"', 'ramdisk="initrd"', "memory=160", 'extra="console=hvc0"']
    (person.directory / "deb.cfg").write_text("\n".join(lines) + "\n")
    return "deb.cfg"


def wait_for_prompt(person: Person, name: str) -> None:
    with person.console(name) as console:
        console.expect(b"~ # ", DEADLINE_SECONDS)


def test_a_guest_is_asked_to_reboot_and_then_to_power_off(person: Person, debian: str) -> None:
    assert person.xl("create", "-q", debian).returncode == 0
    wait_for_prompt(person, "deb")
    asked = person.xl("reboot", "-w", "deb")
    assert asked.stderr.splitlines()[-1] == "Domain 1 has been shut down, reason code 1"
    person.wait_for("domid", "deb", shows="2")
    wait_for_prompt(person, "deb")
    asked = person.xl("shutdown", "-w", "deb")
    assert asked.stderr.splitlines()[-1] == "Domain 2 has been shut down, reason code 0"


def test_a_program_runs_commands_at_the_guests_shell() -> None:
    with xenolith.power_on(memory_mib=256) as machine:
        domain = machine.create(xenolith.debian("deb", "6.1-cloud", memory_mib=160, arguments="one=two"))
        domain.unpause()
        done = domain.run("uname -s; ls /nowhere; exit 7", timeout=DEADLINE_SECONDS)
        assert done.returncode == 7
        assert done.output.startswith(b"Linux\n") and b"/nowhere: No such file" in done.output
        assert domain.run("cat /proc/cmdline", timeout=60).output.endswith(b" one=two\n")
        domain.shutdown()
        assert domain.wait(timeout=DEADLINE_SECONDS) is xenolith.State.SHUTDOWN


@pytest.mark.parametrize(("typed", "reason"), [(b"poweroff", 0), (b"reboot", 1), (b"halt", 0)])
def test_a_user_ends_the_guest_from_its_shell(person: Person, debian: str, typed: bytes, reason: int) -> None:
    person.xl("create", "-q", debian, 'on_reboot="preserve"', 'on_poweroff="preserve"')
    with person.console("deb") as console:
        console.expect(b"~ # ", DEADLINE_SECONDS)
        console.type(typed + b"\r")
        assert console.wait(DEADLINE_SECONDS) == 0
    assert f"d1: shut down, reason {reason}" in person.xl("dmesg").stdout


@pytest.mark.skipif(not shutil.which("gdb"), reason="gdb is not installed")
def test_gdb_finds_the_kernel_in_a_core(person: Person, debian: str) -> None:
    """The instruction at rip, the stack and the kernel's banner are at their own addresses."""
    person.xl("create", "-q", debian)
    wait_for_prompt(person, "deb")
    assert person.xl("dump-core", "deb", "core").returncode == 0
    banner = "find /b 0xffffffff81c00000, +0x800000, 'L','i','n','u','x',' ','v','e','r','s','i','o','n'"
    commands = ["x/i $rip", "x/gx $rsp", banner]
    words = [word for command in commands for word in ("-ex", command)]
    shown = subprocess.run(
        ["gdb", "-nx", "-batch", *words, "-c", str(person.directory / "core")], capture_output=True, text=True
    ).stdout
    assert "=> 0xffffffff81" in shown
    assert "Cannot access" not in shown
    assert "pattern" in shown and " found" in shown
