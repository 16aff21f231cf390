"""The stub: a process without anything, in whose address space a guest's user mode runs natively.

It is two tasks on one address space, made of the few hundred bytes of this module; nothing is compiled.

- *The guest's task* executes guest code.  It has no file descriptor, and its seccomp filter lets two instructions of
  the stub's text make a system call: the hand-over, and the return from a signal.  Every other system call, wherever
  it stands, is a signal, as all exceptions are.  A signal's handler does nothing but hand over: the signal frame,
  which holds all registers, lies in the mailbox, which the monitor sees too.
- *The mapper* holds one descriptor, the domain's memory object.  It carries out lists of mmap and munmap that it finds
  in a page which it cannot write to, and neither can the guest's task; it has no stack, takes no signal, and its
  filter lets nothing else pass, nor any of them that concerns the stub's own part of the address space.

Both hand over by a system call that seccomp turns into a notification of the monitor's (seccomp_unotify(2)): while the
monitor does not answer, the kernel's word is that the task does not run.

For the listings see machine.listing.
"""

from __future__ import annotations

from struct import pack
from typing import Final

from xenolith.machine.listing import assemble

AREA: Final = 0x2222_0000_0000
"""Where the stub's own pages lie: in a part of the address space, a slot of the L4 table, that hardly anybody uses."""

AREA_SLOT: Final = AREA >> 39 & 511
TEXT: Final = AREA
MAILBOX: Final = AREA + 0x1_0000
MAILBOX_SIZE: Final = 0x8000
COMMANDS: Final = AREA + 0x2_0000
COMMANDS_SIZE: Final = 0x4000
AREA_END: Final = AREA + 0x10_0000
USER_END: Final = 0x7FFF_FFFF_F000  # what a process of the host may map
OBJECT_SIZE: Final = MAILBOX_SIZE + COMMANDS_SIZE  # of the memory object of both

# In the mailbox: what the handler loads on its way back, when that was, then what the first message is made of, then
# the signal stack.
FS_BASE: Final = 0
GS_BASE: Final = 8
FLAGS: Final = 16
FRAME: Final = 24
RESUMED: Final = 32  # time stamp counter
MESSAGE: Final = 0x100
MESSAGE_FD: Final = 0x150
SIGNAL_STACK: Final = 0x1000

# In the commands: how many there are; then each, 64 bytes from the one before.
COMMAND_SIZE: Final = 0x40
COMMAND_WORDS: Final = 6  # number of the system call, address, length, protection, flags, offset
MOST_COMMANDS: Final = COMMANDS_SIZE // COMMAND_SIZE - 1

MEMORY_FD, SOCKET_FD, OBJECT_FD = 3, 4, 5  # descriptors of the process when it begins
SIGILL, SIGTRAP, SIGBUS, SIGFPE, SIGKICK, SIGSEGV, SIGSYS = 4, 5, 7, 8, 10, 11, 31
SYS_MMAP, SYS_MUNMAP, SYS_SIGRETURN, SYS_HAND_OVER, SYS_EXIT = 9, 11, 15, 39, 231  # 39: getpid, which nobody forbids
MAP_SHARED_FIXED: Final = 0x11

# The handler of all signals of the guest's task, and the mapper.
RUN: Final = """
    f3 49 0f ae c0                  rdfsbase r8
    f3 49 0f ae c9                  rdgsbase r9
    0f 31                           rdtsc
    49 89 c2                        mov r10, rax
    48 89 e6                        mov rsi, rsp
    b8 27 00 00 00                  mov eax, 0x27
    0f 05                           syscall
guest_handed_over:
    48 ba {mailbox:8}               mov rdx, mailbox
    48 8b 0a                        mov rcx, qword [rdx]
    f3 48 0f ae d1                  wrfsbase rcx
    48 8b 4a 08                     mov rcx, qword [rdx+0x8]
    f3 48 0f ae d9                  wrgsbase rcx
    48 8d 62 10                     lea rsp, [rdx+0x10]
    9d                              popf
    48 8b 62 18                     mov rsp, qword [rdx+0x18]
    48 89 d1                        mov rcx, rdx
    0f 31                           rdtsc
    89 41 20                        mov dword [rcx+0x20], eax
    89 51 24                        mov dword [rcx+0x24], edx
    b8 0f 00 00 00                  mov eax, 0xf
    0f 05                           syscall
guest_returned:
    f4                              hlt
mapper:
1:
    4c 89 ef                        mov rdi, r13
    4c 89 f6                        mov rsi, r14
    b8 27 00 00 00                  mov eax, 0x27
    0f 05                           syscall
mapper_handed_over:
    48 85 c0                        test rax, rax
    75 {.3:1}                       jne 3
    49 bc {commands:8}              mov r12, commands
    4d 8b 2c 24                     mov r13, qword [r12]
    45 31 f6                        xor r14d, r14d
2:
    4d 85 ed                        test r13, r13
    74 {.1:1}                       je 1
    49 83 c4 40                     add r12, 0x40
    49 8b 04 24                     mov rax, qword [r12]
    49 8b 7c 24 08                  mov rdi, qword [r12+0x8]
    49 8b 74 24 10                  mov rsi, qword [r12+0x10]
    49 8b 54 24 18                  mov rdx, qword [r12+0x18]
    4d 8b 54 24 20                  mov r10, qword [r12+0x20]
    4d 8b 4c 24 28                  mov r9, qword [r12+0x28]
    41 b8 03 00 00 00               mov r8d, 0x3
    0f 05                           syscall
mapper_mapped:
    49 89 c6                        mov r14, rax
    48 3d 00 f0 ff ff               cmp rax, 0xfffffffffffff000
    77 {.1:1}                       ja 1
    49 ff cd                        dec r13
    eb {.2:1}                       jmp 2
3:
    bf 01 00 00 00                  mov edi, 0x1
    b8 e7 00 00 00                  mov eax, 0xe7
    0f 05                           syscall
mapper_exited:
    f4                              hlt
"""
# Of its system calls, the addresses that the kernel's notes of them show: behind the instruction.
_RUN: Final = assemble(RUN, {"mailbox": MAILBOX, "commands": COMMANDS})
GUEST_HANDS_OVER: Final = TEXT + _RUN.labels["guest_handed_over"]
GUEST_RETURNS: Final = TEXT + _RUN.labels["guest_returned"]
MAPPER_HANDS_OVER: Final = TEXT + _RUN.labels["mapper_handed_over"]
MAPPER_MAPS: Final = TEXT + _RUN.labels["mapper_mapped"]
MAPPER_EXITS: Final = TEXT + _RUN.labels["mapper_exited"]
MAPPER: Final = TEXT + _RUN.labels["mapper"]

# What makes the process so: it gives up what it may, and its stack and the vDSO; maps the mailbox and the commands;
# sets the handlers; sends the monitor the descriptor of the notifications; becomes two tasks, each of which closes what
# it must not have and gets its filter.  The guest's task then raises its first signal.  Exit status: which step failed.
BEGIN: Final = """
    bf 26 00 00 00                  mov edi, 0x26
    be 01 00 00 00                  mov esi, 0x1
    31 d2                           xor edx, edx
    45 31 d2                        xor r10d, r10d
    45 31 c0                        xor r8d, r8d
    b8 9d 00 00 00                  mov eax, 0x9d
    0f 05                           syscall
    bb 02 00 00 00                  mov ebx, 0x2
    48 85 c0                        test rax, rax
    0f 85 {.4}                      jne 4
    bf 04 00 00 00                  mov edi, 0x4
    31 f6                           xor esi, esi
    b8 9d 00 00 00                  mov eax, 0x9d
    0f 05                           syscall
    ff c3                           inc ebx
    48 85 c0                        test rax, rax
    0f 85 {.4}                      jne 4
    31 ff                           xor edi, edi
    48 be {area:8}                  mov rsi, area
    b8 0b 00 00 00                  mov eax, 0xb
    0f 05                           syscall
    ff c3                           inc ebx
    48 85 c0                        test rax, rax
    0f 85 {.4}                      jne 4
    48 bf {behind:8}                mov rdi, behind
    48 be {behind_size:8}           mov rsi, behind_size
    b8 0b 00 00 00                  mov eax, 0xb
    0f 05                           syscall
    ff c3                           inc ebx
    48 85 c0                        test rax, rax
    0f 85 {.4}                      jne 4
    49 bc {mailbox:8}               mov r12, mailbox
    4c 89 e7                        mov rdi, r12
    be 00 80 00 00                  mov esi, 0x8000
    ba 03 00 00 00                  mov edx, 0x3
    41 ba 11 00 00 00               mov r10d, 0x11
    41 b8 05 00 00 00               mov r8d, 0x5
    45 31 c9                        xor r9d, r9d
    b8 09 00 00 00                  mov eax, 0x9
    0f 05                           syscall
    ff c3                           inc ebx
    4c 39 e0                        cmp rax, r12
    0f 85 {.4}                      jne 4
    49 bd {commands:8}              mov r13, commands
    4c 89 ef                        mov rdi, r13
    be 00 40 00 00                  mov esi, 0x4000
    ba 01 00 00 00                  mov edx, 0x1
    41 b9 00 80 00 00               mov r9d, 0x8000
    b8 09 00 00 00                  mov eax, 0x9
    0f 05                           syscall
    ff c3                           inc ebx
    4c 39 e8                        cmp rax, r13
    0f 85 {.4}                      jne 4
    49 be {signals:8}               mov r14, signals
    49 bf {action:8}                mov r15, action
    ff c3                           inc ebx
1:
    41 0f b6 3e                     movzx edi, byte [r14]
    85 ff                           test edi, edi
    74 {.2:1}                       je 2
    4c 89 fe                        mov rsi, r15
    31 d2                           xor edx, edx
    41 ba 08 00 00 00               mov r10d, 0x8
    b8 0d 00 00 00                  mov eax, 0xd
    0f 05                           syscall
    48 85 c0                        test rax, rax
    0f 85 {.4}                      jne 4
    49 ff c6                        inc r14
    eb {.1:1}                       jmp 1
2:
    bf 01 00 00 00                  mov edi, 0x1
    be 08 00 00 00                  mov esi, 0x8
    48 ba {first_filter:8}          mov rdx, first_filter
    b8 3d 01 00 00                  mov eax, 0x13d
    0f 05                           syscall
    ff c3                           inc ebx
    48 85 c0                        test rax, rax
    0f 88 {.4}                      js 4
    41 89 84 24 50 01 00 00         mov dword [r12+0x150], eax
    bf 04 00 00 00                  mov edi, 0x4
    49 8d b4 24 00 01 00 00         lea rsi, [r12+0x100]
    31 d2                           xor edx, edx
    b8 2e 00 00 00                  mov eax, 0x2e
    0f 05                           syscall
    ff c3                           inc ebx
    48 85 c0                        test rax, rax
    0f 88 {.4}                      js 4
    bf 00 0b 05 00                  mov edi, 0x50b00
    31 f6                           xor esi, esi
    45 31 d2                        xor r10d, r10d
    45 31 c0                        xor r8d, r8d
    b8 38 00 00 00                  mov eax, 0x38
    0f 05                           syscall
    ff c3                           inc ebx
    48 85 c0                        test rax, rax
    0f 84 {.3}                      je 3
    0f 88 {.4}                      js 4
    bf 02 00 00 00                  mov edi, 0x2
    48 be {all_signals:8}           mov rsi, all_signals
    31 d2                           xor edx, edx
    41 ba 08 00 00 00               mov r10d, 0x8
    b8 0e 00 00 00                  mov eax, 0xe
    0f 05                           syscall
    ff c3                           inc ebx
    48 85 c0                        test rax, rax
    0f 85 {.4}                      jne 4
    bf 04 00 00 00                  mov edi, 0x4
    be ff ff ff ff                  mov esi, 0xffffffff
    31 d2                           xor edx, edx
    b8 b4 01 00 00                  mov eax, 0x1b4
    0f 05                           syscall
    49 89 c4                        mov r12, rax
    31 ff                           xor edi, edi
    be 02 00 00 00                  mov esi, 0x2
    b8 b4 01 00 00                  mov eax, 0x1b4
    0f 05                           syscall
    4c 09 e0                        or rax, r12
    ff c3                           inc ebx
    48 85 c0                        test rax, rax
    0f 85 {.4}                      jne 4
    bf 01 00 00 00                  mov edi, 0x1
    31 f6                           xor esi, esi
    48 ba {mapper_filter:8}         mov rdx, mapper_filter
    b8 3d 01 00 00                  mov eax, 0x13d
    0f 05                           syscall
    ff c3                           inc ebx
    48 85 c0                        test rax, rax
    75 {.4:1}                       jne 4
    45 31 ed                        xor r13d, r13d
    45 31 f6                        xor r14d, r14d
    48 b8 {mapper:8}                mov rax, mapper
    ff e0                           jmp rax
3:
    31 ff                           xor edi, edi
    be ff ff ff ff                  mov esi, 0xffffffff
    31 d2                           xor edx, edx
    b8 b4 01 00 00                  mov eax, 0x1b4
    0f 05                           syscall
    bb 14 00 00 00                  mov ebx, 0x14
    48 85 c0                        test rax, rax
    75 {.4:1}                       jne 4
    48 bf {signal_stack:8}          mov rdi, signal_stack
    31 f6                           xor esi, esi
    b8 83 00 00 00                  mov eax, 0x83
    0f 05                           syscall
    ff c3                           inc ebx
    48 85 c0                        test rax, rax
    75 {.4:1}                       jne 4
    bf 01 00 00 00                  mov edi, 0x1
    31 f6                           xor esi, esi
    48 ba {guest_filter:8}          mov rdx, guest_filter
    b8 3d 01 00 00                  mov eax, 0x13d
    0f 05                           syscall
    ff c3                           inc ebx
    48 85 c0                        test rax, rax
    75 {.4:1}                       jne 4
    cc                              int3
4:
    89 df                           mov edi, ebx
    b8 e7 00 00 00                  mov eax, 0xe7
    0f 05                           syscall
    f4                              hlt
"""

STEPS: Final = {
    2: "prctl(PR_SET_NO_NEW_PRIVS)",
    3: "prctl(PR_SET_DUMPABLE)",
    4: "munmap",
    5: "munmap of the vDSO and the stack",
    6: "mmap of the mailbox",
    7: "mmap of the commands",
    8: "rt_sigaction",
    9: "seccomp with a user notification (Linux 5.0, and no other such filter above)",
    10: "sendmsg",
    11: "clone",
    12: "rt_sigprocmask",
    13: "close_range (Linux 5.9)",
    14: "seccomp, of the mapper",
    20: "close_range (Linux 5.9)",
    21: "sigaltstack",
    22: "seccomp, of the guest's task",
}
"""By exit status: what failed."""

# --- the filters (seccomp(2), linux/filter.h) ------------------------------------------------------------------

_LOAD, _IF_EQUAL, _ANSWER = 0x20, 0x15, 0x06  # BPF_LD | BPF_W | BPF_ABS, BPF_JMP | BPF_JEQ | BPF_K, BPF_RET | BPF_K
_NUMBER, _ARCH, _IP, _ARGUMENTS = 0, 4, 8, 16  # in struct seccomp_data
_X86_64: Final = 0xC000_003E
KILL_PROCESS: Final = 0x8000_0000
TRAP: Final = 0x0003_0000
NOTIFY: Final = 0x7FC0_0000
ALLOW: Final = 0x7FFF_0000

_Rule = tuple[dict[int, int], int]  # words of struct seccomp_data by offset, and the answer where all are so


def _word(offset: int, value: int) -> dict[int, int]:
    """A 64-bit word, as two of 32 bits."""
    return {offset: value & 0xFFFF_FFFF, offset + 4: value >> 32}


def _argument(number: int, value: int) -> dict[int, int]:
    return _word(_ARGUMENTS + 8 * number, value)


def _call(place: int, number: int) -> dict[int, int]:
    """The system call of this number, made in 64-bit code at this place."""
    return {_ARCH: _X86_64, _NUMBER: number, **_word(_IP, place)}


def _upper_half(argument: int, value: int) -> dict[int, int]:
    return {_ARGUMENTS + 8 * argument + 4: value >> 32}


def _program(rules: list[_Rule], otherwise: int) -> bytes:
    """The first rule that fits gives the answer: struct sock_filter[]."""
    code = []
    for wanted, answer in rules:
        left = 2 * len(wanted)  # instructions to the next rule, from the rule's own answer on 1
        for offset, value in wanted.items():
            left -= 2
            code += [pack("<HBBI", _LOAD, 0, 0, offset), pack("<HBBI", _IF_EQUAL, 0, left + 1, value)]
        code.append(pack("<HBBI", _ANSWER, 0, 0, answer))
    code.append(pack("<HBBI", _ANSWER, 0, 0, otherwise))
    return b"".join(code)


NOTIFYING: Final = _program(
    [(_word(_IP, GUEST_HANDS_OVER), NOTIFY), (_word(_IP, MAPPER_HANDS_OVER), NOTIFY)],
    ALLOW,
)
"""Of both tasks, and of what precedes them.  The kernel takes the strictest of all filters' answers."""

OF_GUEST: Final = _program(
    [(_call(GUEST_HANDS_OVER, SYS_HAND_OVER), ALLOW), (_call(GUEST_RETURNS, SYS_SIGRETURN), ALLOW)],
    TRAP,
)

FLUSH: Final = ((0, AREA), (AREA_END, USER_END - AREA_END))
"""Addresses and lengths of everything but the stub's own."""

OF_MAPPER: Final = _program(
    [
        (_call(MAPPER_HANDS_OVER, SYS_HAND_OVER), ALLOW),
        (_call(MAPPER_EXITS, SYS_EXIT), ALLOW),
        *(
            (_call(MAPPER_MAPS, SYS_MUNMAP) | _argument(0, address) | _argument(1, length), ALLOW)
            for address, length in FLUSH
        ),
        # Nothing else may begin in the same 4 GiB as the stub's own pages, nor in the 4 GiB before.
        (_upper_half(0, AREA), KILL_PROCESS),
        (_upper_half(0, AREA - 1), KILL_PROCESS),
        (_call(MAPPER_MAPS, SYS_MUNMAP) | _upper_half(1, 0), ALLOW),
        (
            _call(MAPPER_MAPS, SYS_MMAP) | _upper_half(1, 0) | _argument(3, MAP_SHARED_FIXED) | _argument(4, MEMORY_FD),
            ALLOW,
        ),
    ],
    KILL_PROCESS,
)

# --- the program -----------------------------------------------------------------------------------------------

_SA_SIGINFO, _SA_RESTORER, _SA_ONSTACK = 4, 0x0400_0000, 0x0800_0000
_SS_AUTODISARM: Final = 1 << 31  # each signal begins at the top of the stack, wherever the stack pointer is
_ALL: Final = (1 << 64) - 1
_SIGNALS: Final = bytes((SIGILL, SIGTRAP, SIGBUS, SIGFPE, SIGKICK, SIGSEGV, SIGSYS, 0))
_BEGIN: Final = TEXT + 0x100
_DATA: Final = TEXT + 0x400


def program() -> bytes:
    """The stub as an executable file: ELF64, its one segment at TEXT, a page."""
    data = bytearray()

    def place(content: bytes) -> int:
        at = _DATA + len(data)
        data.extend(content.ljust(-(-len(content) // 8) * 8, b"\0"))
        return at

    def place_filter(code: bytes) -> int:
        return place(pack("<HxxxxxxQ", len(code) // 8, place(code)))

    constants = {
        "area": AREA,
        "behind": AREA_END,
        "behind_size": USER_END - AREA_END,
        "mailbox": MAILBOX,
        "commands": COMMANDS,
        "signals": place(_SIGNALS),
        "action": place(pack("<4Q", TEXT, _SA_SIGINFO | _SA_RESTORER | _SA_ONSTACK, TEXT, _ALL)),
        "first_filter": place_filter(NOTIFYING),
        "all_signals": place(pack("<Q", _ALL)),
        "mapper_filter": place_filter(OF_MAPPER),
        "mapper": MAPPER,
        "signal_stack": place(pack("<QIxxxxQ", MAILBOX + SIGNAL_STACK, _SS_AUTODISARM, MAILBOX_SIZE - SIGNAL_STACK)),
        "guest_filter": place_filter(OF_GUEST),
    }
    begin = assemble(BEGIN, constants).code
    page = (_RUN.code.ljust(_BEGIN - TEXT, b"\xf4") + begin.ljust(_DATA - _BEGIN, b"\xf4") + data).ljust(4096, b"\0")
    assert len(page) == 4096 and len(begin) <= _DATA - _BEGIN
    header = b"\x7fELF" + bytes((2, 1, 1)) + bytes(9)
    header += pack("<HHIQQQIHHHHHH", 2, 62, 1, _BEGIN, 64, 0, 0, 64, 56, 2, 64, 0, 0)
    segment = pack("<IIQQQQQQ", 1, 5, 4096, TEXT, TEXT, 4096, 4096, 4096)
    no_executable_stack = pack("<IIQQQQQQ", 0x6474_E551, 6, 0, 0, 0, 0, 0, 16)
    return (header + segment + no_executable_stack).ljust(4096, b"\0") + page


def message() -> bytes:
    """What is to stand at MESSAGE when the stub begins: struct msghdr, a control message, struct iovec."""
    base = MAILBOX + MESSAGE
    vector, control = base + 0x60, base + 0x40
    header = pack("<QQQQQQQ", 0, 0, vector, 1, control, 24, 0).ljust(0x40, b"\0")
    rights = pack("<QIII", 20, 1, 1, 0).ljust(0x20, b"\0")  # SOL_SOCKET, SCM_RIGHTS, and at MESSAGE_FD the descriptor
    return header + rights + pack("<QQ", vector, 1)
