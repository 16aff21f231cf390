"""Container images: an OCI image layout, as a folder or in a tar archive, and what `docker save` writes.

Of an index the image for linux/amd64 is taken.  What a descriptor names is read only from below `blobs`, or from inside
the archive, and must have the digest that it is named by.  (image-spec: image-layout.md, manifest.md, config.md.)
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final, Self, cast

from xenolith.debian.roots import RootError
from xenolith.debian.roots.tree import FileTree

MAX_JSON: Final = 8 << 20
MAX_LAYERS: Final = 1000
_DIGEST: Final = re.compile(r"sha256:([0-9a-f]{64})")


@dataclass(frozen=True)
class ImageConfig:
    """How a container image says that it is to be run."""

    entrypoint: Sequence[str] = ()
    command: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    directory: str = ""
    user: str = ""


class ContainerImage(AbstractContextManager["ContainerImage"]):
    """A container image, open to be read. Raises RootError."""

    def __init__(self, path: Path) -> None:
        self._path: Final = path
        self._open: Final = ExitStack()
        self._tar: tarfile.TarFile | None = None
        if not path.is_dir():
            try:
                self._tar = self._open.enter_context(tarfile.open(path, errors="surrogateescape"))  # noqa: SIM115
            except (OSError, tarfile.TarError, EOFError) as error:
                raise RootError(f"{path} cannot be read: {error}") from error

    @staticmethod
    def is_one(path: Path) -> bool:
        """Whether there is such an image at this path, and no other folder or archive."""
        if path.is_dir():
            return (path / "oci-layout").is_file() and (path / "index.json").is_file()
        try:
            with tarfile.open(path, errors="surrogateescape") as tar:
                for member in tar:
                    if member.name.removeprefix("./") in ("oci-layout", "index.json", "manifest.json"):
                        return True
                    if not re.match(r"(\./)?(blobs|repositories|[0-9a-f]{64}|[^/]+\.json)|\.$", member.name):
                        return False
        except (OSError, tarfile.TarError, EOFError, ValueError):
            return False
        return False

    def unpack(self, tree: FileTree) -> ImageConfig:
        """Put the image's layers into a tree, the lowest first; how it is to be run."""
        manifest = self._manifest()
        if isinstance(manifest, list):  # docker's own: file names instead of digests
            [chosen] = manifest[:1] or [{}]
            config = self._json(_text(chosen, "Config"))
            layers = [(name, "") for name in _texts(chosen, "Layers")]
        else:
            config = self._json(*_blob(manifest.get("config")))
            layers = [_blob(layer) for layer in _items(manifest, "layers")]
        if not 0 < len(layers) <= MAX_LAYERS:
            raise RootError(f"{self._path} has {len(layers)} layers")
        for name, digest in layers:
            with self._member(name) as file:
                checked = _Checked(file)
                tree.add(cast(IO[bytes], checked), layer=True)
                checked.finish(name, digest)
        return _config(config)

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _manifest(self) -> Any:
        if self._exists("index.json"):
            document = self._json("index.json")
            for _ in range(4):  # an index may be of indices
                if "manifests" not in document:
                    return document
                document = self._json(*_blob(_for_this_machine(_items(document, "manifests"))))
        if self._exists("manifest.json"):
            return self._json("manifest.json")
        raise RootError(f"{self._path} has no manifest of a container image")

    def _exists(self, name: str) -> bool:
        if self._tar is None:
            return (self._path / name).is_file()
        return any(member.name.removeprefix("./") == name for member in self._tar)

    def _member(self, name: str) -> IO[bytes]:
        """A file of the layout, of a name that was checked or is looked for in the archive alone."""
        try:
            if self._tar is None:
                return (self._path / name).open("rb")
            for candidate in (name, f"./{name}"):
                try:
                    file = self._tar.extractfile(candidate)
                except KeyError:
                    continue
                if file is not None:
                    return file
        except (OSError, tarfile.TarError) as error:
            raise RootError(f"{self._path}: {name} cannot be read: {error}") from error
        raise RootError(f"{self._path} has no {name}")

    def _json(self, name: str, digest: str = "") -> Any:
        with self._member(name) as file:
            data = file.read(MAX_JSON)
        if digest and hashlib.sha256(data).hexdigest() != digest:
            raise RootError(f"{self._path}: {name} is damaged")
        try:
            document = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise RootError(f"{self._path}: {name} is no JSON") from error
        if not isinstance(document, dict | list):
            raise RootError(f"{self._path}: {name} says nothing")
        return document


class _Checked:
    """A file that is hashed while it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file: Final = file
        self._hash: Final = hashlib.sha256()
        self._ahead = b""

    def peek(self, size: int) -> bytes:
        if not self._ahead:
            self._ahead = self._file.read(max(size, 64))
            self._hash.update(self._ahead)
        return self._ahead

    def read(self, size: int = -1) -> bytes:
        if self._ahead:
            taken = self._ahead if size < 0 else self._ahead[:size]
            self._ahead = self._ahead[len(taken) :]
            return taken if size >= 0 else taken + self.read()
        data = self._file.read(size)
        self._hash.update(data)
        return data

    def finish(self, name: str, digest: str) -> None:
        """Raises RootError where it was not what the digest says."""
        while self.read(1 << 20):
            pass
        if digest and self._hash.hexdigest() != digest:
            raise RootError(f"the layer {name} is damaged: its digest is another")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _blob(descriptor: object) -> tuple[str, str]:
    """Where a descriptor's blob is, and its digest. Raises RootError."""
    digest = _DIGEST.fullmatch(_text(descriptor, "digest"))
    if digest is None:
        raise RootError("a descriptor has no sha256 digest")
    return f"blobs/sha256/{digest[1]}", digest[1]


def _for_this_machine(manifests: Sequence[object]) -> object:
    for manifest in manifests:
        platform = manifest.get("platform") if isinstance(manifest, dict) else None
        if platform is None or (platform.get("os"), platform.get("architecture")) == ("linux", "amd64"):
            return manifest
    raise RootError("the image is for other machines than linux/amd64")


def _config(document: Any) -> ImageConfig:
    inner = document.get("config") if isinstance(document, dict) else None
    inner = inner if isinstance(inner, dict) else {}
    pairs = [variable.partition("=") for variable in _texts(inner, "Env")]
    return ImageConfig(
        entrypoint=_texts(inner, "Entrypoint"),
        command=_texts(inner, "Cmd"),
        environment={name: value for name, _, value in pairs},
        directory=_text(inner, "WorkingDir"),
        user=_text(inner, "User"),
    )


def _text(document: object, key: str) -> str:
    value = document.get(key) if isinstance(document, dict) else None
    return value if isinstance(value, str) else ""


def _items(document: object, key: str) -> list[object]:
    value = document.get(key) if isinstance(document, dict) else None
    return value if isinstance(value, list) else []


def _texts(document: object, key: str) -> list[str]:
    return [item for item in _items(document, key) if isinstance(item, str)]
