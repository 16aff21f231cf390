"""A Debian guest is found in the cache or got from apt; otherwise the user hears what to do.

apt is replaced by a program of ours on PATH that serves a directory of packages, so these tests need no network and
no Debian, and show what is asked of apt. That the real apt answers is for the tests that boot the real kernel.
"""

from __future__ import annotations

import gzip
import io
import lzma
import os
import re
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import zstandard
from click.testing import CliRunner

from kernels import bzimage, linux
from xenolith.cli.guest import guest
from xenolith.debian.initramfs import Node
from xenolith.debian.modules import kernel_modules
from xenolith.debian.packages import Apt, GuestUnavailable, Package, cache_directory, file_of_deb, obtain, refresh
from xenolith.dom0.image import load_image
from xenolith.toolstack.config.cpus import HostTopology
from xenolith.toolstack.config.reader import parse_domain_config

# Serves $FAKE/lists (stanzas by package) and $FAKE/pool (files); each call is logged. With -c (private lists) it
# serves $FAKE/fresh instead of $FAKE/lists, once `update` has put them there; $FAKE/SUITE if the configuration has
# sources of its own. $FAKE/targets is what the system's sources offer.
_FAKE_APT = r"""#!/bin/sh
echo "$(basename "$0") $*" >> "$FAKE/log"
lists="$FAKE/lists"
[ "$1" = -c ] && {
    conf="$2"; lists="$FAKE/fresh"; shift 2
    sources=$(sed -n 's/^Dir::Etc::sourcelist "\(.*\)";/\1/p' "$conf")
    [ "$sources" ] && lists="$FAKE/$(sed -n '/^Suites: /{s///p;q}' "$sources")"
}
[ "$1" = -q ] && shift
case "$1" in
update)
    [ -e "$FAKE/offline" ] && { echo "W: Failed to fetch the lists, no network" >&2; exit 0; }
    state=$(sed -n 's/^Dir::State::lists "\(.*\)";/\1/p' "$conf")
    touch "$state/archive_Packages" ;;
indextargets) cat "$FAKE/targets" 2>/dev/null ;;
pkgnames) ls "$lists" | grep "^$2" ;;
show) shift 2; for name; do cat "$lists/$name" 2>/dev/null; done ;;
download)
    [ -e "$FAKE/offline" ] && { echo "E: no network" >&2; exit 100; }
    cp "$FAKE/pool/$2.deb" . || { echo "E: 404 not found" >&2; exit 100; } ;;
-W) cat "$FAKE/installed/$4" 2>/dev/null ;;
-L) cat "$FAKE/installed/$2.files" 2>/dev/null ;;
esac
"""


@dataclass
class Archive:
    """A Debian archive to be served by the fake apt."""

    root: Path

    def publish(
        self, name: str, version: str, files: dict[str, bytes], *, depends: str = "", to: str = "lists"
    ) -> None:
        stanza = (
            f"Package: {name}\nVersion: {version}\nArchitecture: amd64\nDepends: {depends}\nFilename: pool/x.deb\n\n"
        )
        (self.root / to / name).write_text(stanza)
        (self.root / "pool" / f"{name}={version}.deb").write_bytes(deb(files))

    def calls(self) -> list[str]:
        log = self.root / "log"
        return log.read_text().splitlines() if log.exists() else []


def deb(files: dict[str, bytes], *, compress: Callable[[bytes], bytes] = lzma.compress, suffix: str = ".xz") -> bytes:
    """A package by deb(5): an ar archive of three members."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    result = b"!<arch>\n"
    for name, data in (
        ("debian-binary", b"2.0\n"),
        ("control.tar.xz", lzma.compress(b"odd")),
        ("data.tar" + suffix, compress(tar.getvalue())),
    ):
        result += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
        )
    return result


_BUSYBOX = b"#!/bin/sh\necho bin/busybox bin/sh\n"


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    root = tmp_path / "archive"
    for directory in ("bin", "lists", "fresh", "pool", "installed"):
        (root / directory).mkdir(parents=True)
    for program in ("apt-get", "apt-cache", "dpkg-query"):
        (root / "bin" / program).write_text(_FAKE_APT)
        (root / "bin" / program).chmod(0o755)
    monkeypatch.setenv("FAKE", str(root))
    monkeypatch.setenv("PATH", f"{root / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    served = Archive(root)
    served.publish("busybox-static", "1:1.35", {"./bin/busybox": _BUSYBOX})
    served.publish("linux-image-amd64", "6.1.9-2", {}, depends="linux-image-6.1.0-9-amd64 (= 6.1.9-2), x")
    for name, version in (
        ("linux-image-6.1.0-9-amd64", "6.1.9-2"),
        ("linux-image-6.1.0-10-amd64", "6.1.10-1"),
        ("linux-image-6.1.0-11-rt-amd64", "6.1.11-1"),
        ("linux-image-6.1.0-11-amd64-dbg", "6.1.11-1"),
        ("linux-image-6.1.0-10-cloud-amd64", "6.1.10-1"),
        ("linux-image-6.12.9+deb12-amd64", "6.12.9-1~deb12u1"),
        ("linux-image-6.12-amd64", "6.12.9-1~deb12u1"),
    ):
        kernel = bzimage(lzma.compress(linux(guest_version=name)))
        served.publish(name, version, {"./boot/config-6": b"", f"./boot/vmlinuz-{name[12:]}": kernel})
    return served


@pytest.mark.parametrize(
    ("query", "package"),
    [
        ("linux-image-amd64", "linux-image-6.1.0-9-amd64"),
        ("linux-image-6.1.0-9-amd64", "linux-image-6.1.0-9-amd64"),
        ("6.1", "linux-image-6.1.0-10-amd64"),
        ("6.1-cloud", "linux-image-6.1.0-10-cloud-amd64"),
        ("6.12", "linux-image-6.12.9+deb12-amd64"),
    ],
)
def test_a_query_gives_the_kernel_it_stands_for(archive: Archive, query: str, package: str) -> None:
    found = obtain(query)
    assert found.package == package
    assert load_image(found.kernel).guest_version == package
    assert load_image(found.elf) == load_image(found.kernel)
    assert found.elf.read_bytes() == linux(guest_version=package)
    assert found.busybox.read_bytes() == _BUSYBOX
    assert os.access(found.busybox, os.X_OK)


def test_a_second_run_does_not_ask_apt(archive: Archive) -> None:
    first, asked = obtain(), archive.calls()
    assert obtain() == first
    assert archive.calls() == asked


def test_runs_at_the_same_time_fetch_once_and_agree(archive: Archive) -> None:
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: obtain(), range(4)))
    assert len(set(found)) == 1
    assert sum(" download linux-image" in call for call in archive.calls()) == 1


def test_a_damaged_record_or_a_removed_file_is_fetched_again(archive: Archive) -> None:
    found = obtain()
    found.kernel.unlink()
    assert obtain().kernel.is_file()
    (cache_directory() / "debian" / "linux-image-amd64.json").write_text("{")
    assert obtain() == found


def test_without_the_systems_lists_our_own_are_fetched(archive: Archive) -> None:
    for name in (archive.root / "lists").iterdir():
        name.rename(archive.root / "fresh" / name.name)
    assert obtain().package == "linux-image-6.1.0-9-amd64"
    conf = (cache_directory() / "apt/apt.conf").read_text()
    assert f'Dir::State::lists "{cache_directory()}/apt/state/lists";' in conf
    assert "#clear APT::Update::Post-Invoke;" in conf


def test_lists_that_the_archive_has_outgrown_are_fetched_anew(archive: Archive) -> None:
    (archive.root / "pool/linux-image-6.1.0-9-amd64=6.1.9-2.deb").unlink()
    with pytest.raises(GuestUnavailable, match=r"could not download linux-image-6.1.0-9-amd64 .* 404"):
        obtain()
    assert any(" update" in call for call in archive.calls())


def test_refresh_takes_a_newer_kernel(archive: Archive) -> None:
    assert obtain("6.1").package == "linux-image-6.1.0-10-amd64"
    for name in (archive.root / "lists").iterdir():
        name.rename(archive.root / "fresh" / name.name)
    kernel = {"./boot/vmlinuz-6.1.0-12-amd64": bzimage(lzma.compress(linux()))}
    archive.publish("linux-image-6.1.0-12-amd64", "6.1.12-1", kernel, to="fresh")
    assert obtain("6.1").package == "linux-image-6.1.0-10-amd64"
    assert refresh("6.1").package == "linux-image-6.1.0-12-amd64"
    assert obtain("6.1").package == "linux-image-6.1.0-12-amd64"


def test_a_file_of_an_installed_package_is_taken_only_at_the_version_wanted(archive: Archive, tmp_path: Path) -> None:
    (tmp_path / "busybox").write_bytes(_BUSYBOX)
    (archive.root / "installed/busybox-static").write_text("ii 1:1.35")
    (archive.root / "installed/busybox-static.files").write_text(f"/.\n{tmp_path}/absent\n{tmp_path}/busybox\n")
    apt, wanted = Apt(tmp_path), re.compile(r".*/busybox")
    assert apt.installed_file(Package("busybox-static", "1:1.35", ""), wanted) == _BUSYBOX
    assert apt.installed_file(Package("busybox-static", "1:1.36", ""), wanted) is None
    assert apt.installed_file(Package("linux-image-amd64", "1:1.35", ""), wanted) is None


_TARGETS = """\
Component: main
Release: bookworm
Site: http://mirror.example/debian
Sourcesentry: {0}/debian.sources:1

Component: main
Release: bookworm-security
Site: http://mirror.example/security
Sourcesentry: {0}/more.list:3

Component: main
Release: bookworm-updates
Site: http://mirror.example/debian
Sourcesentry: {0}/debian.sources:1

Component: main
Release: nodistro
Site: http://elsewhere.example/x
Sourcesentry: {0}/debian.sources:9
"""
_SOURCES = """\
Types: deb
URIs: http://elsewhere.example/x
Signed-By: /elsewhere.gpg

Types: deb
URIs: http://mirror.example/debian
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mQINB
"""


@pytest.fixture
def sid(archive: Archive) -> Archive:
    """A suite where a kernel's package is divided, as Debian does since 7.1."""
    release = "7.2.13+deb14-amd64"
    (archive.root / "sid").mkdir()
    (archive.root / "targets").write_text(_TARGETS.format(archive.root))
    (archive.root / "debian.sources").write_text(_SOURCES)
    (archive.root / "more.list").write_text("deb [arch=amd64 signed-by=/s.gpg] http://mirror.example/security x main\n")
    parts = f"linux-base-{release} (= 7), linux-binary-{release} (= 7), linux-modules-{release} (= 7)"
    archive.publish("linux-image-amd64", "7", {}, depends=f"linux-image-{release} (= 7)", to="sid")
    archive.publish(f"linux-image-{release}", "7", {}, depends=parts, to="sid")
    at = f"./usr/lib/modules/{release}"
    kernel = bzimage(lzma.compress(linux(guest_version="seven")))
    archive.publish(f"linux-binary-{release}", "7", {f"{at}/vmlinuz": kernel}, to="sid")
    archive.publish(f"linux-base-{release}", "7", {f"{at}/modules.builtin": b"kernel/fs/fuse/fuse.ko\n"}, to="sid")
    modules = {
        "lib/crc32c-fast": b"\0license=GPL\0alias=crypto-crc32c\0depends=\0",
        "fs/jbd2/jbd2": b"softdep=pre: crypto-crc32c post: never\0depends=\0",
        "fs/ext4/ext4": b"alias=fs-ext4\0depends=jbd2,mb-cache\0",
        "fs/mb_cache": b"depends=\0",
        "drivers/net/ethernet/card": b"depends=\0",
    }
    packed = {f"{at}/kernel/{name}.ko.xz": lzma.compress(b"\x7fELF\0" + data) for name, data in modules.items()}
    archive.publish(f"linux-modules-{release}", "7", packed, to="sid")
    return archive


def test_a_suite_gives_its_newest_kernel_from_the_systems_mirror_with_the_systems_keys(sid: Archive) -> None:
    found = obtain("sid")
    assert (found.package, found.suite) == ("linux-image-7.2.13+deb14-amd64", "sid")
    assert load_image(found.kernel).guest_version == "seven"
    assert found.busybox.read_bytes() == _BUSYBOX, "busybox is the machine's own suite's"
    sources = (cache_directory() / "apt-sid/suite.sources").read_text()
    assert sources == (
        "Types: deb\nURIs: http://mirror.example/debian\nSuites: sid\nComponents: main\nArchitectures: amd64\n"
        "Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mQINB\n"
    )


def test_a_stable_suite_comes_with_its_security_updates(sid: Archive) -> None:
    (sid.root / "sid").rename(sid.root / "trixie")
    assert obtain("trixie").suite == "trixie"
    sources = (cache_directory() / "apt-trixie/suite.sources").read_text()
    assert "URIs: http://mirror.example/security\nSuites: trixie-security\n" in sources
    assert sources.endswith("Signed-By: /s.gpg\n")


def test_a_machine_that_is_not_debians_has_no_other_suites(archive: Archive) -> None:
    with pytest.raises(GuestUnavailable, match="name no suite of Debian's"):
        obtain("sid")


def test_modules_come_with_those_they_need_and_the_tables_of_modprobe(sid: Archive) -> None:
    nodes = {node.path.removeprefix("lib/modules/7.2.13+deb14-amd64/"): node.data for node in _modules("sid", "ext4")}
    assert [name for name in nodes if name.endswith(".ko")] == [
        "kernel/lib/crc32c-fast.ko",
        "kernel/fs/jbd2/jbd2.ko",
        "kernel/fs/mb_cache.ko",
        "kernel/fs/ext4/ext4.ko",
    ]
    assert nodes["kernel/fs/ext4/ext4.ko"].startswith(b"\x7fELF"), "as insmod takes it"
    needed = dict(line.split(b":") for line in nodes["modules.dep"].splitlines())
    assert set(needed[b"kernel/fs/ext4/ext4.ko"].split()) == {b"kernel/fs/jbd2/jbd2.ko", b"kernel/fs/mb_cache.ko"}
    assert b"alias fs-ext4 ext4\n" in nodes["modules.alias"]
    assert nodes["modules.softdep"] == b"softdep jbd2 pre: crypto-crc32c\n"


def test_modules_are_taken_from_the_package_once_and_a_builtin_is_none(sid: Archive) -> None:
    first = _modules("sid", "ext4", "fuse")
    asked = sid.calls()
    assert _modules("sid", "fuse", "ext4") == first
    assert sid.calls() == asked


def test_a_module_that_a_kernel_does_not_have_is_said(sid: Archive) -> None:
    with pytest.raises(GuestUnavailable, match=r"linux-image-7.* has no module wrong_name"):
        _modules("sid", "wrong-name")
    with pytest.raises(GuestUnavailable, match="has no module card"):
        _modules("sid", "card")


def test_modules_of_another_version_are_not_taken_for_the_kernels(sid: Archive) -> None:
    guest = obtain("sid")
    sid.publish("linux-image-7.2.13+deb14-amd64", "8", {}, to="sid")
    with pytest.raises(GuestUnavailable, match="--update"):
        kernel_modules(guest, ["ext4"])


def _modules(kernel: str, *names: str) -> list[Node]:
    return kernel_modules(obtain(kernel), names)


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("5.99", "offer no kernel 5.99"),
        ("linux-image-none", "offer no package linux-image-none"),
        ("busybox-static", "has no file"),
        ("../../etc", "not a kernel version"),
        ("-o Foo", "not a kernel version"),
    ],
)
def test_what_apt_does_not_have_is_said(archive: Archive, query: str, reason: str) -> None:
    with pytest.raises(GuestUnavailable, match=reason):
        obtain(query)


def test_without_a_network_the_user_hears_what_to_install_or_pass(archive: Archive) -> None:
    (archive.root / "offline").touch()
    with pytest.raises(GuestUnavailable, match=r"no network.*install .*busybox-static.* --kernel"):
        obtain()


def test_without_apt_the_user_hears_what_to_pass(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GuestUnavailable, match=r"no apt-get .*--kernel"):
        obtain()


def test_a_package_that_is_not_for_xen_is_refused_and_leaves_nothing_half_done(archive: Archive) -> None:
    archive.publish("linux-image-odd", "1", {"./boot/vmlinuz-1": bzimage(bytes(9))})
    with pytest.raises(GuestUnavailable, match="unknown method"):
        obtain("linux-image-odd")
    assert not list((cache_directory() / "debian").glob("linux-image-odd*/vmlinux*[!z]"))
    assert not list((cache_directory() / "debian").glob("download-*"))


def test_the_command_prints_paths_and_makes_an_initramfs(archive: Archive) -> None:
    result = CliRunner().invoke(guest, ["debian", "--kernel-version", "6.12"])
    assert result.exit_code == 0, result.output
    paths = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert paths["package"] == "linux-image-6.12.9+deb12-amd64"
    assert Path(paths["initramfs"]).read_bytes().startswith(b"070701")


def test_the_command_writes_a_configuration_and_replaces_none(archive: Archive, tmp_path: Path) -> None:
    file = tmp_path / "web.cfg"
    line = ["debian", "--kernel-version", "6.12", "--cfg", str(file)]
    assert CliRunner().invoke(guest, line).exit_code == 0
    config, _ = parse_domain_config(file.read_text(), str(file), HostTopology.of_this_machine())
    assert config.name == "web"
    assert Path(config.kernel or "").read_bytes() == linux(guest_version="linux-image-6.12.9+deb12-amd64")
    assert "console=hvc0" in (config.cmdline or "")
    before = file.read_text()
    again = CliRunner().invoke(guest, line)
    assert (again.exit_code, file.read_text()) == (1, before)
    assert "exists already" in again.output


def test_the_command_fails_with_the_reason_alone(archive: Archive) -> None:
    result = CliRunner().invoke(guest, ["debian", "--kernel-version", "5.99"])
    assert result.exit_code == 1
    assert "Error: apt's sources" in result.output


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".xz", lzma.compress), (".gz", gzip.compress), (".zst", zstandard.ZstdCompressor().compress), ("", bytes)],
)
def test_a_package_of_each_compression_is_opened(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    package = tmp_path / "x.deb"
    package.write_bytes(deb({"./a": b"1", "./b": b"22"}, compress=compress, suffix=suffix))
    assert file_of_deb(package, re.compile(r"\./b")) == b"22"


@pytest.mark.parametrize("content", [b"", b"no package", b"!<arch>\n", deb({"./b": b"x"})[:250], deb({})])
def test_a_damaged_package_is_refused(tmp_path: Path, content: bytes) -> None:
    package = tmp_path / "x.deb"
    package.write_bytes(content)
    with pytest.raises(GuestUnavailable, match=r"x\.deb"):
        file_of_deb(package, re.compile(r"\./b"))
