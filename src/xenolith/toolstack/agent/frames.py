"""What goes over an agent's channel: frames, as guests/agent/agent.c describes them.

Type (u8), command (u16), length (u16), body, little-endian; encoded by Consistent Overhead Byte Stuffing, so that a
zero byte ends a frame and occurs nowhere else.
"""

from __future__ import annotations

import os
import re
import secrets
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

VERSION: Final = 1
MOST_BODY: Final = 4096
INPUT_ROOM: Final = 16 << 10  # bytes of a command's standard input that the agent keeps for it
MOST_ARGUMENTS: Final = 256 << 10
MOST_WORDS: Final = 4096
MOST_HOST_NAME: Final = 63
SEED_BYTES: Final = 32

HEADER: Final = struct.Struct("<BHH")
U32: Final = struct.Struct("<I")
FAILURE: Final = struct.Struct("<BI")  # stage, errno
CREDIT: Final = struct.Struct("<BI")  # stream, bytes
SIZE: Final = struct.Struct("<HH")  # rows, columns
EXEC: Final = struct.Struct("<BHHIIB")  # 1: a terminal, its rows and columns, words, variables, limits
LIMIT: Final = struct.Struct("<BQ")  # resource of setrlimit(2), value
_LONGEST: Final = HEADER.size + MOST_BODY + MOST_BODY // 254 + 2  # encoded


class Kind(IntEnum):
    """Types of frames: to the agent, and from it."""

    HELLO = 1
    IDENTITY = 2
    ARGUMENTS = 3
    EXEC = 4
    STDIN = 5
    STDIN_END = 6
    SIGNAL = 7
    SIZE = 8
    CREDIT = 9
    FORGET = 10
    INTERFACE = 11
    READY = 65
    WELCOME = 66
    IDENTIFIED = 67
    STARTED = 68
    FAILED = 69
    STDOUT = 70
    STDERR = 71
    ROOM = 72
    EXIT = 73


class Stage(IntEnum):
    """At what a command failed to start."""

    AGENT = 0
    USER = 1
    DIRECTORY = 2
    PROGRAM = 3


@dataclass(frozen=True, slots=True)
class Frame:
    kind: int
    command: int = 0
    body: bytes = b""


def identity(name: str) -> Frame:
    """What a clone is told of itself: random bytes, a machine-id of its own, the time, and a host name of `name`."""
    host = re.sub(r"[^a-z0-9.-]+", "-", name.lower()).strip("-.")[:MOST_HOST_NAME] or "clone"
    words = os.urandom(SEED_BYTES) + secrets.token_hex(16).encode() + struct.pack("<Q", time.time_ns())
    return Frame(Kind.IDENTITY, 0, words + host.encode("ascii"))


def interface(former: bytes, mac: bytes, address: int, netmask: int, router: int) -> Frame:
    """What a clone is told of an interface: the MAC that its parent's had, and what it has itself (IPv4)."""
    return Frame(Kind.INTERFACE, 0, former + mac + struct.pack("!III", address, netmask, router))


class FrameError(ValueError):
    """What came is no frame."""


def encode(frame: Frame) -> bytes:
    """A frame as it goes over the channel."""
    coded = bytearray()
    plain = HEADER.pack(frame.kind, frame.command, len(frame.body)) + frame.body
    for run in plain.split(b"\0"):
        while len(run) >= 254:
            coded += b"\xff" + run[:254]
            run = run[254:]
        coded.append(len(run) + 1)
        coded += run
    coded.append(0)
    return bytes(coded)


def decode(coded: bytes) -> Frame:
    """The frame of what came before a zero. Raises FrameError."""
    plain = bytearray()
    at, end = 0, len(coded)
    while at < end:
        code = coded[at]
        plain += coded[at + 1 : at + code]
        at += code
        if code < 255 and at < end:
            plain.append(0)
    if at != end or len(plain) < HEADER.size:
        raise FrameError("a frame is cut off")
    kind, command, length = HEADER.unpack_from(plain)
    if len(plain) != HEADER.size + length:
        raise FrameError("a frame has another length than it says")
    return Frame(kind, command, bytes(plain[HEADER.size :]))


class Decoder:
    """Makes frames of bytes as they come; None stands for what is none."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame | None]:
        """The frames that these bytes complete. At most one frame's bytes are kept."""
        *ended, rest = data.split(b"\0")
        for piece in ended:
            whole = bytes(self._held) + piece
            self._held.clear()
            if not whole:
                continue
            try:
                yield decode(whole) if len(whole) <= _LONGEST else None
            except FrameError:
                yield None
        self._held += rest[: _LONGEST + 1 - len(self._held)]
