"""The root file system of a Debian guest: a cpio archive built here, byte by byte, with no root and no tools.

The kernel unpacks an archive of the "newc" kind (cpio(5); Documentation/driver-api/early-userspace/buffer-format
in Linux) into its first file system and starts /init. Ours holds busybox with a link for each of its applets,
the device nodes /init needs before devtmpfs is there, the host files the user asked for, and /init itself.

/init mounts what every program expects, sets the host's name and brings `lo` up. Where there are devices it loads
their drivers (`debian.modules`), found by the aliases that xenbus has in sysfs, so that no driver is loaded, and waits
for its back-end, without a device; asks for an address by DHCP on each eth*; and mounts: the data disks it was built
with (`Mount`), and the one that the kernel's command line names as Linux's does everywhere:

    root=DEVICE [rootfstype=TYPE] [rootflags=OPTIONS] [ro|rw] [init=PROGRAM]

Then it becomes `init` of that root; without one it starts a shell on the console, and a command to run it runs, in that
root if there is one. There, all that it needs is our own busybox (/dev/.xenolith): a root may hold one program alone.

busybox's poweroff, reboot and halt leave the work to an init that they signal, the process called linuxrc if there is
one. Process 1 is a shell, which waits for its child and hears no signal. So there is a linuxrc, which makes the system
call. It is asked once more before a command's end is told, as poweroff is over before it has been heard. The kernel,
when the toolstack writes control/shutdown, runs the scripts in /sbin.

Where dom0 offers a channel for it, our agent (guests/agent) is started, which runs commands for dom0 in that root.

A command's output, standard input and exit status travel over the console as `debian.framing` says. With a terminal of
its own it has the console's as it is, of the size that is in xenstore at ~/console/size ("ROWS COLUMNS").

The archive is not compressed: taking it apart in the guest would cost more than copying it there.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import stat
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Final

from xenolith.debian.framing import RECORD_SEPARATOR
from xenolith.dom0.image import KernelImage

AGENT: Final = Path(__file__).with_name("agent.elf")  # made of guests/agent
_MOUNTED_OVER: Final = ("proc", "sys", "dev")
MAX_FILE_BYTES: Final = (1 << 32) - 1  # eight hexadecimal digits in the archive


def kernel_arguments(vcpus: int, *, verbose: bool = False) -> str:
    """The kernel's command line for an initramfs of ours.

    The kernel's messages are seen if `verbose`, while it boots; the last words of a crash always are. Two arguments
    spare Linux hypercalls at boot: `nr_cpus` asking after 8,192 possible vCPUs, one each, and `noreplace-smp` rewriting
    8,500 LOCK prefixes of its code for a single processor, each in an address space that it switches to and back, with
    four. `tsc=reliable` spares an idle guest two wakings a second, to compare the counter with Xen's time, which is
    read from that counter.  `xen.fifo_events=0` keeps event channels in bitmaps, of which the KVM engine can raise a
    computing program's ticks without an exit (machine.engines.kvm.fast_path); 4,095 of them are enough here.
    """
    loglevel = "" if verbose else " quiet loglevel=1"
    return f"console=hvc0 panic=-1 nr_cpus={vcpus} noreplace-smp tsc=reliable xen.fifo_events=0{loglevel}"


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


@dataclass(frozen=True)
class Command:
    """A command for /init to run between marks with this nonce; its environment adds to /init's.

    It gets its input in chunks (`debian.framing`), or, with `terminal`, the console as its terminal. With
    `errors_apart` its standard error is another console, /dev/hvc1, and there is no agent.
    """

    arguments: Sequence[str]
    nonce: str
    environment: Mapping[str, str] = field(default_factory=dict)
    directory: str = "/root"
    user: str = ""
    terminal: bool = False
    errors_apart: bool = False


def build_initramfs(
    busybox: Path,
    *,
    command: Command | None = None,
    environment: Mapping[str, str] | None = None,
    size: tuple[int, int] | None = None,
    files: Iterable[HostFile] = (),
    modules: Iterable[Node] = (),
    mounts: Iterable[Mount] = (),
) -> bytes:
    """The archive. Without a command /init starts a shell, with this environment added to its own.

    `size` is the terminal's, in rows and columns, where what runs has one that a person sees. `modules` are those that
    kernel_modules found, `mounts` the data disks to mount, in this order.
    Raises InitramfsError when a file cannot be read or would replace one of ours.
    """
    disks = "".join(f"{mount}\n" for mount in mounts)
    ours = [
        *_busybox(busybox),
        Node("init", stat.S_IFREG | 0o755, _init(command, environment or {}, size)),
        Node("etc/fstab", stat.S_IFREG | 0o644, _FSTAB.encode()),
        Node("etc/fstab.disks", stat.S_IFREG | 0o644, disks.encode()),
        Node("etc/linuxrc", stat.S_IFREG | 0o755, _LINUXRC.encode()),
        Node("etc/agent", stat.S_IFREG | 0o755, AGENT.read_bytes()),
        Node("etc/udhcpc.script", stat.S_IFREG | 0o755, _DHCP.encode()),
    ]
    kept = {node.path for node in ours if stat.S_ISREG(node.mode)}
    nodes = [*_base(command.user if command else ""), *ours, *modules]
    for file in files:
        for node in _host_nodes(file):
            if node.path in kept:
                raise InitramfsError(
                    f"{file.host} cannot be /{node.path} in the guest: our initramfs starts with its own"
                )
            nodes.append(node)
    if command is not None:
        nodes.append(Node("etc/command", stat.S_IFREG | 0o755, _command(command)))
    return pack(_with_parents(nodes))


# --- /init -------------------------------------------------------------------------------------------------

_ENVIRONMENT: Final = """\
#!/bin/busybox sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=${TERM:-linux}
"""

# With the shell's own words where that is as good: a program takes Unicorn 50 ms to start.
_SETUP: Final = """\
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

# A disk is there a moment after its driver.
await() {
    case $1 in
    /dev/*) for tenth in $(seq 100); do [ -e "$1" ] && break; sleep 0.1; done ;;
    esac
}
# A command has nothing to run on.
fail() {
    echo "/init: $1" >&2
    [ -e /etc/command ] && poweroff -f
}
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
    mount -t "$type" -o "$flags$options" "$root" /newroot || fail "$root cannot be mounted as the root"
fi
while read -r source target kind options _; do
    source=$(printf %b "$source") target=${root:+/newroot}$(printf %b "$target")
    await "$source"
    mkdir -p "$target"
    for tenth in $(seq 30); do  # a share is there a moment after its driver
        mount -t "$kind" -o "$options" "$source" "$target" && continue 2
        [ "$kind" = 9p ] || break
        sleep 0.1
    done 2>/run/mount-said
    fail "$source cannot be mounted on $target: $(tail -n 1 /run/mount-said)"
done </etc/fstab.disks
if [ -e /sys/bus/xen/devices/console-1 ] && [ ! "$errors" ]; then /etc/agent /dev/hvc1 ${root:+/newroot} & fi
shell='sh -l'
if [ "$root" ]; then
    for directory in dev proc sys; do mkdir -p /newroot/$directory; mount -o bind /$directory /newroot/$directory; done
    mkdir /dev/.xenolith
    cp /bin/busybox /dev/.xenolith/
    inside='chroot /newroot /dev/.xenolith/busybox'
    if [ ! -e /etc/command ]; then
        $inside test -x "$program" && exec switch_root /newroot "$program"
        shell="$inside sh -l"
        $inside test -x /bin/sh && shell='chroot /newroot /bin/sh -l'
    fi
    mkdir -p /newroot/dev/pts /newroot/run
    mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /newroot/dev/pts
    mount -t tmpfs -o mode=755 tmpfs /newroot/run
fi
for interface in /sys/class/net/eth*; do
    [ -e "$interface" ] && udhcpc -q -n -t 5 -T 1 -S -s /etc/udhcpc.script -i "${interface##*/}"
done
if [ "$root" ] && [ -e /etc/resolv.conf ]; then  # wherever its own leads
    cp /etc/resolv.conf /dev/.xenolith/
    $inside sh -c '
        target=$(readlink -f /etc/resolv.conf)
        [ "$target" ] || target=/etc/$(readlink /etc/resolv.conf)
        mkdir -p "${target%/*}"
        [ -e "$target" ] || : >"$target"
        mount -o bind /dev/.xenolith/resolv.conf "$target"'
fi
/etc/linuxrc &
linuxrc=$!
read -r _ </run/no-ending
"""

# Once it has heard the one signal it answers the other no more. A command's output must not end with the kernel's
# "reboot: Power down".
_LINUXRC: Final = """\
#!/bin/busybox sh
end() {
    trap '' WINCH
    [ -e /etc/command ] && echo 0 >/proc/sys/kernel/printk
    /bin/busybox "$1" -f
}
trap 'end halt' USR1
trap 'end poweroff' USR2
trap 'end reboot' TERM
trap 'echo >/run/no-ending' WINCH
echo >/run/no-ending
while :; do read -r _; done <>/run/nothing
"""

# In the foreground: what a shell without job control starts in the background ignores Ctrl-C, and so do its children.
_SHELL: Final = """\
echo 4 >/proc/sys/kernel/printk
[ "$root" ] || cd /root
setsid cttyhack $shell
poweroff -f
"""

# The kernel says nothing but of its crash. Marks are written, and input is taken, with the terminal passing every byte
# as it is. The last stty waits until the terminal has sent everything (tcsetattr with TCSADRAIN), without which the
# domain would power off with the end of the output still in the kernel. An end of file is no answer of linuxrc's: it
# may not have closed yet what it began with.
_COMMAND: Final = """\
echo 1 >/proc/sys/kernel/printk
stty raw -echo
[ -e /proc/sys/kernel/sysrq ] && sysrq=' sysrq'
printf '{separator}{nonce} begin%s\\n' "$sysrq"
{run}
status=$?
{drained}
kill -WINCH $linuxrc && until read -r _ </run/no-ending; do :; done
stty raw -echo
printf '{separator}{nonce} exit %d\\n' $status
stty sane
[ "$root" ] && mount -o remount,ro /newroot 2>/dev/null
poweroff -f
"""

# A number of bytes in a line, then these bytes; 0 is the end.
_PIPED: Final = """\
while read -r count && [ "$count" -gt 0 ]; do
    dd bs="$count" count=1 iflag=fullblock 2>/dev/null || break
done </dev/console >/run/stdin &
( {command} ) </run/stdin"""

# Standard error on a console of its own, in the agent's place; with the output where the kernel has no such.
_ERRORS_APART: Final = """\
exec 4>&1
[ -c /dev/hvc1 ] && exec 4>/dev/hvc1 && stty raw -echo <&4
"""
_ERRORS: Final = " 2>&4 4>&-"
_ERRORS_DRAINED: Final = "stty sane <&4"

_ON_TERMINAL: Final = """\
stty sane
{size}
setsid cttyhack {command}"""

# The protocol of xenstore (public/io/xs_wire.h) in the shell's words: a header of four 32-bit words, type, request,
# transaction and length, and as many bytes. WATCH is 4, a watch's event 15, READ 2.
_FOLLOW_SIZE: Final = """\
stty rows {rows} cols {columns}
follow_size() {
    printf '\\4\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\17\\0\\0\\0console/size\\0t\\0' >&3
    while set -- $(dd bs=16 count=1 iflag=fullblock <&3 2>/dev/null | od -A n -t u4) && [ $# = 4 ]; do
        value=$(dd bs="$4" count=1 iflag=fullblock <&3 2>/dev/null | tr '\\0' ' ')
        case $1 in
        15) printf '\\2\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\15\\0\\0\\0console/size\\0' >&3 ;;
        2) stty rows "${value% *}" cols "${value#* }" </dev/console ;;
        esac
    done
}
follow_size 3<>/dev/xen/xenbus >/dev/null 2>&1 &"""

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


def _init(command: Command | None, environment: Mapping[str, str], size: tuple[int, int] | None) -> bytes:
    follow = _FOLLOW_SIZE.replace("{rows}", str(size[0])).replace("{columns}", str(size[1])) if size else ""
    if command is None:
        return os.fsencode(_ENVIRONMENT + _SETUP + _exports(environment) + follow + "\n" + _SHELL)
    if command.terminal:
        run = _ON_TERMINAL.replace("{size}", follow)
    elif command.errors_apart:
        run = _ERRORS_APART + _PIPED + _ERRORS
    else:
        run = _PIPED
    run = run.replace("{command}", '"$@" "$(cat /etc/command)"')
    setup = "errors=apart\n" + _SETUP if command.errors_apart else _SETUP
    separator = f"\\{RECORD_SEPARATOR[0]:03o}"
    text = _COMMAND.replace("{separator}", separator).replace("{nonce}", command.nonce).replace("{run}", run)
    text = text.replace("{drained}", _ERRORS_DRAINED if command.errors_apart else "")
    return os.fsencode(_ENVIRONMENT + setup + _who(command.user) + text)


# USER[:GROUP], by the names of the root; a user who is only a number need not be known there.
_IN_ROOT_AS: Final = """\
    user={user}
    group=${user#"${user%%:*}"} user=${user%%:*}
    uid=$($inside id -u "$user" 2>/dev/null) gid=$($inside id -g "$user" 2>/dev/null)
    case $user in *[!0-9]*) ;; *) uid=$user gid=${gid:-$user} ;; esac
    case ${group#:} in
    '') ;;
    *[!0-9]*) gid=$($inside awk -F: -v name="${group#:}" '$1 == name { print $3 }' /etc/group) ;;
    *) gid=${group#:} ;;
    esac
    if [ "$uid" ] && [ "$gid" ]; then
        set -- $inside nsenter -S "$uid" -G "$gid" /dev/.xenolith/busybox sh -c
    else
        set -- sh -c "echo 'no such user: '{user} >&2; exit 125"
    fi
"""


def _who(user: str) -> str:
    """What runs the command, as `user`, here or in the root: the latter with our busybox, of which it needs nothing."""
    here, inside = "sh -c", "    set -- $inside sh -c\n"
    if user:
        here = f"su -p -s /bin/sh {shlex.quote(user)} -c"
        inside = _IN_ROOT_AS.replace("{user}", shlex.quote(user))
    return f'if [ "$root" ]; then\n{inside}else\n    set -- {here}\nfi\n'


# Our shell runs its own applet where a name has no slash, and in a root it is not ours that is meant.
_FIND: Final = """\
set -- {words}
if [ -e /dev/.xenolith ]; then
    case $1 in
    */*) ;;
    *)
        program=$1
        shift
        IFS=:
        for directory in $PATH; do
            [ -x "$directory/$program" ] && [ ! -d "$directory/$program" ] && exec "$directory/$program" "$@"
        done
        echo "sh: $program: not found" >&2
        exit 127 ;;
    esac
fi
exec "$@"
"""


def _command(command: Command) -> bytes:
    """/etc/command: the command's environment and directory, and the command."""
    if not command.arguments:
        raise InitramfsError("no command to run")
    if any("\0" in word for word in (*command.arguments, *command.environment.values(), command.directory)):
        raise InitramfsError("an argument of the command contains a NUL byte, which no program can be given")
    words = " ".join(map(shlex.quote, command.arguments))
    directory = shlex.quote(command.directory)
    return os.fsencode(f"{_exports(command.environment)}cd {directory} || exit 126\n" + _FIND.replace("{words}", words))


def _exports(environment: Mapping[str, str]) -> str:
    for name, value in environment.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or "\0" in value:
            raise InitramfsError(f"{name!r} cannot be set in the guest's environment")
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items())


def _base(user: str) -> Iterator[Node]:
    """The files that every guest has; a user who is a number is made known to it."""
    for directory in ("dev", "proc", "sys", "run", "mnt", "etc", "root", "bin", "sbin", "usr/bin", "usr/sbin", "var"):
        yield Node(directory, stat.S_IFDIR | 0o755)
    yield Node("tmp", stat.S_IFDIR | 0o1777)
    for fifo in ("stdin", "nothing", "no-ending"):
        yield Node(f"run/{fifo}", stat.S_IFIFO | 0o600)
    yield Node("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    yield Node("dev/null", stat.S_IFCHR | 0o666, device=(1, 3))
    yield Node("etc/hosts", stat.S_IFREG | 0o644, b"127.0.0.1 localhost xenolith\n::1 localhost\n")
    # What mount tries where no type is given: a file system that is asked for by name has its module loaded.
    yield Node("etc/filesystems", stat.S_IFREG | 0o644, b"ext4\nsquashfs\niso9660\n")
    yield Node("etc/mtab", stat.S_IFLNK | 0o777, b"/proc/mounts")
    yield Node("etc/profile", stat.S_IFREG | 0o644, _PROFILE.encode())
    users, groups = "root:x:0:0:root:/root:/bin/sh\n", "root:x:0:\n"
    if user.isdecimal() and int(user):
        users += f"{user}:x:{user}:{user}::/tmp:/bin/sh\n"
        groups += f"{user}:x:{user}:\n"
    yield Node("etc/passwd", stat.S_IFREG | 0o644, users.encode())
    yield Node("etc/group", stat.S_IFREG | 0o644, groups.encode())
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
            above = result.setdefault(str(parent), Node(str(parent), stat.S_IFDIR | 0o755))
            if not stat.S_ISDIR(above.mode):
                raise InitramfsError(f"/{node.path} cannot be in the guest: /{parent} is no directory there")
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
