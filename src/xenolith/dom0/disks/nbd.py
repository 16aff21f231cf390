"""Disks that another program serves, by the NBD protocol (github.com/NetworkBlockDevice/nbd, doc/proto.md).

qemu-nbd knows the formats of others (qcow2, vmdk, vhdx, vpc); it is started for one image, told the format, and ends
when the connection does.  What such an image refers to, its backing file say, qemu-nbd opens: it is as trustworthy as
the image.

A server that breaks the protocol, dies, or does not answer for a minute has failed for good: every later request is an
error, since nobody knows what became of the writes that were not flushed.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from struct import Struct
from typing import IO, Final, NoReturn

from xenolith.dom0.disks import SECTOR, Buffers, DiskError, rest

ANSWER_SECONDS: Final = 60.0
LOCKED_SECONDS: Final = 3.0  # that qemu-nbd of a process that was killed has to finish with the image

NBDMAGIC: Final = b"NBDMAGIC"
IHAVEOPT: Final = b"IHAVEOPT"
NBD_FLAG_FIXED_NEWSTYLE: Final = 1
NBD_FLAG_NO_ZEROES: Final = 2
NBD_OPT_GO: Final = 7
NBD_REP_ACK: Final = 1
NBD_REP_INFO: Final = 3
NBD_INFO_EXPORT: Final = 0
NBD_FLAG_READ_ONLY: Final = 1 << 1
NBD_FLAG_SEND_FLUSH: Final = 1 << 2
NBD_FLAG_SEND_TRIM: Final = 1 << 5
NBD_CMD_READ: Final = 0
NBD_CMD_WRITE: Final = 1
NBD_CMD_DISC: Final = 2
NBD_CMD_FLUSH: Final = 3
NBD_CMD_TRIM: Final = 4
_REQUEST_MAGIC: Final = 0x25609513
_REPLY_MAGIC: Final = 0x67446698
_OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
_GREETING: Final = Struct(">8s8sH")
_OPTION: Final = Struct(">8sII")
_OPTION_REPLY: Final = Struct(">QIII")
_EXPORT: Final = Struct(">HQH")  # NBD_INFO_EXPORT: its number, size, transmission flags
_REQUEST: Final = Struct(">IHHQQI")
_REPLY: Final = Struct(">IIQ")
_MAX_OPTION_BYTES: Final = 1 << 16

QEMU_NBD_GRANULARITY: Final = 4096  # of discards: what qcow2's smallest clusters and file systems have


class NbdDisk:
    """A disk behind a connection to an NBD server, one request at a time."""

    physical_sector_size: Final = SECTOR

    def __init__(self, stream: socket.socket, writable: bool = True, discard: bool = True, export: str = "") -> None:
        """Takes the stream over. Raises OSError; the stream is closed then."""
        self._stream: Final = stream
        self._lock: Final = threading.Lock()
        self._cookie = 0
        self._failure: OSError | None = None
        stream.settimeout(ANSWER_SECONDS)
        try:
            size, flags = self._negotiate(export.encode())
        except BaseException:
            stream.close()
            raise
        self.sectors: Final = size // SECTOR
        self.writable: Final = writable and not flags & NBD_FLAG_READ_ONLY
        self._flushes: Final = bool(flags & NBD_FLAG_SEND_FLUSH)
        trims = discard and self.writable and flags & NBD_FLAG_SEND_TRIM
        self.discard_granularity: Final = QEMU_NBD_GRANULARITY if trims else 0

    # --- handshake -------------------------------------------------------------------------------------

    def _negotiate(self, export: bytes) -> tuple[int, int]:
        """The export's size in bytes and its transmission flags."""
        magic, option_magic, flags = _GREETING.unpack(self._receive(_GREETING.size))
        if (magic, option_magic) != (NBDMAGIC, IHAVEOPT) or not flags & NBD_FLAG_FIXED_NEWSTYLE:
            self._broken("it is no NBD server of the fixed newstyle")
        answer = NBD_FLAG_FIXED_NEWSTYLE | flags & NBD_FLAG_NO_ZEROES
        name = len(export).to_bytes(4, "big") + export + bytes(2)  # no information asked for besides the export's
        self._stream.sendall(answer.to_bytes(4, "big") + _OPTION.pack(IHAVEOPT, NBD_OPT_GO, len(name)) + name)
        found: tuple[int, int] | None = None
        while True:
            magic, option, kind, length = _OPTION_REPLY.unpack(self._receive(_OPTION_REPLY.size))
            if magic != _OPTION_REPLY_MAGIC or option != NBD_OPT_GO or length > _MAX_OPTION_BYTES:
                self._broken("its answer to NBD_OPT_GO is none")
            data = self._receive(length)
            if kind == NBD_REP_ACK and found is not None:
                return found
            if kind == NBD_REP_INFO:
                if length == _EXPORT.size and int.from_bytes(data[:2], "big") == NBD_INFO_EXPORT:
                    found = _EXPORT.unpack(data)[1:]
            else:
                self._broken(f"it refuses the export: {data.decode('utf-8', 'replace') or hex(kind)}")

    # --- requests --------------------------------------------------------------------------------------

    def _request(
        self, command: int, position: int = 0, length: int = 0, send: Buffers = (), receive: Buffers = ()
    ) -> None:
        """Send one, with what follows it, and take the answer. Raises OSError."""
        with self._lock:
            if self._failure is not None:
                raise self._failure
            try:
                self._cookie += 1
                head = _REQUEST.pack(_REQUEST_MAGIC, 0, command, self._cookie, position, length)
                self._send([memoryview(head), *send])
                magic, error, cookie = _REPLY.unpack(self._receive(_REPLY.size))
                if magic != _REPLY_MAGIC or cookie != self._cookie:
                    self._broken("it answers something else than what it was asked")
                if not error:
                    self._receive_into(receive)
            except OSError as failure:
                self._failure = failure
                raise
        if error:
            if error not in errno.errorcode:
                error = errno.EIO  # whatever it is
            raise OSError(error, os.strerror(error))  # of the protocol's list, whose numbers are Linux's

    def _send(self, buffers: Buffers) -> None:
        while buffers:
            buffers = rest(buffers, self._stream.sendmsg(buffers))

    def _receive(self, size: int) -> bytes:
        data = bytearray(size)
        self._receive_into([memoryview(data)])
        return bytes(data)

    def _receive_into(self, buffers: Buffers) -> None:
        while buffers := rest(buffers, 0):
            count = self._stream.recvmsg_into(buffers)[0]
            if not count:
                self._broken("it has hung up")
            buffers = rest(buffers, count)

    def _broken(self, what: str) -> NoReturn:
        raise OSError(errno.EIO, f"the NBD server failed: {what}")

    # --- as a disk -------------------------------------------------------------------------------------

    def measure(self) -> None:
        """An export does not change its size."""

    def read(self, position: int, buffers: Buffers) -> None:
        self._request(NBD_CMD_READ, position, sum(map(len, buffers)), receive=buffers)

    def write(self, position: int, buffers: Buffers) -> None:
        self._request(NBD_CMD_WRITE, position, sum(map(len, buffers)), send=buffers)

    def flush(self) -> None:
        if self._flushes:
            self._request(NBD_CMD_FLUSH)
        elif self._failure is not None:
            raise self._failure

    def discard(self, position: int, length: int) -> None:
        while length:
            count = min(length, 1 << 30)
            self._request(NBD_CMD_TRIM, position, count)
            position += count
            length -= count

    def close(self) -> None:
        try:
            if self._failure is None:
                self._stream.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, NBD_CMD_DISC, 0, 0, 0))
        except OSError:
            pass  # it is gone already
        self._stream.close()


class QemuDisk(NbdDisk):
    """An image that qemu-nbd serves, which runs for as long as the disk is open."""

    def __init__(self, path: Path, format: str, writable: bool = True, discard: bool = True) -> None:
        """`format` as qemu-img(1) calls it. Raises DiskError."""
        program = shutil.which("qemu-nbd")
        if program is None:
            raise DiskError(f"{path} needs qemu-nbd, which this machine does not have (Debian: apt install qemu-utils)")
        options = [f"--format={format}", "--shared=1", f"--discard={'unmap' if discard else 'ignore'}"]
        if not writable:
            options.append("--read-only")
        command = [program, *options, os.path.abspath(path)]
        deadline = time.monotonic() + LOCKED_SECONDS
        while True:
            with tempfile.TemporaryFile() as complaints:
                stream, self._server = _start(command, complaints)
                try:
                    super().__init__(stream, writable, discard)
                    return
                except OSError as error:
                    self._server.wait()
                    complaints.seek(0)
                    said = complaints.read(2000).decode("utf-8", "replace").strip()
                    if " lock" not in said or time.monotonic() > deadline:
                        raise DiskError(f"qemu-nbd cannot serve {path}: {said or error}") from error
            time.sleep(0.05)

    def close(self) -> None:
        super().close()
        self._server.wait()


def _start(command: list[str], complaints: IO[bytes]) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Start a server that takes a listening socket as systemd passes it (sd_listen_fds(3)); a connection to it.

    The connection waits in the listening socket until the server takes it, and breaks when that ends without.
    """
    with tempfile.TemporaryDirectory(prefix="xenolith-") as directory, socket.socket(socket.AF_UNIX) as listener:
        place = str(Path(directory, "nbd"))
        listener.bind(place)
        listener.listen(1)
        stream = socket.socket(socket.AF_UNIX)
        stream.connect(place)
        try:
            server = subprocess.Popen(
                ["/bin/sh", "-c", 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&0 </dev/null', "sh", *command],
                stdin=listener.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=complaints,
            )
        except OSError as error:
            stream.close()
            raise DiskError(f"cannot start {command[0]}: {error.strerror}") from error
    return stream, server
