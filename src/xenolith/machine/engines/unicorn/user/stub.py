"""One stub process, as the monitor has it: hand-over, mappings, its end.  See code.py for the process itself."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import mmap
import os
import select
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from struct import Struct
from typing import Final, NamedTuple

from xenolith.machine.engines.protocol import EngineError
from xenolith.machine.engines.unicorn.user import code
from xenolith.machine.engines.unicorn.user.shared import FIXED, SOFTWARE_SIZE, StubFields
from xenolith.machine.native import buffer_address

RECEIVE: Final = 0xC050_2100  # SECCOMP_IOCTL_NOTIF_RECV
SEND: Final = 0xC018_2101  # SECCOMP_IOCTL_NOTIF_SEND
_SET_FLAGS: Final = 0x4008_2104  # SECCOMP_IOCTL_NOTIF_SET_FLAGS, Linux 6.6
_SYNC_WAKE_UP: Final = 1
_NOTE = Struct("<QIIiIQ6Q")  # struct seccomp_notif: id pid flags, then seccomp_data: nr arch ip args
_ANSWER = Struct("<QqiI")  # struct seccomp_notif_resp: id val error flags
SYS_TGKILL: Final = 234
_LEAST_FD: Final = 32  # above those that the stub gets
POLLIN: Final = select.POLLIN
PIECE_MS: Final = 50  # after that somebody looks whether a kick was answered
ANSWER_PIECES: Final = 40  # in which a kick is; a busy host may need long, and only its own domain waits
MAPPER_PIECES: Final = 200  # in which the mapper has answered, or a stub has begun
_BEGIN_SECONDS: Final = MAPPER_PIECES * PIECE_MS / 1000

_COMMAND = Struct("<6Q")

# The signal frame (struct rt_sigframe; asm/ucontext.h, asm/sigcontext.h): offsets in bytes.
STACK: Final = 24  # of struct ucontext: address, flags, size of the signal stack
R8: Final = FIXED  # and, a word each, R9 to R15 RDI RSI RBP RBX RDX RAX RCX RSP RIP EFLAGS
RIP: Final = 176
FLAGS: Final = 184
CS: Final = 192  # u16
ERROR: Final = 200
VECTOR: Final = 208
CR2: Final = 224
FPSTATE: Final = 232  # pointer to the XSAVE image
SIGNAL_MASK: Final = 304
SIGNAL_CODE: Final = 320  # i32, of siginfo
SIGNAL_CALL: Final = 328  # of a system call: where it was made
SIGNAL_ARCH: Final = 340  # u32, of a system call
SOFTWARE: Final = 464  # in the image, up to 512: what the kernel says of it (struct _fpx_sw_bytes)
_SOFTWARE = Struct("<IIQI")  # magic, size of all, components, size of the image
MAGIC, MAGIC_AT_END = 0x4650_5853, 0x4650_5845
HOST_CS64: Final = 0x33  # what the host's own 64-bit programs have
ARCH_X86_64, ARCH_I386 = 0xC000_003E, 0x4000_0003  # at SIGNAL_ARCH
VSYSCALL: Final = 0xFFFF_FFFF_FF60_0000 >> 12  # page number of system calls of another kind

REASONS: Final = {
    1: "the process has ended",
    2: "a hand-over cannot be answered",
    3: "guest code has forged a hand-over",
    4: "guest code does not let itself be interrupted",
    5: "it does not answer",
    6: "the mapper has handed over where it should not",
    7: "its hand-overs cannot be read",
}
"""By what run.c calls them: why a stub has to end."""

_MAGIC_AT_END: Final = MAGIC_AT_END.to_bytes(4, "little")

_libc = ctypes.CDLL(None, use_errno=True)
Kicked = Callable[[], bool]
Command = tuple[int, int, int, int, int, int]  # see code.COMMAND_WORDS


class StubDied(Exception):
    """It is no more; the text says why."""


class Note(NamedTuple):
    """A hand-over: the kernel's number of it, the task, the instruction behind the system call, its arguments."""

    number: int
    task: int
    ip: int
    arguments: tuple[int, ...]


def map_pages(va: int, count: int, protection: int, mfn: int) -> Command:
    """Map `count` pages of the memory object, from frame `mfn` on."""
    return code.SYS_MMAP, va, count << 12, protection, code.MAP_SHARED_FIXED, mfn << 12


def unmap(va: int, length: int) -> Command:
    """Unmap; `length` in bytes."""
    return code.SYS_MUNMAP, va, length, 0, 0, 0


FLUSH: Final = [unmap(address, length) for address, length in code.FLUSH]


@functools.cache
def _executable() -> int:
    """Descriptor of the stub's program, sealed."""
    fd = os.memfd_create("xenolith-stub", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, code.program())
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def interrupt(pid: int, task: int) -> None:
    """Send a task the signal that makes it hand over."""
    _libc.syscall(SYS_TGKILL, pid, task, code.SIGKICK)


class Stub:
    """A stub over a memory object. One thread at a time; but for `kick`.

    While the guest's task does not run, `words` (64-bit) and `bytes` show its mailbox, and what the signal frame
    holds may be changed: it begins at byte `frame`, its XSAVE image at byte `xsave`, which is `xsave_size` long.
    Everything in the mailbox may have been forged by guest code, and nothing of it matters to anyone but that.
    """

    def __init__(self, memory_fd: int) -> None:
        """Raises EngineError where it cannot be made."""
        self._object = os.memfd_create("xenolith-stub-mailbox", os.MFD_CLOEXEC)
        os.ftruncate(self._object, code.OBJECT_SIZE)
        self._map = mmap.mmap(self._object, code.OBJECT_SIZE)
        self.bytes = memoryview(self._map)
        self.words = self.bytes.cast("Q")
        self.bytes[code.MESSAGE : code.MESSAGE + len(code.message())] = code.message()
        self._listener = self._pidfd = -1
        self._status = 0  # with which it has ended
        self.fields = StubFields(mailbox=buffer_address(self._map))
        self.fields.pid = self._spawn(memory_fd)
        self.fields.pidfd = self._pidfd = os.pidfd_open(self.pid)
        try:
            self._meet()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """0: it is no more."""
        return self.fields.pid

    # --- its beginning ------------------------------------------------------------------------------------

    def _spawn(self, memory_fd: int) -> int:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(_BEGIN_SECONDS)
        kept = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _LEAST_FD) for fd in (memory_fd, theirs.fileno(), self._object)]
        actions: list[tuple[int, ...]] = [(os.POSIX_SPAWN_CLOSE, fd) for fd in range(3)]
        targets = (code.MEMORY_FD, code.SOCKET_FD, code.OBJECT_FD)
        actions += [(os.POSIX_SPAWN_DUP2, fd, target) for fd, target in zip(kept, targets, strict=True)]
        try:
            return os.posix_spawn(
                f"/proc/self/fd/{_executable()}",
                ["xenolith-stub"],
                {},
                file_actions=actions,
                setsid=True,
                setsigmask=(),
                setsigdef=[number for number in signal.valid_signals() if number not in (9, 19)],
            )
        except OSError as error:
            self._forget()
            raise EngineError(f"a program in a memory object cannot be executed: {error.strerror}") from error
        finally:
            theirs.close()
            for fd in kept:
                os.close(fd)

    def _meet(self) -> None:
        """Get the descriptor of notifications, and the first one of each task."""
        try:
            _, received, _, _ = socket.recv_fds(self._socket, 1, 1)
        except OSError:
            received = []
        if not received:
            raise EngineError(f"a stub process could not be set up: {self._why_ended()}")
        self.fields.listener = self._listener = received[0]
        self._socket.close()
        with suppress(OSError):  # an older kernel
            fcntl.ioctl(self._listener, _SET_FLAGS, _SYNC_WAKE_UP)
        self._poll = select.poll()
        self._poll.register(self._listener, select.POLLIN)
        self._poll.register(self._pidfd, select.POLLIN)
        notes: dict[int, Note] = {}
        try:
            while len(notes) < 2:
                note = self._next(_BEGIN_SECONDS)
                notes[note.ip] = note
        except StubDied:
            raise EngineError(f"a stub process could not be set up: {self._why_ended()}") from None
        if set(notes) != {code.GUEST_HANDS_OVER, code.MAPPER_HANDS_OVER}:
            raise EngineError("a stub process has handed over where it should not")
        guest, mapper = notes[code.GUEST_HANDS_OVER], notes[code.MAPPER_HANDS_OVER]
        self._frame_va = guest.arguments[1]
        self.frame = self._frame_va - code.MAILBOX
        image_va = self.words[(self.frame + FPSTATE) // 8]
        self.xsave = image_va - code.MAILBOX
        if not code.SIGNAL_STACK <= self.frame < self.xsave < code.MAILBOX_SIZE - 576 or self.xsave % 64:
            raise EngineError("this kernel's signal frames are not what Xenolith knows")
        self._software = bytes(self.bytes[self.xsave + SOFTWARE : self.xsave + SOFTWARE + SOFTWARE_SIZE])
        magic, size, features, length = _SOFTWARE.unpack_from(self._software)
        if magic != MAGIC or self.xsave + size > code.MAILBOX_SIZE:
            raise EngineError("this kernel's signal frames have no XSAVE image")
        self.xsave_size, self.xsave_features = length, features
        self._fixed = bytes(self.bytes[self.frame : self.frame + R8])  # with the signal stack
        self._selectors = self.words[(self.frame + CS) // 8]
        fields = self.fields
        fields.guest, fields.mapper, fields.task = guest.number, mapper.number, guest.task
        fields.frame_va, fields.selectors = self._frame_va, self._selectors
        fields.frame, fields.xsave, fields.xsave_size = self.frame, self.xsave, length
        fields.fixed[:], fields.software[:] = self._fixed, self._software

    def _why_ended(self) -> str:
        """Of a process that has ended by itself, or does so now: at which step."""
        if self.pid:
            self._ended(1.0)
            self.close()
        if os.WIFEXITED(self._status):
            return f"{code.STEPS.get(os.WEXITSTATUS(self._status), 'its exec')} failed"
        return f"it ended by signal {os.WTERMSIG(self._status)}"

    def _ended(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    # --- hand-over ------------------------------------------------------------------------------------------

    def run(self, kicked: Kicked) -> int:
        """Let the guest's task go on until it hands over: the signal; see also `stopped`.

        `kicked` tells whether somebody waits for its end.  Raises StubDied.
        """
        q, frame = self.words, self.frame
        self.bytes[frame : frame + R8] = self._fixed
        q[(frame + CS) // 8] = self._selectors
        q[(frame + SIGNAL_MASK) // 8] = 0
        q[(frame + FPSTATE) // 8] = code.MAILBOX + self.xsave
        self.bytes[self.xsave + SOFTWARE : self.xsave + SOFTWARE + SOFTWARE_SIZE] = self._software
        end = self.xsave + self.xsave_size
        self.bytes[end : end + 4] = _MAGIC_AT_END
        q[code.FRAME // 8] = self._frame_va + 8
        self._answer(self.fields.guest)
        note = self._next(None, kicked)
        self.fields.guest, self.fields.task = note.number, note.task
        if note.ip != code.GUEST_HANDS_OVER or note.arguments[1] != self._frame_va:
            raise StubDied(self._end("guest code has forged a hand-over"))
        self.fields.arguments[:] = note.arguments
        return int(note.arguments[0])

    @property
    def stopped(self) -> int:
        """The time stamp counter at its last signal, but for the kernel's part."""
        return int(self.fields.arguments[2]) << 32 | int(self.fields.arguments[3])

    def carry_out(self, commands: Sequence[Command]) -> int:
        """Have the mapper carry these out, until one fails: 0, or the errno. The guest's task stands still.

        Raises StubDied.
        """
        for first in range(0, len(commands), code.MOST_COMMANDS):
            part = commands[first : first + code.MOST_COMMANDS]
            self.words[code.MAILBOX_SIZE // 8] = len(part)
            place = code.MAILBOX_SIZE
            for command in part:
                place += code.COMMAND_SIZE
                _COMMAND.pack_into(self.bytes, place, *command)
            self._answer(self.fields.mapper)
            note = self._next(_BEGIN_SECONDS)
            self.fields.mapper = note.number
            self.bytes[code.MAILBOX_SIZE : place + code.COMMAND_SIZE] = bytes(
                place + code.COMMAND_SIZE - code.MAILBOX_SIZE
            )
            if note.ip != code.MAPPER_HANDS_OVER:
                raise StubDied(self._end("the mapper has handed over where it should not"))
            if note.arguments[0]:
                return -note.arguments[1] & 0xFFF
        return 0

    def kick(self) -> None:
        """Have the guest's task hand over soon. From any thread, while the stub lives; it does so at its next `run`."""
        interrupt(self.pid, self.fields.task)

    def _answer(self, number: int) -> None:
        if not self.pid:
            raise StubDied("the process has ended")
        try:
            fcntl.ioctl(self._listener, SEND, _ANSWER.pack(number, 0, 0, 0))
        except OSError as error:
            raise StubDied(self._end(f"a hand-over cannot be answered: {error.strerror}")) from error

    def _next(self, seconds: float | None, kicked: Kicked | None = None) -> Note:
        """Wait for a hand-over."""
        waited = 0
        while True:
            found = dict(self._poll.poll(PIECE_MS))
            if found.get(self._listener, 0) & select.POLLIN:
                break
            if found:
                raise StubDied(self._end("the process has ended"))
            waited += 1
            if kicked is not None:
                if not kicked():
                    waited = 0
                elif waited > ANSWER_PIECES:
                    raise StubDied(self._end("guest code does not let itself be interrupted"))
                else:
                    self.kick()
            if seconds is not None and waited * PIECE_MS > seconds * 1000:
                raise StubDied(self._end("it does not answer"))
        buffer = bytearray(_NOTE.size)
        try:
            fcntl.ioctl(self._listener, RECEIVE, buffer)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return self._next(seconds, kicked)
            raise
        number, task, _, _, _, ip, *arguments = _NOTE.unpack(buffer)
        return Note(number, task, ip, tuple(arguments))

    def forget_registers(self) -> None:
        """The mailbox shows nothing of who ran here: another program is to."""
        self.bytes[: code.MAILBOX_SIZE] = bytes(code.MAILBOX_SIZE)

    # --- its end --------------------------------------------------------------------------------------------

    def died(self, reason: int) -> StubDied:
        """What native code has found: see REASONS."""
        return StubDied(self._end(REASONS[reason]))

    def _end(self, why: str) -> str:
        self.close()
        return why

    def close(self) -> None:
        """End the process."""
        if self.pid:
            with suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)
            with suppress(OSError):
                _, self._status = os.waitpid(self.pid, 0)
            self.fields.pid = 0
        self._forget()

    def _forget(self) -> None:
        self._socket.close()
        for fd in (self._listener, self._pidfd, self._object):
            if fd >= 0:
                os.close(fd)
        self._listener = self._pidfd = self._object = -1
