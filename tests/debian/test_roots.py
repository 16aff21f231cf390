"""Root file systems for guests: what archives become, hostile ones too, and what is in the image that is made."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from xenolith.debian.roots import RootError, store
from xenolith.debian.roots.bootstrap import install, make_ready
from xenolith.debian.roots.ext4 import image_of_folder, image_of_tree
from xenolith.debian.roots.oci import ContainerImage
from xenolith.debian.roots.tree import FileTree, Inode

_SBIN = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
needs_e2fsprogs = pytest.mark.skipif(
    shutil.which("mke2fs", path=_SBIN) is None, reason="needs mke2fs and debugfs (Debian: e2fsprogs)"
)


def member(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def directory(name: str, **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, type=tarfile.DIRTYPE, **{"mode": 0o755, **fields})


def link(name: str, target: str, hard: bool = False) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, type=tarfile.LNKTYPE if hard else tarfile.SYMTYPE, linkname=target)


def archive(*members: tuple[tarfile.TarInfo, bytes], mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, format=tarfile.PAX_FORMAT) as tar:  # type: ignore[call-overload]
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture
def tree(tmp_path: Path) -> FileTree:
    (tmp_path / "contents").mkdir()
    return FileTree(tmp_path / "contents")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "xenolith"


def data(tree: FileTree, path: str) -> bytes:
    found = tree.find(path)
    assert found is not None and found.content is not None, f"no file {path}"
    return found.content.read_bytes()


def names(tree: FileTree) -> set[str]:
    return {path for path, _ in tree.walk() if path}


def image_says(image: Path, command: str) -> str:
    debugfs = shutil.which("debugfs", path=_SBIN)
    assert debugfs
    return subprocess.run([debugfs, "-R", command, image], capture_output=True, text=True, check=True).stdout


def is_clean(image: Path) -> bool:
    fsck = shutil.which("e2fsck", path=_SBIN)
    assert fsck
    return subprocess.run([fsck, "-fn", image], capture_output=True, check=False).returncode == 0


# --- layers ---------------------------------------------------------------------------------------------------


def test_a_later_layer_replaces_hides_and_empties(tree: FileTree) -> None:
    tree.add(
        io.BytesIO(
            archive(
                *map(directory, ("etc", "gone", "emptied", "emptied/sub")),
                *(member(name, b"1") for name in ("etc/kept", "etc/changed", "etc/dropped", "gone/x")),
                *(member(name, b"1") for name in ("emptied/old", "emptied/sub/old")),
            )
        ),
        layer=True,
    )
    tree.add(
        io.BytesIO(
            archive(
                *(member("emptied/new", b"2"), member("emptied/.wh..wh..opq"), member("emptied/sub/new", b"2")),
                *(member("etc/changed", b"2"), member("etc/.wh.dropped"), member(".wh.gone")),
            )
        ),
        layer=True,
    )
    files = {"/etc/kept", "/etc/changed", "/emptied/new", "/emptied/sub/new"}
    assert names(tree) == files | {"/etc", "/emptied", "/emptied/sub"}
    assert data(tree, "/etc/changed") == b"2" and data(tree, "/etc/kept") == b"1"


def test_a_whiteout_is_a_file_like_others_in_a_plain_archive(tree: FileTree) -> None:
    tree.add(io.BytesIO(archive(member("a", b"1"), member(".wh.a", b"2"))))
    assert names(tree) == {"/a", "/.wh.a"}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
def test_archives_may_be_compressed(tree: FileTree, mode: str) -> None:
    tree.add(io.BytesIO(archive(member("a", b"text"), mode=mode)))
    assert data(tree, "/a") == b"text"


def test_a_directory_that_is_a_link_leads_where_it_leads_inside(tree: FileTree) -> None:
    """As on a system with a merged /usr; and there is nothing above the root."""
    tree.add(
        io.BytesIO(
            archive(
                *(directory("usr"), directory("usr/lib"), link("lib", "usr/lib"), link("up", "../../../..")),
                *(link("absolute", "/usr"), directory("lib"), member("lib/a", b"1")),
                *(member("up/b", b"2"), member("absolute/c", b"3")),
            )
        )
    )
    assert data(tree, "/usr/lib/a") == b"1" and data(tree, "/b") == b"2" and data(tree, "/usr/c") == b"3"


# --- hostile archives -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "members",
    [
        [member("../escaped", b"x")],
        [member("a/../../escaped", b"x")],
        [member("/../escaped", b"x")],
        [link("hard", "../outside", hard=True)],
        [link("hard", "/etc/passwd", hard=True)],
        [directory("d"), link("hard", "d", hard=True)],
        [link("loop", "loop"), member("loop/x", b"x")],
        [member("file", b"x"), member("file/under", b"x")],
        [member("a\nb", b"x")],
        [member("/".join(["d"] * 500), b"x")],
        [member("x" * 300, b"x")],
        [link("nowhere", "")],
        [member("odd", type=b"Z")],
    ],
    ids=lambda members: repr(members[-1][0].name[:20]),
)
def test_an_archive_that_leads_elsewhere_is_refused(
    tree: FileTree, tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]]
) -> None:
    before = {path for path in tmp_path.rglob("*") if path.parent.name != "contents"}
    with pytest.raises(RootError):
        tree.add(io.BytesIO(archive(*members)))
    assert {path for path in tmp_path.rglob("*") if path.parent.name != "contents"} == before


@pytest.mark.parametrize("noise", [b"", b"no archive at all", os.urandom(2048), b"\x1f\x8b broken", b"\0" * 100])
def test_what_is_no_archive_is_refused_or_empty(tree: FileTree, noise: bytes) -> None:
    try:
        tree.add(io.BytesIO(noise))
    except RootError as error:
        assert "tar archive" in str(error)
    assert names(tree) == set()


def test_an_archive_that_ends_early_is_refused(tree: FileTree) -> None:
    with pytest.raises(RootError):
        tree.add(io.BytesIO(archive(member("a", bytes(5000)))[:2000]))


@needs_e2fsprogs
def test_links_out_of_the_archive_are_no_way_out_for_what_comes_behind_them(tree: FileTree, tmp_path: Path) -> None:
    """`etc -> /tmp/...` and then `etc/passwd`: written inside the image, never on this host."""
    victim = tmp_path / "victim"
    victim.mkdir()
    tree.add(io.BytesIO(archive(link("etc", str(victim)), member("etc/owned", b"x"), link("also", f"{victim}/f"))))
    image_of_tree(tree, tmp_path / "image")
    assert list(victim.iterdir()) == []
    assert "owned" in image_says(tmp_path / "image", f"ls -p {victim}")
    assert is_clean(tmp_path / "image")


# --- images -----------------------------------------------------------------------------------------------------


@needs_e2fsprogs
def test_an_image_has_owners_modes_devices_attributes_and_hard_links(tree: FileTree, tmp_path: Path) -> None:
    tree.add(
        io.BytesIO(
            archive(
                *(directory("./", mode=0o711), directory("./secret", mode=0o500, uid=7, gid=8)),
                member("./secret/file", b"contents", mode=0o004, uid=1000, gid=2000, mtime=1234567890),
                member("./su", b"x", mode=0o4755, uid=0, gid=0),
                member("./null", type=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666, uid=5),
                member("./pipe", type=tarfile.FIFOTYPE, mode=0o600),
                *(link("./first", 'odd "name"'), member('./odd "name"', b"y"), link("./second", "su", hard=True)),
                member("./capable", b"z", pax_headers={"SCHILY.xattr.user.note": "kept"}),
            )
        )
    )
    image = tmp_path / "image"
    image_of_tree(tree, image)
    assert is_clean(image)
    assert stat.S_IMODE(image.stat().st_mode) == 0o600
    assert image_says(image, "cat /secret/file") == "contents"

    def about(path: str) -> list[str]:
        return image_says(image, f'stat "{path}"').split()

    for path, mode, user, group in [
        ("/", "0711", "0", "0"),
        ("/secret", "0500", "7", "8"),
        ("/secret/file", "0004", "1000", "2000"),
        ("/su", "04755", "0", "0"),
        ("/null", "0666", "5", "0"),
    ]:
        words = about(path)
        assert words[words.index("Mode:") + 1] == mode, path
        assert (words[words.index("User:") + 1], words[words.index("Group:") + 1]) == (user, group), path
    assert "(New-style)" not in about("/null") and "character" in about("/null") and "01:03" in about("/null")
    assert "FIFO" in about("/pipe")
    assert "0x499602d2" in " ".join(about("/secret/file"))
    assert 'odd "name"' in image_says(image, "stat /first")
    assert about("/su")[about("/su").index("Links:") + 1] == "2"
    assert "kept" in image_says(image, "ea_list /capable")


@needs_e2fsprogs
def test_what_a_user_owns_is_roots_in_the_image_of_his_folder(tmp_path: Path) -> None:
    folder = tmp_path / "root"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/tool").write_text("#!/bin/sh\n")
    (folder / "bin/link").symlink_to("/etc/passwd")
    image_of_folder(folder, tmp_path / "image")
    words = image_says(tmp_path / "image", "stat /bin/tool").split()
    assert (words[words.index("User:") + 1], words[words.index("Group:") + 1]) == ("0", "0")
    assert "/etc/passwd" in image_says(tmp_path / "image", "stat /bin/link")
    assert is_clean(tmp_path / "image")


def test_a_folder_with_another_file_system_in_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RootError, match="another file system"):
        image_of_folder(Path("/"), tmp_path / "image")


def test_what_is_missing_is_named_with_its_package(
    tree: FileTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(RootError, match="e2fsprogs"):
        image_of_tree(tree, tmp_path / "image")
    with pytest.raises(RootError, match="apt install mmdebstrap"):
        install("bookworm", [], [], "", tmp_path / "tar")


# --- container images ---------------------------------------------------------------------------------------------


def layout(layers: list[bytes], config: dict[str, object]) -> dict[str, bytes]:
    """The files of an OCI image layout."""
    files = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}'}

    def blob(content: bytes) -> dict[str, object]:
        digest = hashlib.sha256(content).hexdigest()
        files[f"blobs/sha256/{digest}"] = content
        return {"digest": f"sha256:{digest}", "size": len(content)}

    manifest = {"config": blob(json.dumps({"config": config}).encode()), "layers": [blob(layer) for layer in layers]}
    ours = blob(json.dumps(manifest).encode()) | {"platform": {"os": "linux", "architecture": "amd64"}}
    other = blob(b"{}") | {"platform": {"os": "linux", "architecture": "arm64"}}
    files["index.json"] = json.dumps({"manifests": [other, ours]}).encode()
    return files


def saved_by_docker(layers: list[bytes], config: dict[str, object]) -> dict[str, bytes]:
    files = {f"{number:064x}/layer.tar": layer for number, layer in enumerate(layers)}
    manifest = [{"Config": "config.json", "RepoTags": ["x:y"], "Layers": list(files)}]
    return {
        **files,
        "config.json": json.dumps({"config": config}).encode(),
        "manifest.json": json.dumps(manifest).encode(),
    }


LAYERS = [archive(member("a", b"1"), member("b", b"1")), archive(member(".wh.a"), member("c", b"2"), mode="w:gz")]
CONFIG: dict[str, object] = {"Env": ["A=1"], "Entrypoint": ["/c"], "Cmd": ["x"], "WorkingDir": "/w", "User": "7"}


@pytest.mark.parametrize("made", [layout, saved_by_docker])
@pytest.mark.parametrize("as_folder", [False, True])
def test_a_container_image_is_its_layers_and_how_it_is_run(
    tree: FileTree, tmp_path: Path, made: Callable[..., dict[str, bytes]], as_folder: bool
) -> None:
    if as_folder and made is saved_by_docker:
        pytest.skip("docker save writes an archive")
    files = made(LAYERS, CONFIG)
    path = write_image(tmp_path, files, as_folder)
    assert ContainerImage.is_one(path)
    with ContainerImage(path) as image:
        config = image.unpack(tree)
    assert names(tree) == {"/b", "/c"}
    assert (config.entrypoint, config.command, config.environment) == (["/c"], ["x"], {"A": "1"})
    assert (config.directory, config.user) == ("/w", "7")


def write_image(where: Path, files: dict[str, bytes], as_folder: bool) -> Path:
    if not as_folder:
        (where / "image.tar").write_bytes(archive(*(member(name, content) for name, content in files.items())))
        return where / "image.tar"
    for name, content in files.items():
        path = where / "image" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return where / "image"


def test_a_layer_that_was_changed_is_refused(tree: FileTree, tmp_path: Path) -> None:
    files = layout(LAYERS, CONFIG)
    [first] = [name for name, content in files.items() if content == LAYERS[0]]
    files[first] = archive(member("a", b"evil"))
    with ContainerImage(write_image(tmp_path, files, False)) as image, pytest.raises(RootError, match="damaged"):
        image.unpack(tree)


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"[]",
        b"{}",
        b'{"manifests": 5}',
        b'{"manifests": [{"digest": "sha256:../../../etc/passwd"}]}',
        b'{"manifests": [{"digest": "sha256:' + b"0" * 64 + b'"}]}',
        b'{"manifests": [{"platform": {"os": "linux", "architecture": "arm64"}}]}',
        b"[" * 100000,
    ],
    ids=range(8),
)
def test_an_index_that_makes_no_sense_is_refused(tree: FileTree, tmp_path: Path, index: bytes) -> None:
    files = {"oci-layout": b"{}", "index.json": index}
    with ContainerImage(write_image(tmp_path, files, True)) as image, pytest.raises(RootError):
        image.unpack(tree)


def test_a_tarball_and_a_disk_are_no_container_images(tmp_path: Path) -> None:
    (tmp_path / "root.tar").write_bytes(archive(directory("./"), member("./etc/passwd", b"x")))
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    assert not ContainerImage.is_one(tmp_path / "root.tar") and store.is_archive(tmp_path / "root.tar")
    assert not ContainerImage.is_one(tmp_path / "disk") and not store.is_archive(tmp_path / "disk")


# --- what is kept -------------------------------------------------------------------------------------------------


@needs_e2fsprogs
def test_a_root_is_made_once_and_anew_when_its_source_changes(cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "root"
    folder.mkdir()
    (folder / "a").write_text("1")
    first = store.root_of(folder)
    assert store.root_of(folder).path == first.path
    (folder / "a").write_text("22")
    second = store.root_of(folder)
    assert second.path != first.path and image_says(second.path, "cat /a") == "22"
    assert {kept.name for kept in store.roots()} == {first.name, second.name}
    store.remove(first.name)
    assert [kept.name for kept in store.roots()] == [second.name]
    assert not first.path.exists()


@needs_e2fsprogs
def test_only_the_last_few_roots_are_kept(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "KEPT_ROOTS", 2)
    made = []
    for number in range(4):
        (tmp_path / f"{number}.tar").write_bytes(archive(member(f"file{number}", b"x")))
        made.append(store.root_of(tmp_path / f"{number}.tar"))
        os.utime(made[-1].path, (number, number))
    assert len(store.roots()) == 2 and made[3].name in {kept.name for kept in store.roots()}
    assert len(list((cache / "roots").glob("*.img"))) == 2


@needs_e2fsprogs
def test_a_failure_leaves_nothing_behind(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_bytes(archive(member("a", b"x"), member("../b", b"x")))
    with pytest.raises(RootError, match=r"bad\.tar"):
        store.root_of(tmp_path / "bad.tar")

    def fails(work: Path, image: Path) -> None:
        image.write_bytes(b"half")
        raise RootError("no")

    with pytest.raises(RootError, match="no"):
        store.keep("name", "", "", fails)
    assert {path.name for path in cache.rglob("*") if path.is_file()} == {"lock"}
    assert store.images() == [] and store.image("name") is None


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a" * 65, "a b"])
def test_an_image_has_a_name_that_is_no_path(cache: Path, name: str) -> None:
    with pytest.raises(RootError):
        store.check_name(name)
    with pytest.raises(RootError):
        store.remove(name)
    assert store.image(name) is None


def test_a_debian_is_made_ready_to_be_a_guest(tree: FileTree) -> None:
    tree.add(io.BytesIO(archive(member("etc/shadow", b"root:*:1:0:::::\nbin:*:1:::::\n", mode=0o640, gid=42))))
    make_ready(tree, "web", "ssh-ed25519 AAAA me\n")
    assert data(tree, "/etc/hostname") == b"web\n"
    assert data(tree, "/etc/shadow").startswith(b"root::1:") and b"\nbin:*:" in data(tree, "/etc/shadow")
    assert data(tree, "/root/.ssh/authorized_keys") == b"ssh-ed25519 AAAA me\n"
    ssh = tree.find("/root/.ssh")
    assert isinstance(ssh, Inode) and stat.S_IMODE(ssh.mode) == 0o700


@pytest.mark.parametrize(("release", "package"), [("book worm", "vim"), ("bookworm", "--help"), ("$(id)", "vim")])
def test_names_for_mmdebstrap_are_names(tmp_path: Path, release: str, package: str) -> None:
    with pytest.raises(RootError, match="not"):
        install(release, [package], [], "", tmp_path / "tar")
