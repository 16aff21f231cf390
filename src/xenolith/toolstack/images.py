"""Images with a Debian in them: made, listed and removed; `xenolith image` (`debian.roots` does the work)."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from xenolith.debian.modules import DEVICE_MODULES, kernel_modules
from xenolith.debian.packages import DEFAULT_KERNEL, GuestUnavailable, obtain
from xenolith.debian.roots import RootError, bootstrap, ext4, store
from xenolith.debian.roots.tree import FileTree
from xenolith.toolstack import guests
from xenolith.toolstack.disk_images import size_in_bytes
from xenolith.toolstack.errors import ToolstackError

MODULES: Final = (*DEVICE_MODULES, "autofs4", "fuse", "loop", "isofs", "tun", "veth", "bridge", "nf_tables", "nft_ct")
LEAST_BYTES: Final = 512 << 20

_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True)
class Image:
    """A root file system that is kept. `name` is what `run --root` and `image rm` know it by."""

    name: str
    path: Path
    origin: str
    kernel: str  # whose modules it has; empty: of none
    size_bytes: int
    used_bytes: int

    def config(self, name: str) -> str:
        """The text of an xl.cfg for a domain that has this image as its disk, and a network. Raises NoGuest."""
        guest = guests.debian(self.kernel or DEFAULT_KERNEL, devices=True)
        lines = replace(guest, arguments=f"{guest.arguments} root=/dev/xvda rw").config(name)
        return f'{lines}disk    = [ "{self.path},raw,xvda,rw" ]\nvif     = [ "" ]\n'


def default_release() -> str:
    """This machine's Debian, or the oldest that has the kernels that are tested here."""
    try:
        about = platform.freedesktop_os_release()
    except OSError:
        about = {}
    return about.get("VERSION_CODENAME", "") if about.get("ID") == "debian" else "bookworm"


def make_debian(
    name: str,
    *,
    release: str = "",
    packages: Sequence[str] = (),
    size: str | None = None,
    kernel: str = DEFAULT_KERNEL,
    mirror: str = "",
    ssh_key: Path | None = None,
) -> Image:
    """Install a Debian into a new image of this name. Takes minutes, and says in the log what it does.

    `size` as "8G"; `ssh_key` is a file of public keys that may log in as root. Raises ToolstackError.
    """
    release = release or default_release()
    size_bytes = None if size is None else size_in_bytes(size)
    if size_bytes is not None and size_bytes < LEAST_BYTES:
        raise ToolstackError(f"{size} is too small for a Debian: it needs at least 512M.")

    def make(work: Path, image: Path) -> None:
        archive = work / "root.tar"
        modules = kernel_modules(obtain(kernel), MODULES, missing_ok=True)
        bootstrap.install(release, packages, modules, mirror, archive, lambda step: _log.info("%s", step))
        _log.info("making the file system")
        (work / "contents").mkdir()
        tree = FileTree(work / "contents")
        with archive.open("rb") as file:
            tree.add(file)
        archive.unlink()
        bootstrap.make_ready(tree, name, keys)
        ext4.image_of_tree(tree, image, size_bytes)

    try:
        store.check_name(name)
        ext4.program("mke2fs")  # to be told now, and not in two minutes
        bootstrap.mmdebstrap()
        keys = "" if ssh_key is None else _public_keys(ssh_key)
        origin = " ".join(["Debian", release, *packages])
        return _image(store.keep(name, origin, kernel, make))
    except (RootError, GuestUnavailable, OSError) as error:
        raise ToolstackError(str(error)) from error


def images() -> list[Image]:
    """Those that have a name, then those that `run --root` keeps for the next time."""
    return [_image(kept) for kept in (*store.images(), *store.roots())]


def remove(name: str) -> None:
    """Raises ToolstackError where there is no such image."""
    try:
        store.remove(name)
    except RootError as error:
        raise ToolstackError(str(error)) from error


def _image(kept: store.KeptImage) -> Image:
    status = os.stat(kept.path)
    return Image(kept.name, kept.path, kept.origin, kept.kernel, status.st_size, status.st_blocks * 512)


def _public_keys(path: Path) -> str:
    text = path.read_text()
    if "PRIVATE KEY" in text or not text.strip():
        raise ToolstackError(f"{path} is no public key: those are in files such as id_ed25519.pub.")
    return text
