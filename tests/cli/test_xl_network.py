"""Networks as a person handles them: real commands and a daemon."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from people import Person, person_in

HEADING = "Idx BE Mac Addr.         handle state evt-ch   tx-/rx-ring-ref BE-path                       \n"


@pytest.fixture
def person(tmp_path: Path) -> Iterator[Person]:
    with person_in(tmp_path) as person:
        yield person


def net(person: Person, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "xenolith", "net", *arguments],
        cwd=person.directory,
        env=person.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def rows(person: Person, domain: str) -> list[list[str]]:
    listed = person.xl("network-list", domain)
    assert listed.returncode == 0
    assert listed.stdout.startswith(HEADING)
    return [line.split() for line in listed.stdout.splitlines()[1:]]


def test_interfaces_are_attached_listed_and_detached(person: Person) -> None:
    config = person.configuration("n", "hello.elf", vif=["mac=00:16:3e:01:02:03,bridge=xenbr0,ip=10.213.7.7"])
    assert person.xl("create", "-p", "-q", config).returncode == 0
    base = "/local/domain/0/backend/vif/1"
    assert rows(person, "n") == [["0", "0", "00:16:3e:01:02:03", "0", "1", "-1", "-1/-1", f"{base}/0"]]
    assert person.xl("network-attach", "n", "mac=00:16:3e:00:00:09", "rate=1Mb/s").returncode == 0
    assert person.xl("network-attach", "1").returncode == 0
    third = rows(person, "n")[2]
    assert third[2].startswith("00:16:3e:")
    taken = person.xl("network-attach", "n", "ip=10.213.7.7")
    assert taken.stderr == "another interface has the address 10.213.7.7\nlibxl_device_nic_add failed.\n"
    assert person.xl("network-detach", "n", "00:16:3E:00:00:09").returncode == 0
    assert [row[0] for row in rows(person, "n")] == ["0", "2"]
    assert "no network interface 9" in person.xl("network-detach", "n", "9").stderr
    assert person.xl("network-detach", "n", "x").stderr == "Unknown device x.\n"
    unknown = person.xl("network-list", "nope")
    assert (unknown.stdout, unknown.stderr) == (HEADING, "nope is an invalid domain identifier\n")


@pytest.mark.parametrize(
    ("vif", "message"),
    [
        ("mac=01:00:00:00:00:01", "no MAC address that a machine can have"),
        ("mtu=10", "MTU of 10"),
        ("ip=192.168.0.1", "no host of 10.213.0.0/16"),
        ("rules=allow everything", "begins with allow or deny"),
        ("publish=80", "no published port"),
        ("publish=0:80", "between 1 and 65535"),
        ("backend=other", "backend="),
    ],
)
def test_an_interface_that_cannot_be_is_said_before_anything_is_made(person: Person, vif: str, message: str) -> None:
    answer = person.xl("create", "-q", person.configuration("n", "hello.elf", vif=[vif]))
    assert answer.returncode != 0
    assert message in answer.stderr
    assert person.xl("domid", "n").returncode == 1


def test_rules_are_shown_and_changed(person: Person) -> None:
    config = person.configuration(
        "n", "hello.elf", vif=["ip=10.213.7.7,rules=allow out tcp/443 to *.debian.org; deny in"]
    )
    assert person.xl("create", "-p", "-q", config).returncode == 0
    shown = net(person, "rules").stdout.splitlines()
    assert shown[0] == "n vif 0, 10.213.7.7:"
    assert [line.split("bytes   ")[1] for line in shown[1:]] == ["allow out tcp/443 to *.debian.org", "deny in"]
    assert net(person, "rules", "n", "deny out").returncode == 0
    assert net(person, "rules", "n").stdout.splitlines()[1].split() == ["0", "packets", "0", "bytes", "deny", "out"]
    wrong = net(person, "rules", "n", "deny out; allow sometimes")
    assert wrong.returncode == 1
    assert "'allow sometimes' is no rule" in " ".join(wrong.stderr.split())
    assert "10.213.7.7" in net(person, "show").stdout
    assert net(person, "rules", "n", "").returncode == 0
    assert net(person, "rules", "n").stdout == "n vif 0, 10.213.7.7: no rules\n"


def test_a_dump_is_pcap_and_ends_with_its_interface(person: Person) -> None:
    config = person.configuration("n", "hello.elf", vif=["mac=00:16:3e:01:02:03"])
    assert person.xl("create", "-p", "-q", config).returncode == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "xenolith", "net", "dump", "n"],
        cwd=person.directory,
        env=person.environment,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    head = process.stdout.read(24)
    assert struct.unpack("<IHHiIII", head)[::6] == (0xA1B23C4D, 1), "nanoseconds, Ethernet"
    assert person.xl("destroy", "n").returncode == 0
    assert process.wait(60) == 0
    assert process.stdout.read() == b""
    process.stdout.close()
