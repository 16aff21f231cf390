"""Disk images with an ext4 file system, by e2fsprogs and without privilege.

mke2fs(8) copies a folder into the file system that it makes, with this user as the owner of everything and none of the
devices, which only root could have made.  What is then other than it should be debugfs(8) puts right in the image.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from xenolith.debian.roots import RootError
from xenolith.debian.roots.tree import FileTree, Inode

MIB: Final = 1 << 20
MIN_BYTES: Final = 4 << 30  # sparse: what is not written takes no room
_BYTES_PER_INODE: Final = 16384  # as mke2fs reckons
_LONGEST_LINE: Final = 4096  # of a script of debugfs


def image_of_tree(tree: FileTree, image: Path, size_bytes: int | None = None) -> None:
    """Make a new file, sparse, with the file system. The contents of the tree's files are used up. Raises RootError."""
    with tempfile.TemporaryDirectory(dir=image.parent, prefix="root-") as folder:
        os.chmod(folder, 0o700)
        try:
            script = list(_lay_out(tree, Path(folder) / "root"))
        except OSError as error:
            raise RootError(f"it cannot be unpacked: {error}") from error
        _make(Path(folder) / "root", image, size_bytes, tree.bytes, tree.files)
        _put_right(image, script)


def image_of_folder(folder: Path, image: Path, size_bytes: int | None = None) -> None:
    """The same of a folder as it is; what belongs to this user is root's in the image. Raises RootError."""
    script = []
    total = files = 0
    us, our_group = os.getuid(), os.getgid()
    for path, status in _listed(folder):
        files += 1
        total += status.st_blocks * 512
        name = str(path.relative_to(folder)) if path != folder else ""
        if us and status.st_uid == us:
            script.append(f"sif {_quoted(name)} uid 0")
        if us and status.st_gid == our_group:
            script.append(f"sif {_quoted(name)} gid 0")
    _make(folder, image, size_bytes, total, files)
    _put_right(image, script)


def _listed(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """A folder and all below it, links not followed. Raises RootError where another file system begins."""

    def fail(error: OSError) -> None:
        raise RootError(f"cannot read {error.filename}: {error.strerror}")

    try:
        first = folder.stat()
        yield folder, first
        for where, folders, names in os.walk(folder, onerror=fail):
            for name in folders + names:
                path = Path(where, name)
                status = path.lstat()
                if status.st_dev != first.st_dev:
                    raise RootError(f"{path} is on another file system than {folder}; a root is of one")
                yield path, status
    except OSError as error:
        raise RootError(f"cannot read {error.filename}: {error.strerror}") from error


def folder_state(folder: Path) -> Iterator[str]:
    """A line for each file of a folder; as long as these are the same, so is the folder. Raises RootError."""
    for path, status in _listed(folder):
        yield f"{path} {status.st_mode} {status.st_uid} {status.st_gid} {status.st_size} {status.st_ctime_ns}"


def _lay_out(tree: FileTree, top: Path) -> Iterator[str]:
    """Make a folder that mke2fs can copy; what it cannot have in it are commands of debugfs.

    A directory is made before what is in it and links come last of all, so that no path leads through one.
    """
    laid: dict[Inode, Path] = {}
    links: list[tuple[Path, str]] = []
    for name, inode in tree.walk():
        path = Path(f"{top}{name}")
        if inode in laid:
            os.link(laid[inode], path)
            continue
        bits = shown = stat.S_IMODE(inode.mode)
        made_by = os.getuid(), os.getgid()
        if inode.is_directory:
            shown = bits & 0o777 | 0o700
            path.mkdir()
            path.chmod(shown)
            laid[inode] = path
        elif inode.content is not None:
            shown = bits & 0o777 | 0o600
            inode.content.rename(path)
            path.chmod(shown)
            laid[inode] = path
        elif stat.S_ISLNK(inode.mode):
            links.append((path, inode.target))
        else:
            yield from _special(name, inode)
        if not name or not (inode in laid or stat.S_ISLNK(inode.mode)):
            shown, made_by = -1, (0, 0)  # mke2fs and debugfs decide
        if shown != bits:
            yield f"sif {_quoted(name)} mode 0{inode.mode:o}"
        for which, ours, theirs in zip(("uid", "gid"), made_by, (inode.uid, inode.gid), strict=True):
            if ours != theirs:
                yield f"sif {_quoted(name)} {which} {theirs}"
        for key, value in inode.xattrs.items():
            yield f"ea_set -f {_value_file(top, value)} {_quoted(name)} {key}"
    for path, target in links:
        path.symlink_to(target)
    for inode, path in laid.items():
        os.utime(path, (inode.mtime, inode.mtime))


def _special(name: str, inode: Inode) -> Iterator[str]:
    """A device or a FIFO: debugfs makes them in its working directory alone."""
    folder, _, last = name.rpartition("/")
    yield f"cd {_quoted(folder)}"
    if stat.S_ISFIFO(inode.mode):
        yield f"mknod {_quoted(last, '')} p"
    else:
        kind = "c" if stat.S_ISCHR(inode.mode) else "b"
        yield f"mknod {_quoted(last, '')} {kind} {inode.device[0]} {inode.device[1]}"
    yield "cd /"


def _value_file(top: Path, value: bytes) -> Path:
    descriptor, path = tempfile.mkstemp(dir=top.parent, prefix="value-")
    with open(descriptor, "wb") as file:
        file.write(value)
    return Path(path)


def _quoted(path: str, root: str = "/") -> str:
    """A path as a word of debugfs."""
    path = path.lstrip("/") if root else path
    return '"' + f"{root}{path}".replace('"', '""') + '"'


def _make(folder: Path, image: Path, size_bytes: int | None, content: int, files: int) -> None:
    size = size_bytes or max(MIN_BYTES, 2 * content + (1 << 30))
    size = (size + MIB - 1) // MIB * MIB
    inodes = max(size // _BYTES_PER_INODE, 2 * files)
    try:
        descriptor = os.open(image, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        os.truncate(descriptor, size)
        os.close(descriptor)
        _run(
            ["mke2fs", "-q", "-F", "-t", "ext4", "-m", "1", "-N", str(inodes), "-E", "root_owner=0:0"]
            + ["-d", str(folder), str(image)]
        )
    except OSError as error:
        raise RootError(f"cannot make {image}: {error.strerror}") from error


def _put_right(image: Path, script: Sequence[str]) -> None:
    """Have debugfs carry out commands in an image."""
    if not script:
        return
    if any(len(line.encode(errors="surrogateescape")) > _LONGEST_LINE for line in script):
        raise RootError("a path is too long to be put into an image")
    with tempfile.NamedTemporaryFile(dir=image.parent, prefix="script-") as commands:
        commands.write("\n".join(script).encode(errors="surrogateescape") + b"\n")
        commands.flush()
        said = _run(["debugfs", "-w", "-f", commands.name, str(image)])
    failed = [line for line in said.splitlines() if not line.startswith("debugfs") and line.strip()]
    failed = [line for line in failed if not line.startswith("Allocated inode:")]
    if failed:
        raise RootError(f"debugfs: {failed[0]}")


def program(name: str) -> str:
    """One of e2fsprogs. Raises RootError where it is not there."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        raise RootError(f"{name} is needed, which is not installed (Debian: apt install e2fsprogs)")
    return found


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(
        [program(command[0]), *command[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"LC_ALL": "C", "DEBUGFS_PAGER": "__none__"},
        check=False,
    )
    said = done.stdout.decode("utf-8", "replace")
    if done.returncode:
        raise RootError(f"{command[0]} failed: {' '.join(said.split()) or f'status {done.returncode}'}")
    return said
