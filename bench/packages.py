"""Debian packages without root: `apt-get download` and `dpkg-deb -x` into the user's cache.

apt checks the signatures as it always does.  A package is fetched once; what is in the cache is used as
it is, so that a second run measures the same programs and needs no network.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path


class PackageError(Exception):
    """A package could not be had; the text says what to do."""


def cache_directory() -> Path:
    """Where the evaluation keeps what it downloads and builds."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(base).resolve() / "xenolith" / "bench"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def unpacked(name: str) -> Path:
    """The file tree of a Debian package, fetched if the cache does not hold it."""
    tree = cache_directory() / "packages" / name
    if not tree.exists():
        _fetch(name, tree)
    return tree


def version(name: str) -> str:
    """The version of a package in the cache."""
    return (unpacked(name) / ".version").read_text().strip()


def dependency(metapackage: str, pattern: str) -> str:
    """The package matching `pattern` that a metapackage depends on now; remembered in the cache."""
    remembered = cache_directory() / "packages" / f"{metapackage}.depends"
    if remembered.exists():
        return remembered.read_text().strip()
    listing = _run("apt-cache", "depends", "--important", metapackage)
    found = re.search(rf"Depends: ({pattern})", listing)
    if not found:
        raise PackageError(f"apt knows no {metapackage} that depends on {pattern}; try `apt-get update`")
    remembered.parent.mkdir(parents=True, exist_ok=True)
    remembered.write_text(found[1])
    return found[1]


def _fetch(name: str, tree: Path) -> None:
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise PackageError(f"package {name} is needed and this is no Debian system: apt-get or dpkg-deb is missing")
    tree.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tree.parent) as scratch:
        # Without the option apt warns, when root runs it, that its own user cannot write here.
        _run("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", name, cwd=scratch)
        (deb,) = Path(scratch).glob("*.deb")
        new = Path(scratch) / "tree"
        _run("dpkg-deb", "-x", str(deb), str(new))
        (new / ".version").write_text(_run("dpkg-deb", "-f", str(deb), "Version"))
        new.rename(tree)


def _run(*command: str, cwd: str | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise PackageError(f"{command[0]} is not installed: Debian's packages cannot be had without it") from error
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        hint = "; try `apt-get update`, or look at the network" if command[0] == "apt-get" else ""
        raise PackageError(f"`{' '.join(command)}` failed: {last[0]}{hint}")
    return done.stdout


def only_file(tree: Path, pattern: str) -> Path:
    """The one file in a package that matches a pattern."""
    found = sorted(path for path in tree.glob(pattern) if path.is_file())
    if len(found) != 1:
        raise PackageError(f"{tree.name} {version(tree.name)} holds {len(found)} files {pattern}, not one")
    return found[0]
