"""A Debian userland installed by mmdebstrap(1), as an ordinary user or as root, that is ready to be a guest.

mmdebstrap runs apt and dpkg in a folder of its own: as root in a chroot, else in a user namespace (needs newuidmap and
an entry in /etc/subuid) or, where there is none, under fakechroot. What it writes is a tar archive.

The guest asks for an address by DHCP (systemd-networkd), has the router of our network as its name server, a login on
the console without a password for root, and the modules of the kernel that it is to be booted with.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from xenolith.debian.initramfs import Node
from xenolith.debian.roots import RootError
from xenolith.debian.roots.tree import FileTree, Inode

PACKAGES: Final = ("systemd-sysv", "udev", "dbus", "iproute2", "iputils-ping", "kmod")
RELEASE: Final = re.compile(r"[a-z][a-z0-9.-]*")
PACKAGE: Final = re.compile(r"[a-z0-9][a-z0-9+.-]+(?:/[a-z-]+)?")
_LINES_KEPT: Final = 8
_DNS: Final = "10.213.0.1"  # dom0.network's router

_log = logging.getLogger(__name__)


def mmdebstrap() -> str:
    """Raises RootError where there is none."""
    program = shutil.which("mmdebstrap")
    if program is None:
        raise RootError("mmdebstrap is needed, which is not installed (Debian: apt install mmdebstrap uidmap)")
    return program


def install(
    release: str,
    packages: Iterable[str],
    modules: Sequence[Node],
    mirror: str,
    into: Path,
    report: Callable[[str], None] = lambda _: None,
) -> None:
    """Have mmdebstrap write the tar archive `into`.

    `modules` are a kernel's (`debian.modules`), and get the indices that the guest's modprobe reads. `report` is told
    of each step. Raises RootError.
    """
    named = list(packages)
    for package in named:
        if not PACKAGE.fullmatch(package):
            raise RootError(f"{package!r} is not the name of a Debian package")
    if not RELEASE.fullmatch(release):
        raise RootError(f"{release!r} is not a release of Debian's, such as bookworm")
    program = mmdebstrap()
    include = ",".join([*PACKAGES, *named])
    # As root it mounts into its chroot; in a namespace of their own these mounts end with it, however it ends.
    alone = ["unshare", "--mount", "--propagation", "private"] if os.getuid() == 0 else []
    command = [*alone, program, "--variant=minbase", "--format=tar", "--architectures=amd64", f"--include={include}"]
    with tempfile.TemporaryDirectory(prefix="xenolith-bootstrap-", ignore_cleanup_errors=True) as folder:
        for node in modules:
            path = Path(folder, node.path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(node.data)
        os.chmod(folder, 0o1777)  # of a user namespace's and apt's users, too
        command += _hooks_for_modules(Path(folder) / "lib/modules")
        command += [release, str(into), *([mirror] if mirror else [])]
        _carry_out(command, os.environ | {"LC_ALL": "C.UTF-8", "TMPDIR": folder}, report)


def _hooks_for_modules(home: Path) -> Iterator[str]:
    for release in home.glob("*"):
        yield '--customize-hook=mkdir -p "$1/usr/lib/modules"'
        yield f"--customize-hook=copy-in {shlex.quote(str(release))} /usr/lib/modules"
        yield f'--customize-hook=chroot "$1" depmod {shlex.quote(release.name)}'


def _carry_out(command: Sequence[str], environment: dict[str, str], report: Callable[[str], None]) -> None:
    last: list[str] = []
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
            errors="replace",
            process_group=0,
        )
    except OSError as error:
        raise RootError(f"mmdebstrap cannot be run: {error.strerror}") from error
    with process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                last = [*last, line.strip()][-_LINES_KEPT:]
                _log.debug("%s", line.rstrip())
                if line.startswith("I: "):
                    report(line[3:].strip().rstrip("."))
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)  # all of it, as a terminal does
            raise
    if process.returncode:
        told = "; ".join([line for line in last if line.startswith("E:")] or last[-2:])
        raise RootError(
            f"mmdebstrap failed: {told or process.returncode}; without root it needs the package uidmap and a line for "
            "you in /etc/subuid and /etc/subgid, or the packages fakeroot and fakechroot"
        )


def make_ready(tree: FileTree, hostname: str, keys: str = "") -> None:
    """Complete an installed Debian for its life as a guest. `keys` may log in as root by ssh. Raises RootError."""

    def write(path: str, text: str, mode: int = 0o644) -> None:
        tree.make(path, tree.file(text.encode(), stat.S_IFREG | mode))

    write("/etc/hostname", f"{hostname}\n")
    write("/etc/hosts", f"127.0.0.1 localhost {hostname}\n::1 localhost\n")
    write("/etc/fstab", "/dev/xvda / ext4 errors=remount-ro 0 1\n")
    write("/etc/machine-id", "")  # each guest makes its own
    write("/etc/resolv.conf", f"nameserver {_DNS}\n")
    write("/etc/systemd/network/80-xen.network", "[Match]\nName=eth* en*\n\n[Network]\nDHCP=yes\n")
    unit = Inode(stat.S_IFLNK | 0o777, target="/lib/systemd/system/systemd-networkd.service")
    tree.make("/etc/systemd/system/multi-user.target.wants/systemd-networkd.service", unit)
    shadow = tree.find("/etc/shadow")
    if shadow is not None and shadow.content is not None:
        text = shadow.content.read_text()
        shadow.content.write_text(re.sub(r"^root:[^:]*:", "root::", text, flags=re.M))
    if keys:
        tree.make("/root/.ssh", Inode(stat.S_IFDIR | 0o700))
        write("/root/.ssh/authorized_keys", keys, 0o600)
