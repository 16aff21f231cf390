"""A server keeps records and its host is killed again and again: nothing that it acknowledged is missing or taken back.

The client knows nothing of it: when a connection breaks it connects anew and asks again for what it has no answer to.
XENOLITH_KILLS says how often (as many as one likes: each takes a second or two).
"""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dom0.netfront import why_no_passt
from people import Person, person_in
from xenolith.debian.initramfs import Command, build_initramfs, kernel_arguments
from xenolith.debian.modules import kernel_modules
from xenolith.debian.packages import obtain

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(bool(why_no_passt()), reason=why_no_passt()),
]
KILLS = int(os.environ.get("XENOLITH_KILLS", "2"))
DEADLINE_SECONDS = 200
RECORDS = 2048

# One record a line: "put N" keeps N on the disk, in its own place, and in a list in memory; the answer is "kept N" and
# how long the list is. "get N" answers with what is in that place of the disk, past the guest's cache.
SERVER = """
until [ -b /dev/xvda ]; do :; done
cat >/handler <<'END'
#!/bin/sh
while read verb n; do
    case $verb in
    put)
        printf '%-512s' "$n" | dd of=/dev/xvda bs=512 seek=$((n % 2048)) count=1 conv=fsync,notrunc 2>/dev/null
        echo "$n" >>/list
        set -- $(wc -l /list)
        echo "kept $n $1";;
    get)
        echo 3 >/proc/sys/vm/drop_caches
        set -- $(dd if=/dev/xvda bs=512 skip=$((n % 2048)) count=1 2>/dev/null)
        echo "has $1";;
    esac
done
END
chmod +x /handler
echo LISTENING
nc -ll -p 7 -e /handler
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class ClientOfIt:
    """Asks one thing after the other, again where no answer came."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connection: socket.socket | None = None
        self.broken = 0

    def ask(self, line: str) -> list[str]:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < deadline:
            try:
                if self._connection is None:
                    self._connection = socket.create_connection(("127.0.0.1", self._port), 5)
                    self._connection.settimeout(5)
                self._connection.sendall(line.encode() + b"\n")
                answer = b""
                while not answer.endswith(b"\n"):
                    piece = self._connection.recv(100)
                    if not piece:
                        raise ConnectionError
                    answer += piece
                return answer.decode().split()
            except OSError:
                self.broken += 1
                if self._connection is not None:
                    self._connection.close()
                    self._connection = None
        raise AssertionError(f"no answer to {line!r}")


@contextlib.contextmanager
def daemon_in(directory: Path, engine: str) -> Iterator[Person]:
    directory.mkdir()
    with person_in(directory) as person:
        person.environment |= {"XENOLITH_ENGINE": engine, "XENOLITH_UPLINK": "passt"}
        yield person


def test_nothing_that_was_acknowledged_is_lost_with_its_host(tmp_path: Path, engine_name: str) -> None:
    guest, port = obtain("6.1"), free_port()
    modules = kernel_modules(guest, ["xen-netfront", "xen-blkfront"])
    ramdisk = tmp_path / "ramdisk"
    ramdisk.write_bytes(build_initramfs(guest.busybox, command=Command(["sh", "-c", SERVER], "srv"), modules=modules))
    (tmp_path / "disk").write_bytes(bytes(RECORDS * 512))
    chance = random.Random(int(os.environ.get("XENOLITH_SEED", "1")))
    with contextlib.ExitStack() as daemons:
        here = daemons.enter_context(daemon_in(tmp_path / "0", engine_name))
        (here.directory / "srv.cfg").write_text(
            f'name="srv"\nkernel="{guest.elf}"\nramdisk="{ramdisk}"\nmemory=96\n'
            f'extra="{kernel_arguments(1)}"\nvif=["publish=127.0.0.1:{port}:7"]\ndisk=["{tmp_path}/disk,raw,xvda"]\n'
        )
        done = here.xl("create", "-q", "srv.cfg")
        assert done.returncode == 0, done
        client = ClientOfIt(port)
        kept: list[int] = []
        length = number = 0
        for kill in range(1, KILLS + 2):
            if kill <= KILLS:
                there = daemons.enter_context(daemon_in(tmp_path / str(kill), engine_name))
                address = f"unix:{there.directory / 'come'}"
                assert there.xenolith("listen", address).returncode == 0
                client.ask("get 0")  # it has booted
                done = here.xenolith("protect", "srv", "--to", address, "--every", "40")
                assert done.returncode == 0, done
            until = time.monotonic() + chance.uniform(0.2, 3.0)
            while time.monotonic() < until:
                number += 1
                word, said, list_length = client.ask(f"put {number}")
                assert (word, int(said)) == ("kept", number)
                assert int(list_length) > length, "it had said that it had more"
                length = int(list_length)
                kept.append(number)
            for each in kept[-1:] + chance.sample(kept[-RECORDS:], min(10, len(kept))):
                assert client.ask(f"get {each}") == ["has", str(each)]
            if kill <= KILLS:
                print(kill, len(kept), client.broken, here.xenolith("protect").stdout.strip(), flush=True)
                here.end_daemon(signal.SIGKILL)
                here = there
        for each in kept[-RECORDS:]:
            assert client.ask(f"get {each}") == ["has", str(each)]
        assert len(kept) > KILLS
        assert shlex.split(here.xl("list").stdout.splitlines()[2])[0] == "srv"
