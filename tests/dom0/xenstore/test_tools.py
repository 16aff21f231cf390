"""Other people's programs against our socket: Debian's xenstore-utils and test-xenstore, PyPI's pyxs, unmodified."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from xenolith.dom0.xenstore import XenstoreService

Run: TypeAlias = Callable[..., "subprocess.CompletedProcess[str]"]

needs_utils = pytest.mark.skipif(
    shutil.which("xenstore-ls") is None, reason="needs the Debian package xenstore-utils (xenstore-ls is not installed)"
)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[XenstoreService]:
    service = XenstoreService()
    service.listen(tmp_path / "socket")
    service.start()
    yield service
    service.stop()


@pytest.fixture
def run(service: XenstoreService, tmp_path: Path) -> Run:
    def run(*command: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "XENSTORED_PATH": str(tmp_path / "socket")}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    return run


@needs_utils
def test_xenstore_write_read_list_exists_rm(run: Run) -> None:
    assert run("xenstore-write", "/t/a", "1", "/t/b", "two words").returncode == 0
    assert run("xenstore-read", "/t/a", "/t/b").stdout == "1\ntwo words\n"
    assert run("xenstore-list", "/t").stdout == "a\nb\n"
    assert run("xenstore-exists", "/t/a").returncode == 0
    assert run("xenstore-rm", "/t/a").returncode == 0
    assert run("xenstore-exists", "/t/a").returncode == 1
    missing = run("xenstore-read", "/t/a")
    assert (missing.returncode, missing.stderr) == (1, "xenstore-read: couldn't read path /t/a\n")


@needs_utils
def test_xenstore_ls_and_chmod(run: Run) -> None:
    run("xenstore-write", "/t/a", "1", "/t/d/x", "y")
    assert run("xenstore-ls", "/t").stdout == 'a = "1"\nd = ""\n x = "y"\n'
    assert run("xenstore-ls", "-f", "/t").stdout == '/t/a = "1"\n/t/d = ""\n/t/d/x = "y"\n'
    assert run("xenstore-chmod", "/t/a", "n0", "r3", "b7").returncode == 0
    assert "(n0,r3,b7)" in run("xenstore-ls", "-p", "/t").stdout
    assert run("xenstore-chmod", "-r", "/t/d", "b5").returncode == 0
    assert run("xenstore-ls", "-p", "/t").stdout.count("(b5)") == 2


@needs_utils
def test_xenstore_ls_of_a_directory_too_long_for_one_message(run: Run, service: XenstoreService) -> None:
    names = [f"a-rather-long-name-{number}" for number in range(500)]
    for name in names:
        service.write(f"/t/{name}", "")
    assert run("xenstore-list", "/t").stdout.split() == names


@needs_utils
def test_xenstore_watch_sees_the_first_event_and_a_change(service: XenstoreService, tmp_path: Path) -> None:
    environment = {**os.environ, "XENSTORED_PATH": str(tmp_path / "socket")}
    watching = subprocess.Popen(["xenstore-watch", "-n", "2", "/t"], env=environment, stdout=subprocess.PIPE, text=True)
    assert watching.stdout is not None
    assert watching.stdout.readline() == "/t\n"
    service.write("/t/x", "1")
    assert watching.stdout.readline() == "/t/x\n"
    assert watching.wait(60) == 0


@needs_utils
def test_the_directory_of_the_socket_may_be_named_instead(service: XenstoreService, tmp_path: Path) -> None:
    service.write("/t", "found")
    environment = {**os.environ, "XENSTORED_RUNDIR": str(tmp_path)}
    answer = subprocess.run(["xenstore-read", "/t"], env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout == "found\n"


@pytest.fixture(scope="session")
def test_xenstore(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Debian's test program, from the installed package or else unpacked from a download."""
    installed = sorted(Path("/usr/lib").glob("xen-*/bin/test-xenstore"))
    if installed:
        return installed[-1]
    place = tmp_path_factory.mktemp("xen-utils")
    try:
        subprocess.run(
            ["apt-get", "download", "xen-utils-4.17"], cwd=place, check=True, capture_output=True, timeout=60
        )
        package = next(place.glob("*.deb"))
        subprocess.run(["dpkg", "-x", package, place], check=True, capture_output=True)
        return next(place.glob("usr/lib/xen-*/bin/test-xenstore"))
    except (OSError, subprocess.SubprocessError, StopIteration) as error:
        pytest.skip(f"needs test-xenstore of the Debian package xen-utils-4.17, which is not here: {error}")


@needs_utils  # for its library
def test_debians_test_xenstore_passes(run: Run, test_xenstore: Path) -> None:
    result = run(str(test_xenstore), "-i", "20")
    assert result.returncode == 0, result.stderr
    assert "failed" not in result.stdout + result.stderr
    assert len(result.stdout.splitlines()) == 12, result.stdout
    assert run(str(test_xenstore), "-r", "2").returncode == 0, "random requests for two seconds"


@needs_utils  # for its library
def test_xenstore_control(run: Run, test_xenstore: Path) -> None:
    def control(*words: str) -> str:
        done = run(str(test_xenstore.with_name("xenstore-control")), *words)
        if done.returncode == 127:
            pytest.skip(f"xenstore-control of xen-utils-4.17 lacks a library: {done.stderr.strip().rpartition('/')[2]}")
        return done.stdout

    assert control("check") == "OK\n"
    assert control("quota", "set", "nodes", "900") == "OK\n"
    assert "nodes            :      900 Nodes per domain\n" in control("quota")
    assert "watches                 :        0\n" in control("memreport")
    commands = [line.split("\t")[0] for line in control("help").splitlines()]
    assert [command for command in commands if command] == ["check", "log", "memreport", "print", "quota", "help"]
    assert control("quota-soft") == ""


def test_pyxs_reads_writes_watches_and_commits(service: XenstoreService, tmp_path: Path) -> None:
    pyxs: Any = pytest.importorskip("pyxs", reason="needs the PyPI package pyxs")
    with pyxs.Client(unix_socket_path=str(tmp_path / "socket")) as client:
        client[b"/p/a"] = b"1"
        assert client[b"/p/a"] == b"1"
        assert client.list(b"/p") == [b"a"]
        client.set_perms(b"/p/a", [b"n0", b"r3"])
        assert client.get_perms(b"/p/a") == [b"n0", b"r3"]
        assert client.get_domain_path(3) == b"/local/domain/3"
        assert not client.is_domain_introduced(3)
        client.transaction()
        client[b"/p/t"] = b"x"
        assert not service.exists("/p/t")
        assert client.commit()
        assert service.read("/p/t") == "x"
        with client.monitor() as monitor:
            monitor.watch(b"/p", b"token")
            assert tuple(next(monitor.wait())) == (b"/p", b"token")
            service.write("/p/q", "1")
            assert tuple(next(monitor.wait())) == (b"/p/q", b"token")
        client.delete(b"/p")
        with pytest.raises(pyxs.PyXSError):
            client.read(b"/p")
