"""xenstore through the socket: ours beside Debian's xenstored 4.17 (C), same client, one run.

    python bench/xenstore.py [--operations N]

Each daemon is a process of its own; the clients are processes too and speak the wire protocol. Printed for each kind of
request: median and 99th percentile of the round trip for one client, and requests a second of four clients together.

Debian's daemon comes from its packages (downloaded with apt-get into a temporary directory unless /usr/lib/xen-4.17 is
there) and runs without Xen by means of xenstored_alone.c. Without the packages or a C compiler only ours is measured,
and the table says why.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from xenolith.abi.xs_wire import HEADER, Op
from xenolith.dom0.xenstore import XenstoreService

CLIENTS: Final = 4
PACKAGES: Final = (
    "xen-utils-4.17",
    "libxenmisc4.17",
    "libxengnttab1",
    "libxenevtchn1",
    "libxencall1",
    "libxenforeignmemory1",
    "libxendevicemodel1",
    "libxentoollog1",
    "libxentoolcore1",
    "libxenhypfs1",
    "libxenstore4",
)
STATE: Final = b"/local/domain/5/device/vbd/51712/state\0"
KINDS: Final = ("read", "write", "directory", "transaction", "watch event")


class NotHere(Exception):
    """Debian's daemon cannot be measured on this machine."""


class Client:
    """A blocking client."""

    def __init__(self, path: Path) -> None:
        self.stream = socket.socket(socket.AF_UNIX)
        self.stream.connect(str(path))

    def send(self, op: Op, payload: bytes, tx: int = 0) -> None:
        self.stream.sendall(HEADER.pack(op, 1, tx, len(payload)) + payload)

    def receive(self) -> tuple[int, bytes]:
        header = self._exactly(HEADER.size)
        kind, _, _, length = HEADER.unpack(header)
        return kind, self._exactly(length)

    def _exactly(self, count: int) -> bytes:
        data = self.stream.recv(count) if count else b""
        while len(data) < count:
            data += self.stream.recv(count - len(data))
        return data

    def ask(self, op: Op, payload: bytes, tx: int = 0) -> bytes:
        self.send(op, payload, tx)
        while True:
            kind, data = self.receive()
            if kind == Op.ERROR:
                raise RuntimeError(f"{op.name} {payload!r}: {data!r}")
            if kind == op:
                return data


def once(kind: str, client: Client) -> None:
    """One operation of this kind."""
    if kind == "read":
        client.ask(Op.READ, STATE)
    elif kind == "write":
        client.ask(Op.WRITE, STATE + b"4")
    elif kind == "directory":
        client.ask(Op.DIRECTORY, b"/local/domain\0")
    elif kind == "transaction":
        tx = int(client.ask(Op.TRANSACTION_START, b"\0")[:-1])
        client.ask(Op.READ, STATE, tx)
        client.ask(Op.WRITE, STATE + b"4", tx)
        client.send(Op.TRANSACTION_END, b"T\0", tx)
        client.receive()  # OK, or EAGAIN when another client was faster
    else:
        client.send(Op.WRITE, b"/watched/x\x001")
        client.receive()
        client.receive()  # the event and the answer


def prepare(path: Path) -> None:
    """A store as on a host with 50 domains."""
    client = Client(path)
    for domid in range(50):
        for name in (
            b"name",
            b"domid",
            b"memory/target",
            b"console/tty",
            b"device/vbd/51712/state",
            b"device/vif/0/state",
        ):
            client.ask(Op.WRITE, b"/local/domain/%d/%b\x001" % (domid, name))
    client.ask(Op.MKDIR, b"/watched\0")


def measure(path: Path, kind: str, operations: int) -> tuple[float, float]:
    """Median and 99th percentile round trip in microseconds."""
    client = Client(path)
    if kind == "watch event":
        client.ask(Op.WATCH, b"/watched\0t\0")
        client.receive()
    trips = []
    for _ in range(operations):
        began = time.perf_counter_ns()
        once(kind, client)
        trips.append((time.perf_counter_ns() - began) / 1000)
    return statistics.median(trips), statistics.quantiles(trips, n=100)[98]


def crowd(path: Path, kind: str, operations: int) -> float:
    """Operations a second of several clients at once."""
    with multiprocessing.Pool(CLIENTS) as pool:
        began = time.perf_counter()
        pool.starmap(measure, [(path, kind, operations)] * CLIENTS)
        return CLIENTS * operations / (time.perf_counter() - began)


@contextlib.contextmanager
def ours(place: Path) -> Iterator[Path]:
    """Our service in a process of its own."""
    path = place / "ours.socket"
    child = os.fork()
    if not child:
        service = XenstoreService()
        service.listen(path)
        service.start()
        signal.sigwait({signal.SIGTERM})
        os._exit(0)
    try:
        wait_for(path)
        yield path
    finally:
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)


@contextlib.contextmanager
def debians(place: Path) -> Iterator[Path]:
    """Debian's xenstored."""
    daemon = debians_program(place)
    stand_in = place / "alone.so"
    source = Path(__file__).with_name("xenstored_alone.c")
    run("cc", "-shared", "-fPIC", "-w", "-o", str(stand_in), str(source), "-ldl")
    (place / "page").write_bytes(bytes(4096))
    (place / "port").write_text("1")
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(place / "usr/lib/x86_64-linux-gnu"),
        "LD_PRELOAD": str(stand_in),
        "XENSTORED_ALONE": str(place),
        "XENSTORED_RUNDIR": str(place),
    }
    process = subprocess.Popen(
        [daemon, "--no-fork"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(place / "socket")
        yield place / "socket"
    finally:
        process.terminate()
        process.wait()


def debians_program(place: Path) -> Path:
    """The daemon's path, downloaded if it is not installed."""
    installed = Path("/usr/lib/xen-4.17/bin/xenstored")
    if installed.exists():
        return installed
    run("apt-get", "download", *PACKAGES, cwd=place)
    for package in place.glob("*.deb"):
        run("dpkg", "-x", str(package), str(place))
    return place / "usr/lib/xen-4.17/bin/xenstored"


def run(*command: str, cwd: Path | None = None) -> None:
    """Run a command or raise :class:`NotHere` with what it said."""
    try:
        subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise NotHere(f"{command[0]} is not installed") from None
    except subprocess.CalledProcessError as error:
        raise NotHere(f"{' '.join(command[:3])} failed: {error.stderr.strip().splitlines()[-1:]}") from None


def wait_for(path: Path) -> None:
    """Until somebody listens on the socket."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            Client(path).stream.close()
            return
        time.sleep(0.02)
    raise NotHere(f"nobody listens on {path} after ten seconds")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=3000, help="of each kind and client (default 3000)")
    operations = parser.parse_args().operations
    if operations < 2:
        parser.error(f"--operations {operations}: at least 2 are needed for percentiles")
    table = Table(
        "operation", "daemon", "median µs", "p99 µs", f"{CLIENTS} clients, ops/s", title="xenstore, UNIX socket"
    )
    with tempfile.TemporaryDirectory(prefix="xenstore-bench-") as temporary, contextlib.ExitStack() as running:
        place = Path(temporary)
        daemons = {"xenolith": running.enter_context(ours(place))}
        missing = ""
        try:
            daemons["Debian 4.17 (C)"] = running.enter_context(debians(place))
        except NotHere as error:
            missing = f"Debian's xenstored was not measured: {error}"
        for path in daemons.values():
            prepare(path)
        for kind in KINDS:
            for name, path in daemons.items():
                median, high = measure(path, kind, operations)
                # Watching clients would read each other's events, so there is no crowd of them.
                total = "-" if kind == "watch event" else f"{crowd(path, kind, operations):,.0f}"
                table.add_row(kind, name, f"{median:.0f}", f"{high:.0f}", total)
    Console().print(table)
    if missing:
        print(missing, file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
