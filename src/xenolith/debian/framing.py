"""How a command's output, input and exit status travel over a console that carries other bytes too.

The console of a domain is one stream of bytes each way. Out of it come messages of the kernel, then those of its
programs. For `xenolith run -- COMMAND` our initramfs (`debian.initramfs`) therefore puts two marks around the
command, each with a nonce that the host chose for this run:

    RS nonce SP "begin" [SP "sysrq"] LF   ...the command's output, byte for byte...   RS nonce SP "exit" SP status LF

RS is the ASCII record separator. It occurs in a mark only as its first byte, so a mark that arrives in pieces
begins at the last RS seen. The guest's terminal does no output processing in between (`stty raw`), which makes
the output exact. The nonce keeps the command's own output from being taken for a mark by accident; a command
that wants to lie about its status can, as any program can exit as it likes.

The other way there is no end of file. After the first mark the command's standard input goes in as chunks, each behind
a line with its length, and a length of 0 is the end:

    length LF   ...length bytes...

The console's ring holds the host back while the command does not read. One byte does not get through: for a console
of Linux Ctrl-O means that the next key is a magic SysRq, and twice means itself. "sysrq" in the first mark says that
this kernel has that.
"""

from __future__ import annotations

import re
import secrets
from typing import Final

RECORD_SEPARATOR: Final = b"\x1e"
_PREAMBLE_BYTES: Final = 64 << 10


SYSRQ_KEY: Final = b"\x0f"
END_OF_INPUT: Final = b"0\n"


def typed(data: bytes, *, sysrq: bool) -> bytes:
    """What must be written to the console for these bytes to arrive at the terminal."""
    return data.replace(SYSRQ_KEY, SYSRQ_KEY * 2) if sysrq else data


def input_chunk(data: bytes, *, sysrq: bool) -> bytes:
    """Some bytes, at least one, of a command's standard input, as they are written to the console."""
    return b"%d\n%b" % (len(data), typed(data, sysrq=sysrq))


def new_nonce() -> str:
    return secrets.token_hex(16)


class CommandOutput:
    """Takes the console's bytes as they come; yields the command's output and in the end its exit status.

    `preamble` is what came before the command started, its last 64 KiB: the thing to show when it never did.
    `sysrq` is known once it has `started`. `exit_status` is None until the closing mark was seen; anything after that
    mark is dropped.
    """

    def __init__(self, nonce: str) -> None:
        mark = RECORD_SEPARATOR + nonce.encode("ascii")
        self._begin = re.compile(re.escape(mark) + rb" begin( sysrq)?\n")
        self._longest_begin = len(mark) + len(b" begin sysrq\n")
        self._end = re.compile(re.escape(mark) + rb" exit (\d{1,3})\n")
        self._longest_end = len(mark) + len(b" exit 255\n")
        self._end_before_status = mark + b" exit "
        self._held = b""
        self.preamble = b""
        self.started = False
        self.sysrq = False
        self.exit_status: int | None = None

    def feed(self, data: bytes) -> bytes:
        """The next bytes of the console; returns the output of the command that they complete."""
        if self.exit_status is not None:
            return b""
        self._held += data
        if not self.started and not self._find_begin():
            return b""
        return self._take_output()

    def finish(self) -> bytes:
        """The console has ended; returns output that was held back as the possible start of a mark."""
        held, self._held = self._held, b""
        if self.started:
            return held
        self.preamble = (self.preamble + held)[-_PREAMBLE_BYTES:]
        return b""

    def _find_begin(self) -> bool:
        begin = self._begin.search(self._held)
        if begin:
            self.started, self.sysrq = True, bool(begin[1])
            before, self._held = self._held[: begin.start()], self._held[begin.end() :]
        else:
            keep = self._longest_begin - 1
            before, self._held = self._held[:-keep], self._held[-keep:]
        self.preamble = (self.preamble + before)[-_PREAMBLE_BYTES:]
        return self.started

    def _take_output(self) -> bytes:
        end = self._end.search(self._held)
        if end:
            output, self._held = self._held[: end.start()], b""
            self.exit_status = int(end[1])
            return output
        cut = len(self._held)
        last = self._held.rfind(RECORD_SEPARATOR, max(0, cut - self._longest_end))
        if last >= 0 and self._may_become_end(self._held[last:]):
            cut = last
        output, self._held = self._held[:cut], self._held[cut:]
        return output

    def _may_become_end(self, tail: bytes) -> bool:
        mark = self._end_before_status
        if len(tail) <= len(mark):
            return mark.startswith(tail)
        digits = tail[len(mark) :]
        return tail.startswith(mark) and len(digits) <= 3 and digits.isdigit()
