"""A program that confines itself to a folder and becomes diod. Run alone, it imports nothing of ours:

    python -I confined.py DIOD FOLDER ro|rw DESCRIPTOR

It goes into a user and a mount namespace of its own, without network, where nothing is mounted but the system's
programs (/usr, read-only) and the folder at /share: where no symbolic link is ever followed, no device is a device and
no file more than data (mount_setattr(2): NOSYMFOLLOW, NODEV, NOSUID, NOEXEC; RDONLY).  If root runs it there are
all user IDs; else only that of the user who runs it, and no privilege is left.

What fails is a line on standard error, and status 1.
"""

import ctypes
import os
import resource
import signal
import sys

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWNET = (
    0x20000,
    0x4000000,
    0x8000000,
    0x10000000,
    0x40000000,
)
MS_REC, MS_PRIVATE, MS_NOSUID, MS_NODEV, MNT_DETACH = 0x4000, 0x40000, 2, 4, 2
SYS_PIVOT_ROOT, SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_MOUNT_SETATTR = 155, 428, 429, 442  # x86-64
OPEN_TREE_CLONE, AT_RECURSIVE, AT_EMPTY_PATH, MOVE_MOUNT_F_EMPTY_PATH = 1, 0x8000, 0x1000, 4
RDONLY, NOSUID, NODEV, NOEXEC, NOSYMFOLLOW = 1, 2, 4, 8, 0x200000  # MOUNT_ATTR_*
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 24, 38
KEPT_CAPABILITIES = {0, 1, 2, 3, 4, 6, 7}  # CHOWN to FSETID, SETGID, SETUID: what a server of files needs
LAST_CAPABILITY = 63
ALL_IDS = 0xFFFFFFFF
AT_FDCWD = -100

libc = ctypes.CDLL(None, use_errno=True)


def call(function: "ctypes._NamedFuncPointer", *arguments: object) -> int:
    result: int = function(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def system(number: int, *arguments: object) -> int:
    return call(libc.syscall, ctypes.c_long(number), *arguments)


def enter_namespaces() -> None:
    """User IDs can be mapped only from outside, by a process that stays there for this long."""
    us, our_group, pid = os.getuid(), os.getgid(), os.getpid()
    ready_read, ready_write = os.pipe()
    helper = os.fork()
    if helper == 0:
        os.close(ready_write)
        status = 1
        if os.read(ready_read, 1):
            try:
                if us != 0:
                    write(f"/proc/{pid}/setgroups", "deny")
                write(f"/proc/{pid}/uid_map", f"0 0 {ALL_IDS}" if us == 0 else f"{us} {us} 1")
                write(f"/proc/{pid}/gid_map", f"0 0 {ALL_IDS}" if us == 0 else f"{our_group} {our_group} 1")
                status = 0
            except OSError as error:
                print(f"user IDs cannot be mapped: {error}", file=sys.stderr)
        os._exit(status)
    os.close(ready_read)
    try:
        call(libc.unshare, CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS)
        os.write(ready_write, b"x")
    finally:
        os.close(ready_write)
        status = os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1])
    if status:
        sys.exit(1)


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def tree(path: str) -> int:
    """A copy of the mount at a path, and of those below it, that is mounted nowhere yet."""
    return system(SYS_OPEN_TREE, AT_FDCWD, path.encode(), OPEN_TREE_CLONE | AT_RECURSIVE | os.O_CLOEXEC)


def set_attributes(mount: int, attributes: int) -> None:
    wanted = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    system(SYS_MOUNT_SETATTR, mount, b"", AT_EMPTY_PATH | AT_RECURSIVE, ctypes.byref(wanted), ctypes.sizeof(wanted))


def move(mount: int, path: str) -> None:
    os.mkdir(path)
    system(SYS_MOVE_MOUNT, mount, b"", AT_FDCWD, path.encode(), MOVE_MOUNT_F_EMPTY_PATH)
    os.close(mount)


def confine(folder: str, read_only: bool) -> None:
    call(libc.mount, b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    share = tree(folder)
    set_attributes(share, NOSUID | NODEV | NOEXEC | NOSYMFOLLOW | (RDONLY if read_only else 0))
    system_mounts = {"/usr": tree("/usr")}
    links = {}
    for name in ("/bin", "/sbin", "/lib", "/lib64"):
        if os.path.islink(name):
            links[name] = os.readlink(name)
        elif os.path.isdir(name):
            system_mounts[name] = tree(name)
    top = "/proc"  # a directory that is on every system
    call(libc.mount, b"root", top.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, b"mode=755,size=64k")
    for name, mount in system_mounts.items():
        set_attributes(mount, RDONLY | NOSUID | NODEV)
        move(mount, top + name)
    for name, target in links.items():
        os.symlink(target, top + name)
    move(share, f"{top}/share")
    os.chdir(top)
    system(SYS_PIVOT_ROOT, b".", b".")
    call(libc.umount2, b".", MNT_DETACH)
    os.chdir("/")


def give_up_rights() -> None:
    for capability in range(LAST_CAPABILITY + 1):
        if capability not in KEPT_CAPABILITIES:
            libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    call(libc.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call(libc.prctl, PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main(diod: str, folder: str, access: str, descriptor: str) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    step = "no namespaces of its own (user namespaces are needed)"
    try:
        enter_namespaces()
        step = f"cannot be confined to {folder} (Linux 5.14 or later is needed)"
        confine(folder, access == "ro")
        give_up_rights()
        step = f"{diod} cannot be run"
        os.dup2(nothing, 2)
        os.set_inheritable(int(descriptor), True)
        arguments = ["-f", "-n", "-N", "-r", descriptor, "-w", descriptor, "-e", "/share", "-L", "stderr"]
        if os.getuid():
            arguments += ["-u", str(os.getuid())]
        os.execv(diod, [diod, *arguments])
    except OSError as error:
        print(f"{step}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
