"""One initramfs for every system: our programs, and the Debian programs that the macro workloads use.

`boot_image` holds busybox and /init only; it is what the boot rows boot.  `full_image` holds everything.
Natively the same archive is unpacked into a tmpfs and entered with chroot.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from bench.cpio import Device, File, Link, archive
from bench.packages import PackageError, only_file, unpacked

HERE = Path(__file__).parent
SOURCES = HERE / "workloads"
BUILD = HERE / "build"

PROGRAMS = {
    "lat": ["lat", "measure", "syscalls", "processes", "memory", "files", "ipc", "network", "compute"],
    "repeat": ["repeat", "measure"],
    "httpload": ["httpload", "measure"],
    "hello": ["hello"],
}
CFLAGS = ["-O2", "-static", "-Wall", "-Wextra"]

# What the macro workloads run, and the libraries behind it.
DEBIAN_PROGRAMS = {
    "tcc": ["usr/bin/tcc", "usr/lib/x86_64-linux-gnu/tcc/**/*"],
    "sqlite3": ["usr/bin/sqlite3"],
    "lighttpd": ["usr/sbin/lighttpd", "usr/lib/lighttpd/mod_dirlisting.so", "usr/lib/lighttpd/mod_indexfile.so"],
    "dbench": ["usr/bin/dbench"],
    "libc6-dev": ["usr/include/**/*"],
    "linux-libc-dev": ["usr/include/linux/*", "usr/include/asm-generic/*", "usr/include/x86_64-linux-gnu/asm/*"],
}
DEBIAN_LIBRARIES = [
    "libc6", "libcrypt1", "libnettle8", "libpcre2-8-0", "libpopt0", "libreadline8", "libsqlite3-0", "libtinfo6",
    "libxxhash0", "zlib1g",
]  # fmt: skip
LIBRARY_PATTERNS = ["lib/x86_64-linux-gnu/*.so*", "usr/lib/x86_64-linux-gnu/*.so*", "lib64/*"]

DBENCH_OPERATIONS = 3_000  # of the 458,344 in Debian's load file, so that slow systems get through it too


class BuildError(Exception):
    """The programs could not be built."""


def device_archive() -> bytes:
    """/dev/console and /dev/null, which must exist before devtmpfs is mounted.

    Linux unpacks every archive of a file, busybox's cpio only the first: so this one comes last, and an
    ordinary user can unpack the rest natively.
    """
    return archive(
        {"dev/console": Device(5, 1), "dev/null": Device(1, 3), "proc/.keep": File(b""), "tmp/.keep": File(b"")}
    )


def boot_archive() -> bytes:
    """Busybox and /init."""
    return archive(_busybox() | _guest_files(["init"]))


def full_archive() -> bytes:
    """Everything, without device nodes."""
    return archive(_busybox() | _guest_files(["init", "bench"]) | _programs() | _debian_programs())


def write_images() -> tuple[Path, Path]:
    """Build both initramfs files; returns (boot image, full image)."""
    BUILD.mkdir(exist_ok=True)
    boot, full = BUILD / "boot.cpio", BUILD / "full.cpio"
    boot.write_bytes(boot_archive() + device_archive())
    full.write_bytes(full_archive() + device_archive())
    return boot, full


def busybox() -> Path:
    """Debian's static busybox."""
    return only_file(unpacked("busybox-static"), "bin/busybox")


def _busybox() -> dict[str, File | Link | Device]:
    applets = subprocess.run([busybox(), "--list"], capture_output=True, text=True, check=True).stdout.split()
    links: dict[str, File | Link | Device] = {f"bin/{name}": Link("busybox") for name in applets}
    return links | {"bin/busybox": _file(busybox())}


def _guest_files(names: Iterable[str]) -> dict[str, File | Link | Device]:
    """Scripts and data from workloads/guest."""
    root = SOURCES / "guest"
    return {
        str(path.relative_to(root)): _file(path)
        for name in names
        for path in sorted([root / name, *(root / name).rglob("*")])
        if path.is_file()
    }


def _programs() -> dict[str, File | Link | Device]:
    """Our C programs, built, and their sources, which the macro workloads compile and pack."""
    if not shutil.which("gcc"):
        raise BuildError(
            "gcc is not installed: the evaluation builds its programs with it (apt-get install gcc libc6-dev)"
        )
    BUILD.mkdir(exist_ok=True)
    files: dict[str, File | Link | Device] = {}
    for program, units in PROGRAMS.items():
        output = BUILD / program
        sources = [str(SOURCES / f"{unit}.c") for unit in units]
        done = subprocess.run(
            ["gcc", *CFLAGS, "-o", str(output), *sources], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise BuildError(f"gcc could not build {program}:\n{done.stderr}")
        files[f"bench/{program}"] = _file(output)
    for source in sorted(SOURCES.glob("*.[ch]")):
        files[f"bench/src/{source.name}"] = _file(source)
    return files


def _debian_programs() -> dict[str, File | Link | Device]:
    files: dict[str, File | Link | Device] = {}
    for package, patterns in DEBIAN_PROGRAMS.items():
        files |= _package_files(package, patterns)
    for package in DEBIAN_LIBRARIES:
        files |= _package_files(package, LIBRARY_PATTERNS)
    load = only_file(unpacked("dbench"), "usr/share/dbench/client.txt").read_text()
    files["bench/data/client.txt"] = File(dbench_load(load, DBENCH_OPERATIONS).encode())
    return files


def _package_files(package: str, patterns: Iterable[str]) -> dict[str, File | Link | Device]:
    tree = unpacked(package)
    files: dict[str, File | Link | Device] = {}
    for pattern in patterns:
        found = [path for path in sorted(tree.glob(pattern)) if path.is_symlink() or path.is_file()]
        for path in found:
            name = str(path.relative_to(tree))
            files[name] = Link(os.readlink(path)) if path.is_symlink() else _file(path)
    if not files:
        raise PackageError(f"package {package} holds none of {', '.join(patterns)}: is this Debian 12?")
    return files


def _file(path: Path) -> File:
    return File(path.read_bytes(), executable=os.access(path, os.X_OK))


def dbench_load(load: str, operations: int) -> str:
    """The beginning of a dbench load file, cut where it has closed every file that it opened."""
    open_handles: set[str] = set()
    lines = load.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        words = line.split()
        if line.startswith("NTCreateX") and line.rstrip().endswith("NT_STATUS_OK"):
            open_handles.add(words[-2])
        elif line.startswith("Close"):
            open_handles.discard(words[1])
        if number >= operations and not open_handles:
            return "".join(lines[:number])
    return load
