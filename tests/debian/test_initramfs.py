"""The initramfs is a cpio archive that other programs read, with the user's files as they are on the host."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels import elf, linux, linux_notes
from xenolith.debian.initramfs import (
    Command,
    HostFile,
    InitramfsError,
    Mount,
    Node,
    build_initramfs,
    needed_arguments,
    pack,
)
from xenolith.dom0.image import load_image

_CPIO = ["cpio"] if shutil.which("cpio") else ["busybox", "cpio"] if shutil.which("busybox") else None


def unpack(archive: bytes) -> dict[str, Node]:
    """An independent reader of the newc format, straight from cpio(5)."""
    nodes, at = {}, 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, major, minor, name_size = fields[1], fields[6], fields[9], fields[10], fields[11]
        name = os.fsdecode(archive[at + 110 : at + 110 + name_size - 1])
        assert archive[at + 109 + name_size] == 0
        start = (at + 110 + name_size + 3) & ~3
        if name == "TRAILER!!!":
            return nodes
        assert name not in nodes
        nodes[name] = Node(name, mode, archive[start : start + size], (major, minor))
        at = (start + size + 3) & ~3


@pytest.fixture
def busybox(tmp_path: Path) -> Path:
    """A stand-in that lists its applets as busybox does."""
    program = tmp_path / "busybox"
    program.write_text("#!/bin/sh\nprintf '%s\\n' bin/busybox bin/sh sbin/poweroff usr/bin/env\n")
    program.chmod(0o755)
    return program


_names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=30).filter(
    lambda name: name not in (".", "..", "TRAILER!!!")
)


@given(
    st.lists(
        st.builds(
            Node,
            _names,
            st.sampled_from([0o100644, 0o100755, 0o104755, 0o120777, 0o020600, 0o040700]),
            st.binary(max_size=70),
            st.tuples(st.integers(0, 4095), st.integers(0, 1 << 20)),
        ),
        unique_by=lambda node: node.path,
    )
)
def test_every_node_is_read_back_as_it_was_packed(nodes: list[Node]) -> None:
    assert list(unpack(pack(nodes)).values()) == nodes


@pytest.mark.skipif(_CPIO is None, reason="needs the cpio program, GNU's or busybox's")
def test_the_cpio_program_reads_the_archive(tmp_path: Path, busybox: Path) -> None:
    archive = build_initramfs(busybox, files=[HostFile(busybox, PurePosixPath("/opt/tool/b"))])
    target = tmp_path / "root"
    target.mkdir()
    assert _CPIO is not None
    subprocess.run([*_CPIO, "-idm", "init", "opt/*"], input=archive, cwd=target, check=True)
    assert (target / "opt/tool/b").read_bytes() == busybox.read_bytes()
    assert os.access(target / "init", os.X_OK)


def test_init_finds_busybox_its_links_and_the_device_nodes_it_needs(busybox: Path) -> None:
    nodes = unpack(build_initramfs(busybox))
    assert nodes["bin/busybox"].data == busybox.read_bytes()
    assert nodes["bin/sh"].data == b"/bin/busybox" and stat.S_ISLNK(nodes["bin/sh"].mode)
    assert nodes["dev/console"].device == (5, 1) and stat.S_ISCHR(nodes["dev/console"].mode)
    assert nodes["init"].mode == 0o100755
    assert b"cttyhack" in nodes["init"].data


def test_powering_off_does_not_wait_for_an_init_to_do_it(busybox: Path) -> None:
    """Linux runs these when the toolstack asks for a shutdown; process 1 is a shell that would ignore a signal."""
    nodes = unpack(build_initramfs(busybox))
    for name in ("poweroff", "reboot", "halt"):
        script = nodes[f"sbin/{name}"]
        assert script.mode == 0o100755
        assert script.data.splitlines()[-1] == f'exec /bin/busybox {name} -f "$@"'.encode()


def test_directories_come_before_what_is_in_them(busybox: Path) -> None:
    nodes = list(unpack(build_initramfs(busybox, files=[HostFile(busybox, PurePosixPath("/a/b/c"))])))
    for index, path in enumerate(nodes):
        parent = str(PurePosixPath(path).parent)
        assert parent == "." or parent in nodes[:index]


def test_host_files_keep_their_contents_and_permission_bits(tmp_path: Path, busybox: Path) -> None:
    script = tmp_path / "script"
    script.write_bytes(b"\0\xff data")
    script.chmod(0o751)
    nodes = unpack(build_initramfs(busybox, files=[HostFile.parse(f"{script}:/opt/"), HostFile.parse(str(script))]))
    assert nodes["opt/script"].data == b"\0\xff data"
    assert stat.S_IMODE(nodes["opt/script"].mode) == 0o751
    assert nodes[str(script).lstrip("/")].data == b"\0\xff data"


def test_a_host_directory_is_taken_with_all_below_it_and_its_links(tmp_path: Path, busybox: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub/file").write_text("x")
    (tree / "link").symlink_to("sub/file")
    nodes = unpack(build_initramfs(busybox, files=[HostFile(tree, PurePosixPath("/srv"))]))
    assert nodes["srv/sub/file"].data == b"x"
    assert nodes["srv/link"].data == b"sub/file" and stat.S_ISLNK(nodes["srv/link"].mode)
    assert stat.S_ISDIR(nodes["srv/sub"].mode)


def test_a_host_file_can_replace_one_of_ours(tmp_path: Path, busybox: Path) -> None:
    passwd = tmp_path / "passwd"
    passwd.write_text("root::0:0::/:/bin/sh\n")
    nodes = unpack(build_initramfs(busybox, files=[HostFile(passwd, PurePosixPath("/etc/passwd"))]))
    assert nodes["etc/passwd"].data == b"root::0:0::/:/bin/sh\n"


def test_what_cannot_be_put_into_the_guest_is_said_with_its_name(tmp_path: Path, busybox: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for file in (
        HostFile(tmp_path / "absent", PurePosixPath("/x")),
        HostFile(tmp_path / "pipe", PurePosixPath("/x")),
        HostFile(busybox, PurePosixPath("/etc")),
    ):
        with pytest.raises(InitramfsError, match=r"absent|pipe|/etc"):
            build_initramfs(busybox, files=[file])


def test_disks_to_mount_are_lines_of_an_fstab(busybox: Path) -> None:
    mounts = [Mount("/dev/xvdb", "/srv/my data", "ext4", "ro"), Mount("share", "/mnt", "9p", "trans=xen")]
    nodes = unpack(build_initramfs(busybox, mounts=mounts))
    assert nodes["etc/fstab.disks"].data == (b"/dev/xvdb /srv/my\\040data ext4 ro 0 0\nshare /mnt 9p trans=xen 0 0\n")
    with pytest.raises(InitramfsError, match="fstab"):
        build_initramfs(busybox, mounts=[Mount("/dev/xvdb", "/a\nb")])


def test_an_initcall_that_crashes_on_amd_is_left_out_of_kernels_that_have_it() -> None:
    plain = load_image(linux())
    text = b"6Previous system reset reason [0x%08x]: %s"
    affected = load_image(elf([(0x1000000, text + bytes(64), 0x2000)], linux_notes()))
    assert needed_arguments(plain) == ""
    assert needed_arguments(affected) == "initcall_blacklist=print_s5_reset_status_mmio"


@pytest.mark.parametrize("argument", ["", ":/x", "a:relative", "a:/x/../../y", "a:/dev/x", "a:/proc/"])
def test_a_file_argument_that_names_no_guest_file_is_refused(argument: str) -> None:
    with pytest.raises(InitramfsError, match="--file"):
        HostFile.parse(argument)


def test_a_busybox_that_does_not_run_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "readme"
    text.write_text("not a program")
    text.chmod(0o755)
    with pytest.raises(InitramfsError, match="not a busybox"):
        build_initramfs(text)


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20), max_size=4))
def test_the_shell_in_the_guest_gets_each_argument_unchanged(arguments: list[str]) -> None:
    """Runs the very script that the guest does, with the host's shell."""
    command = Command(["printf", "%s\\0", *arguments], "n", {"A_B": "it's"}, "/")
    nodes = unpack(build_initramfs(Path("/bin/true"), command=command))
    script = nodes["etc/command"].data
    result = subprocess.run(["sh", "-c", script], capture_output=True, check=True, stdin=subprocess.DEVNULL)
    assert result.stdout == b"".join(os.fsencode(argument) + b"\0" for argument in arguments or [""])


@pytest.mark.parametrize(
    "command",
    [
        Command([], "n"),
        Command(["echo", "a\0b"], "n"),
        Command(["env"], "n", {"NOT-A-NAME": "x"}),
        Command(["env"], "n", {"NAME": "a\0b"}),
        Command(["env"], "n", directory="/\0"),
    ],
)
def test_what_no_shell_can_be_told_is_refused(busybox: Path, command: Command) -> None:
    with pytest.raises(InitramfsError):
        build_initramfs(busybox, command=command)


@pytest.mark.parametrize("path", ["/init", "/bin/busybox", "/etc/linuxrc", "/bin/busybox/x"])
def test_a_file_that_the_initramfs_starts_with_is_not_replaced(busybox: Path, path: str) -> None:
    with pytest.raises(InitramfsError, match=r"cannot be .*in the guest"):
        build_initramfs(busybox, files=[HostFile.parse(f"{busybox}:{path}")])


def test_a_user_by_number_is_known_to_the_guest(busybox: Path) -> None:
    nodes = unpack(build_initramfs(busybox, command=Command(["id"], "n", user="1000")))
    assert b"\n1000:x:1000:1000:" in nodes["etc/passwd"].data
    assert b"\n1000:x:1000:" in nodes["etc/group"].data
