"""Whole root file systems as guests: folders, container images, and a real Debian with systemd."""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from debian.test_roots import archive, directory, layout, link, member, needs_e2fsprogs, write_image
from dom0.netfront import why_no_passt
from xenolith.debian.packages import obtain

from .conftest import Run

pytestmark = [pytest.mark.slow, needs_e2fsprogs]


@pytest.fixture(autouse=True)
def _own_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages from the user's cache, roots in one of our own."""
    from xenolith.debian.packages import cache_directory

    home = tmp_path / "cache" / "xenolith"
    home.mkdir(parents=True)
    obtain()
    for shared in ("debian", "apt", "native"):
        if (cache_directory() / shared).exists():
            (home / shared).symlink_to(cache_directory() / shared)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def busybox_root(folder: Path) -> Path:
    for name in ("bin", "etc", "dev", "proc", "sys", "srv/here"):
        (folder / name).mkdir(parents=True)
    shutil.copy(obtain().busybox, folder / "bin/busybox")
    for applet in ("sh", "id", "pwd", "cat", "touch", "ls"):
        (folder / "bin" / applet).symlink_to("busybox")
    (folder / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\nweb:x:33:44::/:/bin/sh\n")
    (folder / "etc/group").write_text("root:x:0:\nweb:x:44:\n")
    (folder / "srv").chmod(0o777)
    return folder


def test_a_command_runs_inside_a_folder_that_stays_as_it_is(xenolith_run: Run, tmp_path: Path) -> None:
    root = busybox_root(tmp_path / "root")
    before = sorted(root.rglob("*"))
    script = "id -u; id -g; pwd; echo $COLOUR; cat; touch /srv/written || exit 9; ls -1 /; exit 42"
    done = xenolith_run(
        *("--root", str(root), "--user", "web:77", "--workdir", "/srv/here", "--env", "COLOUR=blue", "--"),
        *("sh", "-c", script),
        stdin=b"piped in\n",
    )
    assert done.stdout.splitlines()[:5] == [b"33", b"77", b"/srv/here", b"blue", b"piped in"]
    assert set(done.stdout.splitlines()[5:]) >= {b"bin", b"etc", b"srv"} and b"init" not in done.stdout.split()
    assert done.returncode == 42
    assert sorted(root.rglob("*")) == before


def test_a_container_image_of_one_program_runs_as_it_says(xenolith_run: Run, tmp_path: Path) -> None:
    """There is no shell, no /etc and no /dev in it."""
    program = (obtain().busybox).read_bytes()
    layers = [
        archive(directory("app"), member("app/tool", program, mode=0o755), member("app/old", b"x")),
        archive(member("app/.wh.old"), link("busybox", "app/tool")),
    ]
    config = {"Entrypoint": ["/busybox", "sh", "-c"], "Cmd": ["id; ls /app; exit 5"], "User": "1234", "WorkingDir": "/"}
    path = write_image(tmp_path, layout(layers, config), as_folder=False)
    done = xenolith_run("--root", str(path))
    assert done.stdout.startswith(b"uid=1234 gid=1234") and done.stdout.endswith(b"\ntool\n")
    assert done.returncode == 5


def test_what_is_no_root_is_said_to_the_user(tmp_path: Path) -> None:
    def run(root: str) -> subprocess.CompletedProcess[bytes]:
        line = [sys.executable, "-m", "xenolith", "run", "--root", str(tmp_path / root), "--", "true"]
        return subprocess.run(line, capture_output=True, check=False)

    assert run("absent").returncode == 2 and b"xenolith image list" in run("absent").stderr
    (tmp_path / "bad.tar").write_bytes(archive(member("../x", b"x")))
    assert run("bad.tar").returncode == 125 and b"leads out of the archive" in run("bad.tar").stderr


# --- a real Debian ------------------------------------------------------------------------------------------------


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """`xenolith run` in the background, killed in the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "xenolith", "run", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    watch = threading.Timer(600, process.kill)
    watch.start()
    try:
        yield process
    finally:
        watch.cancel()
        process.kill()
        process.wait()


def until(process: subprocess.Popen[bytes], word: bytes) -> bytes:
    """The console up to this word."""
    assert process.stdout is not None
    seen = io.BytesIO()
    while word not in seen.getvalue():
        data = os.read(process.stdout.fileno(), 4096)
        assert data, seen.getvalue().decode("utf-8", "replace")
        seen.write(data)
    return seen.getvalue()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.timeout(1200)
@pytest.mark.skipif(bool(why_no_passt()), reason=why_no_passt())
@pytest.mark.skipif(not shutil.which("mmdebstrap"), reason="needs mmdebstrap")
@pytest.mark.skipif(not shutil.which("ssh"), reason="needs ssh (Debian: openssh-client)")
def test_a_debian_is_made_boots_is_reached_by_ssh_installs_and_leaves_a_clean_file_system(tmp_path: Path) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    made = subprocess.run(
        [sys.executable, "-m", "xenolith", "image", "debian", "web", "--package", "openssh-server"]
        + ["--ssh-key", f"{key}.pub", "--cfg", tmp_path / "web.cfg"],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode and "apt-get update" in made.stderr.splitlines()[-1]:
        pytest.skip(f"no mirror is reached: {made.stderr.splitlines()[-1]}")
    assert made.returncode == 0, made.stderr
    image = tmp_path / "cache/xenolith/images/web.img"
    assert f"{image},raw,xvda,rw" in (tmp_path / "web.cfg").read_text()
    port = free_port()
    with running("--disk", str(image), "--cmdline", "root=/dev/xvda rw", "--publish", f"{port}:22") as process:
        console = until(process, b"login: ")
        assert b"web login: " in console and b"FAILED" not in console

        def ssh(command: str) -> str:
            options = [f"-o{option}" for option in ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null")]
            line = ["ssh", *options, "-oConnectionAttempts=20", "-i", str(key), "-p", str(port), "root@127.0.0.1"]
            done = subprocess.run([*line, command], capture_output=True, text=True, check=False, timeout=500)
            print(f"--- {command}: {done.returncode}\n{done.stdout}{done.stderr}")
            assert done.returncode == 0
            return done.stdout

        assert "running" in ssh("systemctl is-system-running --wait")
        ssh("apt-get -q update && apt-get -q install -y --no-install-recommends hello && hello")
        ssh("poweroff || true")
        until(process, b"System halted")
        assert process.wait(60) == 0
    fsck = shutil.which("e2fsck", path=os.environ["PATH"] + ":/sbin:/usr/sbin")
    assert fsck
    checked = subprocess.run([fsck, "-fn", image], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    listed = subprocess.run(
        [sys.executable, "-m", "xenolith", "image", "list"], capture_output=True, text=True, check=True
    )
    assert "web " in listed.stdout and "openssh-server" in listed.stdout
    subprocess.run([sys.executable, "-m", "xenolith", "image", "rm", "web"], check=True)
    assert not image.exists()
