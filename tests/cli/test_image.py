"""`xenolith image`: what it lists and removes, and what it says where it cannot work."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from .test_run import xenolith


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one image, as if it had been made."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    home = tmp_path / "xenolith/images"
    home.mkdir(parents=True)
    (home / "web.img").write_bytes(b"x" * 4096)
    os.truncate(home / "web.img", 4 << 20)
    (home / "web.json").write_text('{"origin": "Debian bookworm vim", "kernel": "6.1", "config": {}}')
    return home


def test_images_are_listed_with_what_they_are_made_of_and_removed(cache: Path) -> None:
    listed = xenolith("image", "list").stdout.splitlines()
    assert listed[0].split() == ["NAME", "SIZE", "USED", "MADE", "OF"]
    assert listed[1].split() == ["web", "4M", "0M", "Debian", "bookworm", "vim"]
    [image] = json.loads(xenolith("image", "list", "--json").stdout)
    assert (image["name"], image["path"], image["size_bytes"]) == ("web", str(cache / "web.img"), 4 << 20)
    assert xenolith("image", "rm", "web").returncode == 0
    assert list(cache.glob("web.*")) == []
    again = xenolith("image", "rm", "web")
    assert again.returncode == 1 and "no image 'web'" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["web"], "there is an image web already"),
        (["../x"], "cannot name an image"),
        (["new", "--size", "1M"], "too small for a Debian"),
        (["new", "--size", "big"], "is no size of a disk"),
        (["new"], "apt install mmdebstrap uidmap"),
    ],
)
def test_what_it_needs_is_said_before_anything_is_done(
    cache: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "mke2fs").write_text("#!/bin/sh\n")
    (programs / "mke2fs").chmod(0o755)
    done = xenolith("image", "debian", *arguments, PATH=str(programs))
    assert done.returncode == 1 and said in done.stderr
    assert {path.name for path in cache.iterdir()} <= {"web.img", "web.json", "lock"}
