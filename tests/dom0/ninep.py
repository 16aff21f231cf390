"""A 9P client for tests: messages, and a client that reaches a server through a relay."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path
from typing import Final

import pytest

from xenolith.abi import p9
from xenolith.dom0.shares.relay import Relay
from xenolith.dom0.shares.server import TREE, Server, owner

NOFID: Final = 0xFFFFFFFF
DEADLINE_SECONDS: Final = 60


def why_no_shares() -> str:
    if not (shutil.which("diod") or shutil.which("diod", path="/usr/sbin")):
        return "needs diod"
    unshare = [sys.executable, "-c", "import ctypes; exit(ctypes.CDLL(None).unshare(0x10020000) != 0)"]
    return "" if subprocess.run(unshare, check=False).returncode == 0 else "needs user namespaces"


needs_diod = pytest.mark.skipif(bool(why_no_shares()), reason=why_no_shares() or "it does")


def message(kind: int, tag: int, body: bytes = b"") -> bytes:
    return p9.HEADER.pack(p9.HEADER.size + len(body), kind, tag) + body


def u32(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def text(value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<H", len(data)) + data


def version(msize: int = 65536) -> bytes:
    return message(p9.TVERSION, p9.NOTAG, u32(msize) + text(p9.VERSION))


def attach(fid: int = 0, uid: int = 0, tree: str = "/") -> bytes:
    return u32(fid, NOFID) + text("root") + text(tree) + u32(uid)


def walk(fid: int, newfid: int, *names: str | bytes) -> bytes:
    return u32(fid, newfid) + struct.pack("<H", len(names)) + b"".join(map(text, names))


class Client:
    """A guest's client without the guest: one request at a time. An answer is its body, or the error that it tells."""

    def __init__(self, folder: Path, *, writable: bool = True) -> None:
        self.server: Final = Server(folder, writable)
        self.relay: Final = Relay(TREE, writable=writable, owner=owner())
        self._answers: Final[deque[bytes | None]] = deque()
        self._come: Final = threading.Condition()
        self.server.start(self._note)
        forward, answer = self.relay.request(version())
        assert not forward and answer[4] == p9.TVERSION + 1
        assert isinstance(self.ask(p9.TATTACH, attach(0)), bytes)

    def _note(self, answer: bytes | None) -> None:
        with self._come:
            self._answers.append(answer)
            self._come.notify()

    def ask(self, kind: int, body: bytes) -> bytes | int:
        forward, answer = self.relay.request(message(kind, 1, body))
        if forward:
            self.server.send(forward)
            with self._come:
                assert self._come.wait_for(lambda: self._answers, DEADLINE_SECONDS)
                raw = self._answers.popleft()
            assert raw is not None, "the server has ended"
            answer = self.relay.response(raw)
        return answer[7:] if answer[4] == kind + 1 else struct.unpack_from("<I", answer, 7)[0]

    def close(self) -> None:
        self.server.close()
