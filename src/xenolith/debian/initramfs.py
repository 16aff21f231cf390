"""The root file system of a Debian guest: a cpio archive built here, byte by byte, with no root and no tools.

The kernel unpacks an archive of the "newc" kind (cpio(5); Documentation/driver-api/early-userspace/buffer-format
in Linux) into its first file system and starts /init. Ours holds busybox with a link for each of its applets,
the device nodes /init needs before devtmpfs is there, the host files the user asked for, and /init itself.

busybox's poweroff, reboot and halt signal process 1 and leave the rest to it, which is right for an init and wrong for
a shell script that waits for its child. So in /sbin these three are scripts that make the system call themselves. The
kernel runs them when the toolstack writes control/shutdown, and the shell on the console when they are typed.

/init is process 1. It mounts what every program expects, sets the host's name and brings `lo` up. Where there are
devices it loads their drivers (`debian.modules`), found by the aliases that xenbus has in sysfs, so that no driver is
loaded, and waits for its back-end, without a device; asks for an address by DHCP on each eth*; and mounts: the data
disks it was built with (`Mount`), and the one that the kernel's command line names as Linux's does everywhere:

    root=DEVICE [rootfstype=TYPE] [rootflags=OPTIONS] [ro|rw] [init=PROGRAM]

Then it either starts a shell on the console, or `init` of that root, or runs one command, in that root if there is one,
whose output and exit status it puts between the marks of `debian.framing`. Between the marks the terminal passes bytes
through unchanged. The command gets an empty standard input.

The archive is not compressed: taking it apart in the guest would cost more than copying it there.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import stat
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Final

from xenolith.debian.framing import RECORD_SEPARATOR
from xenolith.dom0.image import KernelImage

_MOUNTED_OVER: Final = ("proc", "sys", "dev")
MAX_FILE_BYTES: Final = (1 << 32) - 1  # eight hexadecimal digits in the archive


def kernel_arguments(vcpus: int, *, command: bool) -> str:
    """The kernel's command line for an initramfs of ours, with a command to run or without.

    Nothing of the kernel's own must come between a command's marks.  Two arguments spare Linux hypercalls at boot:
    `nr_cpus` asking after 8,192 possible vCPUs, one each, and `noreplace-smp` rewriting 8,500 LOCK prefixes of its code
    for a single processor, each in an address space that it switches to and back, with four.
    """
    return f"console=hvc0 panic=-1 nr_cpus={vcpus} noreplace-smp" + " quiet loglevel=1" * command


def needed_arguments(image: KernelImage) -> str:
    """The arguments without which a kernel of Linux does not boot as a PV domain, here or on Xen; often none.

    From 6.16 on an initcall reads a register of AMD's chip set (why the machine was reset last) that no PV domain has
    mapped, and oopses on every Zen processor.  Such a kernel is known by what that initcall would print.
    """
    if image.guest_os == "linux" and any(_RESET_REASON.search(segment.data) for segment in image.segments):
        _log.info("initcall_blacklist=%s given to the kernel, which would crash on AMD processors", _RESET_INITCALL)
        return f"initcall_blacklist={_RESET_INITCALL}"
    return ""


_RESET_INITCALL: Final = "print_s5_reset_status_mmio"
_RESET_REASON: Final = re.compile(rb"Previous system reset reason \[0x")
_log = logging.getLogger(__name__)


class InitramfsError(Exception):
    """The initramfs cannot be built from what was given; the message says why."""


@dataclass(frozen=True)
class Node:
    """A file of the archive: its path below the root, st_mode, contents (a link's target) and device number."""

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Mount:
    """A file system for /init to mount: a line of fstab(5). `source` is a device, or what the type has for one."""

    source: str
    target: str
    type: str = "auto"
    options: str = "defaults"

    def __str__(self) -> str:
        return " ".join(_fstab_word(word) for word in (self.source, self.target, self.type, self.options)) + " 0 0"


def _fstab_word(word: str) -> str:
    if not word or not word.isprintable():
        raise InitramfsError(f"{word!r} cannot stand in fstab(5)")
    return word.replace("\\", "\\134").replace(" ", "\\040")


@dataclass(frozen=True)
class HostFile:
    """A file or directory of the host to put into the guest, with its permission bits."""

    host: Path
    guest: PurePosixPath

    @classmethod
    def parse(cls, argument: str) -> HostFile:
        """HOST[:GUEST], as given to --file. Without GUEST the file keeps its absolute path."""
        host, colon, guest = argument.partition(":")
        if not host:
            raise InitramfsError(f"--file {argument!r} names no host file; it is HOST or HOST:GUEST")
        if colon and not guest.startswith("/"):
            raise InitramfsError(f"--file {argument!r}: the path in the guest must be absolute, such as /root/data")
        path = Path(host)
        target = PurePosixPath(guest) if colon else PurePosixPath(os.path.abspath(path))
        if guest.endswith("/"):
            target /= path.name
        if ".." in target.parts or not target.name:
            raise InitramfsError(f"--file {argument!r}: {target} is not the name of a file in the guest")
        if len(target.parts) > 1 and target.parts[1] in _MOUNTED_OVER:
            raise InitramfsError(f"--file {argument!r}: /init mounts over /{target.parts[1]}, which would hide it")
        return cls(path, target)


def build_initramfs(
    busybox: Path,
    *,
    command: Sequence[str] | None = None,
    nonce: str = "",
    files: Iterable[HostFile] = (),
    modules: Iterable[Node] = (),
    mounts: Iterable[Mount] = (),
) -> bytes:
    """The archive. With a command, /init runs it between marks with this nonce; without one, a shell.

    `modules` are those that kernel_modules found, `mounts` the data disks to mount, in this order.
    Raises InitramfsError when a file cannot be read.
    """
    nodes = [*_base(), *_busybox(busybox), *modules]
    disks = "".join(f"{mount}\n" for mount in mounts)
    nodes.append(Node("etc/fstab.disks", stat.S_IFREG | 0o644, disks.encode()))
    for file in files:
        nodes.extend(_host_nodes(file))
    if command is None:
        nodes.append(Node("init", stat.S_IFREG | 0o755, _SHELL_INIT.encode()))
    else:
        nodes.append(Node("init", stat.S_IFREG | 0o755, _command_init(command, nonce)))
    return pack(_with_parents(nodes))


# --- /init -------------------------------------------------------------------------------------------------

# With the shell's own words where that is as good: a program takes Unicorn 50 ms to start.
_SETUP: Final = """\
#!/bin/busybox sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=${TERM:-linux}
mount -a
read -r name </etc/hostname && echo "$name" >/proc/sys/kernel/hostname
ifconfig lo up
if [ -d /lib/modules ]; then
    for alias in $(cat /sys/bus/xen/devices/*/modalias 2>/dev/null); do modprobe -q "$alias"; done
    for device in /sys/bus/xen/devices/vbd-*; do  # a disk is there a moment after its driver
        [ -e "$device" ] && for fiftieth in $(seq 500); do
            for disk in "$device"/block/*; do [ -e "/dev/${disk##*/}" ] && break 2; done
            sleep 0.02
        done
    done
fi
for interface in /sys/class/net/eth*; do
    [ -e "$interface" ] && udhcpc -q -n -t 5 -T 1 -S -s /etc/udhcpc.script -i "${interface##*/}"
done

# A disk is there a moment after its driver.
await() {
    case $1 in
    /dev/*) for tenth in $(seq 100); do [ -e "$1" ] && break; sleep 0.1; done ;;
    esac
}
while read -r source target rest; do
    await "$source"
    mkdir -p "$(printf %b "$target")"
done </etc/fstab.disks
[ -s /etc/fstab.disks ] && mount -a -T /etc/fstab.disks

root= type=auto flags=ro options= program=/sbin/init
read -r words </proc/cmdline
for word in $words; do
    case $word in
    root=*) root=${word#root=} ;;
    rootfstype=*) type=${word#rootfstype=} ;;
    rootflags=*) options=,${word#rootflags=} ;;
    init=*) program=${word#init=} ;;
    ro|rw) flags=$word ;;
    esac
done
if [ "$root" ]; then
    await "$root"
    mkdir -p /newroot
    mount -t "$type" -o "$flags$options" "$root" /newroot || echo "/init: $root cannot be mounted as the root" >&2
    for directory in dev proc sys; do mount -o move /$directory /newroot/$directory; done
fi
"""

# In the foreground: what a shell without job control starts in the background ignores Ctrl-C, and so do its children.
_SHELL_INIT: Final = (
    _SETUP
    + """\
[ "$root" ] && exec switch_root /newroot "$program"
cd /root
setsid cttyhack sh -l
poweroff -f
"""
)

# The second stty waits until the terminal has sent everything (tcsetattr with TCSADRAIN), without which the
# domain would power off with the end of the output still in the kernel.
_COMMAND_INIT: Final = (
    _SETUP
    + """\
cd /root
stty raw -echo
printf '{separator}{nonce} begin\\n'
( exec ${root:+chroot /newroot} {command} ) </dev/null
printf '{separator}{nonce} exit %d\\n' $?
stty sane
poweroff -f
"""
)

_DHCP: Final = """\
#!/bin/busybox sh
case $1 in
deconfig)
    ip address flush dev "$interface"
    ip link set "$interface" up ;;
bound | renew)
    ip address replace "$ip/${mask:-24}" dev "$interface"
    [ "$mtu" ] && ip link set "$interface" mtu "$mtu"
    for gateway in $router; do ip route replace default via "$gateway" dev "$interface"; done
    for server in $dns; do echo "nameserver $server"; done >/etc/resolv.conf
    [ "$domain" ] && echo "search $domain" >>/etc/resolv.conf ;;
esac
exit 0
"""

_FSTAB: Final = """\
proc /proc proc nosuid,nodev,noexec 0 0
sysfs /sys sysfs nosuid,nodev,noexec 0 0
devtmpfs /dev devtmpfs nosuid 0 0
"""

_ENDINGS: Final = ("poweroff", "reboot", "halt")
_ENDING: Final = """\
#!/bin/busybox sh
exec /bin/busybox {name} -f "$@"
"""

# Debian's busybox prefers its applets to files, so that the shell has to be told about the scripts in /sbin.
_PROFILE: Final = "PS1='\\w # '\n" + "".join(f'{name}() {{ /sbin/{name} "$@"; }}\n' for name in _ENDINGS)


def _command_init(command: Sequence[str], nonce: str) -> bytes:
    if not command:
        raise InitramfsError("no command to run")
    if any("\0" in word for word in command):
        raise InitramfsError("an argument of the command contains a NUL byte, which no program can be given")
    quoted = b" ".join(os.fsencode(shlex.quote(word)) for word in command)
    separator = f"\\{RECORD_SEPARATOR[0]:03o}"
    before, after = _COMMAND_INIT.replace("{separator}", separator).replace("{nonce}", nonce).split("{command}")
    return before.encode() + quoted + after.encode()


def _base() -> Iterator[Node]:
    for directory in ("dev", "proc", "sys", "run", "mnt", "etc", "root", "bin", "sbin", "usr/bin", "usr/sbin", "var"):
        yield Node(directory, stat.S_IFDIR | 0o755)
    yield Node("tmp", stat.S_IFDIR | 0o1777)
    yield Node("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    yield Node("dev/null", stat.S_IFCHR | 0o666, device=(1, 3))
    yield Node("etc/fstab", stat.S_IFREG | 0o644, _FSTAB.encode())
    yield Node("etc/hosts", stat.S_IFREG | 0o644, b"127.0.0.1 localhost xenolith\n::1 localhost\n")
    yield Node("etc/udhcpc.script", stat.S_IFREG | 0o755, _DHCP.encode())
    # What mount tries where no type is given: a file system that is asked for by name has its module loaded.
    yield Node("etc/filesystems", stat.S_IFREG | 0o644, b"ext4\nsquashfs\niso9660\n")
    yield Node("etc/mtab", stat.S_IFLNK | 0o777, b"/proc/mounts")
    yield Node("etc/profile", stat.S_IFREG | 0o644, _PROFILE.encode())
    yield Node("etc/passwd", stat.S_IFREG | 0o644, b"root:x:0:0:root:/root:/bin/sh\n")
    yield Node("etc/group", stat.S_IFREG | 0o644, b"root:x:0:\n")
    yield Node("etc/hostname", stat.S_IFREG | 0o644, b"xenolith\n")


def _busybox(busybox: Path) -> Iterator[Node]:
    yield Node("bin/busybox", stat.S_IFREG | 0o755, _read(busybox))
    for applet in _applets(busybox):
        if applet != "bin/busybox":
            yield Node(applet, stat.S_IFLNK | 0o777, b"/bin/busybox")
    for name in _ENDINGS:
        yield Node(f"sbin/{name}", stat.S_IFREG | 0o755, _ENDING.format(name=name).encode())


@cache
def _applets(busybox: Path) -> tuple[str, ...]:
    """The paths of its applets, as busybox itself tells (it is a static x86-64 program, so it runs here too)."""
    try:
        listed = subprocess.run([busybox.absolute(), "--list-full"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise InitramfsError(f"{busybox} is not a busybox that runs on this machine: {error}") from error
    return tuple(listed.stdout.split())


# --- host files --------------------------------------------------------------------------------------------


def _host_nodes(file: HostFile) -> Iterator[Node]:
    """The nodes for a host file, or for a directory and all below it. Links inside a directory stay links."""
    root = str(file.guest).lstrip("/")
    if not file.host.is_dir():
        yield _host_node(file.host, root, follow=True)
        return
    yield _host_node(file.host, root, follow=True)
    for directory, names, files in os.walk(file.host):
        for name in sorted(names + files):
            path = Path(directory, name)
            yield _host_node(path, f"{root}/{path.relative_to(file.host)}", follow=False)


def _host_node(path: Path, guest: str, *, follow: bool) -> Node:
    try:
        status = path.stat() if follow else path.lstat()
        if stat.S_ISLNK(status.st_mode):
            return Node(guest, status.st_mode, os.fsencode(os.readlink(path)))
    except OSError as error:
        raise InitramfsError(f"cannot read {path}: {error.strerror}") from error
    if stat.S_ISREG(status.st_mode):
        return Node(guest, status.st_mode, _read(path))
    if stat.S_ISDIR(status.st_mode):
        return Node(guest, status.st_mode)
    raise InitramfsError(f"{path} is neither a file, a directory nor a link, so it cannot be put into the guest")


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InitramfsError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise InitramfsError(f"{path} is larger than 4 GiB, the most that an initramfs can hold of one file")
    return data


def _with_parents(nodes: list[Node]) -> list[Node]:
    """Adds directories that nobody named before what is in them; a later node replaces an earlier one."""
    result: dict[str, Node] = {}
    for node in nodes:
        for parent in reversed(PurePosixPath(node.path).parents[:-1]):
            result.setdefault(str(parent), Node(str(parent), stat.S_IFDIR | 0o755))
        earlier = result.get(node.path)
        if earlier and stat.S_ISDIR(earlier.mode) != stat.S_ISDIR(node.mode):
            raise InitramfsError(f"/{node.path} cannot be a directory and a file in the guest")
        result[node.path] = node
    return list(result.values())


# --- cpio, newc --------------------------------------------------------------------------------------------


def pack(nodes: Iterable[Node]) -> bytes:
    """A cpio archive of the "newc" format. All files belong to root and have the time 0: same input, same bytes."""
    pieces: list[bytes] = []
    for inode, node in enumerate(nodes, start=1):
        pieces += _member(inode, node)
    pieces += _member(0, Node("TRAILER!!!", 0))
    return b"".join(pieces)


def _member(inode: int, node: Node) -> list[bytes]:
    name = os.fsencode(node.path) + b"\0"
    links = 2 if stat.S_ISDIR(node.mode) else 1
    fields = (inode, node.mode, 0, 0, links, 0, len(node.data), 0, 0, *node.device, len(name), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return [header, name, _padding(len(header) + len(name)), node.data, _padding(len(node.data))]


def _padding(size: int) -> bytes:
    return b"\0" * (-size % 4)
