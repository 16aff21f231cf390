"""The images that are kept: by name, those that were asked for; by what they were made of, those of `run --root`.

    images/NAME.img   NAME.json     in $XDG_CACHE_HOME/xenolith
    roots/KEY.img     KEY.json      the last few that were used

An image is complete under its name, or absent.  One that is removed while a guest uses it goes when the guest does.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from xenolith.debian.packages import cache_directory, locked, write_whole
from xenolith.debian.roots import RootError
from xenolith.debian.roots.ext4 import folder_state, image_of_folder, image_of_tree
from xenolith.debian.roots.oci import ContainerImage, ImageConfig
from xenolith.debian.roots.tree import FileTree, decompressed

KEPT_ROOTS: Final = 8
_log: Final = logging.getLogger(__name__)  # what takes seconds is told at the level INFO
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FORMAT: Final = "1"  # of what is kept in roots/; another one is made anew


@dataclass(frozen=True)
class KeptImage:
    """A disk image with a root file system."""

    name: str
    path: Path
    origin: str  # what it was made of, for people
    kernel: str = ""  # whose modules it has
    config: ImageConfig = field(default_factory=ImageConfig)


def images() -> list[KeptImage]:
    """Those with a name, by name."""
    return sorted(_kept_in(_images()), key=lambda image: image.name)


def roots() -> list[KeptImage]:
    """Those of `run --root`, the last used first."""
    return sorted(_kept_in(_roots()), key=lambda image: image.path.stat().st_mtime, reverse=True)


def image(name: str) -> KeptImage | None:
    """The image of this name."""
    return _read(_images(), name) if _NAME.fullmatch(name) else None


def check_name(name: str) -> None:
    """Raises RootError for a name that no image can have, or that one has."""
    if not _NAME.fullmatch(name):
        raise RootError(f"{name!r} cannot name an image: letters, digits and . _ - are for names")
    if image(name) is not None:
        raise RootError(f"there is an image {name} already: `xenolith image rm {name}` removes it")


def remove(name: str) -> None:
    """Raises RootError where there is no such image."""
    for home in (_images(), _roots()):
        if _NAME.fullmatch(name) and _read(home, name) is not None:
            _forget(home, name)
            return
    raise RootError(f"there is no image {name!r}; `xenolith image list` has those there are")


def keep(name: str, origin: str, kernel: str, make: Callable[[Path, Path], None]) -> KeptImage:
    """Make an image of this name: `make` gets an empty folder to work in, and the path of the image to write."""
    with locked(_images()):
        check_name(name)
        return _made(_images(), KeptImage(name, _images() / f"{name}.img", origin, kernel), _without_config(make))


def root_of(path: Path) -> KeptImage:
    """The image of a folder, an archive of a root file system, or a container image; kept for the next time.

    Raises RootError.
    """
    container = ContainerImage.is_one(path)
    key = _key(path)
    with locked(_roots()):
        found = _read(_roots(), key)
        if found is None:
            _log.info("making a root file system of %s", path)
            found = _made(
                _roots(), KeptImage(key, _roots() / f"{key}.img", str(path.absolute())), _maker(path, container)
            )
            _prune()
    with suppress(OSError):
        os.utime(found.path)  # it was used
    return found


def is_archive(path: Path) -> bool:
    """Whether a file is a tar archive, compressed or not; what is none is a disk."""
    try:
        with path.open("rb") as file, tarfile.open(fileobj=decompressed(file), mode="r|") as tar:
            return tar.next() is not None
    except (OSError, tarfile.TarError, EOFError, ValueError):
        return False


Make = Callable[[Path, Path], ImageConfig]


def _without_config(make: Callable[[Path, Path], None]) -> Make:
    def made(work: Path, image: Path) -> ImageConfig:
        make(work, image)
        return ImageConfig()

    return made


def _maker(path: Path, container: bool) -> Make:
    def make(work: Path, image: Path) -> ImageConfig:
        config = ImageConfig()
        if path.is_dir() and not container:
            image_of_folder(path, image)
            return config
        (work / "contents").mkdir()
        tree = FileTree(work / "contents")
        try:
            if container:
                with ContainerImage(path) as source:
                    config = source.unpack(tree)
            else:
                with path.open("rb") as file:
                    tree.add(file)
        except (RootError, OSError) as error:
            raise RootError(f"{path}: {error}") from error
        image_of_tree(tree, image)
        return config

    return make


def _made(home: Path, kept: KeptImage, make: Make) -> KeptImage:
    """The image, complete, with its record written last."""
    with _work_folder(home) as work:
        aside = work / "image"
        config = make(work, aside)
        done = KeptImage(kept.name, kept.path, kept.origin, kept.kernel, config)
        record = {"origin": done.origin, "kernel": done.kernel, "config": asdict(config)}
        os.replace(aside, done.path)
        write_whole(home / f"{done.name}.json", json.dumps(record, indent=1).encode())
    return done


@contextmanager
def _work_folder(home: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=home, prefix="making-", ignore_cleanup_errors=True) as work:
        yield Path(work)


def _read(home: Path, name: str) -> KeptImage | None:
    path = home / f"{name}.img"
    try:
        record = json.loads((home / f"{name}.json").read_text())
        config = ImageConfig(**record["config"])
        found = KeptImage(name, path, str(record["origin"]), str(record["kernel"]), config)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if path.is_file() else None


def _kept_in(home: Path) -> Iterator[KeptImage]:
    for record in home.glob("*.json"):
        found = _read(home, record.stem)
        if found is not None:
            yield found


def _forget(home: Path, name: str) -> None:
    for suffix in ("json", "img"):
        (home / f"{name}.{suffix}").unlink(missing_ok=True)


def _prune() -> None:
    for old in roots()[KEPT_ROOTS:]:
        _forget(_roots(), old.name)


def _images() -> Path:
    return cache_directory() / "images"


def _roots() -> Path:
    return cache_directory() / "roots"


def _key(path: Path) -> str:
    """Another one whenever the source is another."""
    digest = hashlib.sha256(_FORMAT.encode())
    try:
        folder = path.is_dir()
        for line in folder_state(path) if folder else _file_state(path):
            digest.update(line.encode("utf-8", "surrogateescape") + b"\0")
    except OSError as error:
        raise RootError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()[:16]


def _file_state(path: Path) -> Sequence[str]:
    status = path.stat()
    return [f"{path.absolute()} {status.st_dev} {status.st_ino} {status.st_size} {status.st_ctime_ns}"]
