"""The stock Debian kernel does what it is for: programs run in it as they do on the host."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from xenolith.debian.packages import DebianGuest, GuestUnavailable, obtain

from .conftest import Run

pytestmark = pytest.mark.slow

NEWEST = ["bookworm", "bookworm-backports", "trixie", "sid", "sid-cloud", "sid-rt"]
"""Whatever kernel a suite has today."""


def _obtained(kernel: str) -> DebianGuest:
    """The kernel; the test is skipped where the machine's archive has no such suite, with what apt says of that."""
    try:
        return obtain(kernel)
    except GuestUnavailable as error:
        if kernel in NEWEST:
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize("kernel", ["6.1", "6.1-cloud", "6.12", *NEWEST])
def test_a_debian_kernel_boots_and_says_which_it_is(xenolith_run: Run, kernel: str) -> None:
    release = _obtained(kernel).package.removeprefix("linux-image-")
    done = xenolith_run("--kernel", kernel, "--vcpus", "2", "--", "uname", "-a")
    words = done.stdout.decode().split()
    assert words[:3] == ["Linux", "xenolith", release]
    assert "x86_64" in words
    assert done.returncode == 0
    assert done.stderr == b"", "only the command's output is printed"


@pytest.mark.parametrize("kernel", ["6.1", "trixie", "sid"])
def test_modules_of_the_kernels_package_are_loaded_with_what_they_need(
    xenolith_run: Run, tmp_path: Path, kernel: str
) -> None:
    """A file system as most guests have, made here, is written in the guest: ext4, jbd2, crc32c, crc16."""
    _obtained(kernel)
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("no mkfs.ext4 here")
    (tmp_path / "disk").write_bytes(bytes(8 << 20))
    subprocess.run(["mkfs.ext4", "-q", tmp_path / "disk"], check=True)
    modules = [word for name in ("ext4", "loop", "xen-blkfront", "xen-netfront") for word in ("--module", name)]
    script = """
        modprobe loop && losetup /dev/loop0 /disk && mount -t ext4 /dev/loop0 /mnt && echo kept >/mnt/x
        umount /mnt && mount -t ext4 -o ro /dev/loop0 /mnt && cat /mnt/x
        modprobe xen-netfront && modprobe xen:vbd && lsmod | grep -o '^xen_[a-z]*'
    """
    done = xenolith_run("--kernel", kernel, *modules, "--file", f"{tmp_path}/disk:/disk", "--", "sh", "-ec", script)
    assert sorted(done.stdout.splitlines()) == [b"kept", b"xen_blkfront", b"xen_netfront"]
    assert done.returncode == 0


def test_the_host_has_a_name_and_talks_to_itself(xenolith_run: Run) -> None:
    talk = "nc -l -p 7 -e cat & hostname; until echo heard | nc 127.0.0.1 7; do :; done 2>/dev/null"
    assert xenolith_run("--", "sh", "-c", talk).stdout == b"xenolith\nheard\n"


def test_statistics_count_what_happened(xenolith_run: Run) -> None:
    done = xenolith_run("--stats", "--", "true")
    statistics = json.loads(done.stderr)
    assert done.stdout == b""
    assert statistics["hypercalls"]["mmu_update"] > 0
    assert statistics["traps"]["#PF"] > 0
    assert 0 < statistics["boot_seconds"] <= statistics["total_seconds"]
    assert statistics["cpu_seconds"] > 0


@pytest.mark.parametrize("status", [0, 1, 3, 127, 255])
def test_the_exit_status_is_the_commands(xenolith_run: Run, status: int) -> None:
    assert xenolith_run("--", "sh", "-c", f"exit {status}").returncode == status


def test_a_host_file_is_hashed_as_on_the_host(xenolith_run: Run, tmp_path: Path) -> None:
    data = random.Random(1).randbytes(3_000_000)
    (tmp_path / "data").write_bytes(data)
    done = xenolith_run("--file", f"{tmp_path}/data:/srv/data", "--", "sha256sum", "/srv/data")
    assert done.stdout.decode() == f"{hashlib.sha256(data).hexdigest()}  /srv/data\n"


def test_a_program_of_the_hosts_keeps_its_executable_bit(xenolith_run: Run, tmp_path: Path) -> None:
    script = tmp_path / "say"
    script.write_text('#!/bin/sh\necho "I was given $1"\n')
    script.chmod(0o755)
    done = xenolith_run("--file", f"{script}:/usr/local/bin/say", "--", "say", "two words")
    assert done.stdout == b"I was given two words\n"


def test_binary_output_arrives_byte_for_byte(xenolith_run: Run, tmp_path: Path) -> None:
    data = bytes(range(256)) * 400 + random.Random(2).randbytes(100_000)
    (tmp_path / "data").write_bytes(data)
    done = xenolith_run("--file", f"{tmp_path}/data:/data", "--", "cat", "/data")
    assert done.stdout == data


def test_a_pipeline_gives_the_hosts_result(xenolith_run: Run) -> None:
    numbers = sorted((str(number) for number in range(1, 2001) if "7" in str(number)), reverse=True)
    expected = hashlib.md5("".join(f"{number}\n" for number in numbers).encode()).hexdigest()
    done = xenolith_run("--", "sh", "-c", "seq 1 2000 | grep 7 | sort -r | md5sum")
    assert done.stdout.decode().split()[0] == expected


def test_300_programs_one_after_the_other(xenolith_run: Run) -> None:
    count = "i=0; while [ $i -lt 300 ]; do i=$(/bin/busybox expr $i + 1) || exit 9; done; echo $i"
    assert xenolith_run("--", "sh", "-c", count).stdout == b"300\n"


@pytest.mark.parametrize("vcpus", [1, 2])
def test_parallel_jobs_give_the_hosts_results(xenolith_run: Run, vcpus: int) -> None:
    job = "(seq $job 3000 | sha256sum | sed s/-/$job/) &"
    done = xenolith_run("--vcpus", str(vcpus), "--", "sh", "-c", f"for job in 1 2 3 4; do {job} done; wait; nproc")
    *jobs, processors = done.stdout.decode().splitlines()
    expected = [
        hashlib.sha256("".join(f"{number}\n" for number in range(first, 3001)).encode()).hexdigest() + f"  {first}"
        for first in range(1, 5)
    ]
    assert sorted(jobs) == sorted(expected)
    assert processors == str(vcpus)


@pytest.mark.parametrize("vcpus", [2, 4])
def test_programs_start_and_end_on_all_vcpus_at_once(xenolith_run: Run, vcpus: int) -> None:
    job = "(for i in $(seq 25); do seq $job$i 900 | sort -r | md5sum; done | md5sum) &"
    done = xenolith_run("--vcpus", str(vcpus), "--", "sh", "-c", f"for job in 1 2 3 4; do {job} done; wait")
    expected = []
    for job_number in range(1, 5):
        sums = ""
        for i in range(1, 26):
            numbers = sorted((str(number) for number in range(int(f"{job_number}{i}"), 901)), reverse=True)
            sums += hashlib.md5("".join(f"{number}\n" for number in numbers).encode()).hexdigest() + "  -\n"
        expected.append(hashlib.md5(sums.encode()).hexdigest() + "  -")
    assert sorted(done.stdout.decode().splitlines()) == sorted(expected)


@pytest.mark.parametrize("choice", ["off", "auto"])
def test_with_and_without_mitigations(xenolith_run: Run, choice: str) -> None:
    done = xenolith_run("--cmdline", f"mitigations={choice}", "--", "cat", "/proc/cmdline")
    assert done.stdout.decode().split()[-1] == f"mitigations={choice}"
    assert done.returncode == 0


# The kernels' own images end at 74 MiB (amd64) and 62 MiB (cloud) of guest-physical memory.
@pytest.mark.parametrize(("kernel", "mib"), [("6.1-cloud", 80), *(("6.1", mib) for mib in (96, 128, 512, 1024, 2048))])
def test_a_domain_of_any_size_has_its_memory(xenolith_run: Run, kernel: str, mib: int) -> None:
    awk = ["awk", "/^MemTotal/ { print $2 }", "/proc/meminfo"]
    done = xenolith_run("--kernel", kernel, "--memory", str(mib), "--", *awk)
    total_kib = int(done.stdout)
    assert (mib * 0.95 - 64) * 1024 < total_kib <= mib * 1024


def test_a_domain_too_small_for_its_kernel_is_refused(xenolith_run: Run) -> None:
    done = xenolith_run("--memory", "64", "--", "true")
    assert b"give it more memory" in done.stderr
    assert done.returncode == 125


def test_memory_can_be_filled_and_read_back(xenolith_run: Run) -> None:
    fill = "dd if=/dev/zero bs=1M count=60 2>/dev/null | tr '\\0' x >/tmp/file && md5sum </tmp/file"
    done = xenolith_run("--memory", "256", "--", "sh", "-c", fill)
    assert done.stdout.decode().split()[0] == hashlib.md5(b"x" * (60 << 20)).hexdigest()
