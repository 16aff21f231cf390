"""Linux on the machine itself: the same programs in a chroot on a tmpfs, on one CPU.

The initramfs is unpacked in a mount namespace of its own, so nothing remains and, where the host allows
user namespaces, no root is needed.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from bench.image import busybox
from bench.session import Session
from bench.systems.base import Absent, Boot, System, last_cpu

# Arguments: busybox, the archive, then the command to run inside. /bench/run mounts /tmp and sets up lo:
# the latter changes nothing where lo is up already, and in a user namespace it may fail without harm.
ENTER = """
set -e
busybox=$1 archive=$2; shift 2
root=/dev/shm
mount -t tmpfs root $root
cd $root
$busybox cpio -i -d < "$archive" 2> /dev/null
mkdir -p dev proc tmp
mount --rbind /dev dev
mount -t proc proc proc
echo @shell
[ -z "$3" ] || chroot . /bench/run "$@"
echo @done
"""


class Native(System):
    """No virtual machine at all."""

    name = "native"
    title = "native Linux"
    forms = ()

    def prepare(self) -> str:
        if not shutil.which("unshare"):
            raise Absent("the program unshare is missing (Debian package util-linux)")
        done = subprocess.run([*_unshare(), "true"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise Absent(f"needs root or user namespaces to enter a chroot: {done.stderr.strip()}")
        return f"Linux {platform.release()}"

    @contextmanager
    def start(self, boot: Boot) -> Iterator[Session]:
        rows = [str(boot.budget), str(boot.macro_budget), ",".join(boot.rows)]
        command = [*_unshare(), "sh", "-c", ENTER, "sh", str(busybox()), str(boot.initramfs), *rows]
        with Session(command, cpu=last_cpu()) as session:
            yield session


def _unshare() -> list[str]:
    options = ["--mount", "--pid", "--fork", "--kill-child"]
    return ["unshare", *options] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", *options]
