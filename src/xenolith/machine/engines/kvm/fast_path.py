"""The fast path: system calls, returns from them and the cheapest hypercalls, without an exit to Python.

For hosts where an exit is dear and SYSCALL arrives at CPL 3 (`HostTraits.syscall_cpl`), and where guest code may write
its segment bases.  What needs no privilege is code at CPL 3, on a page that LSTAR points to.  The one thing that does,
the change of page tables between guest-user and guest-kernel mode, is INT3 to a *gate*, a few instructions at CPL 0.

**Two views.**  A guest kernel's L4 tables map the hypervisor area in another view than those of its programs
(`Engine.user_l4_entries`): the same address holds the code for system calls in one and that for hypercalls in the
other, and the data is in the kernel's view alone.  So the mode a vCPU is in *is* the table it is on, and nothing
depends on what guest code says it is.

**What a guest can do with it.**  The code at CPL 3 is the guest's to jump into, and its data the guest kernel's to
write, at any time.  The gates lead to nothing but the vCPU's own two tables, which the hypervisor has validated, at
CPL 3, so a guest kernel can only confuse itself; what Python takes back from the data (`leave`) it checks.  A program
can reach only its own view: the gate, which goes on at `landing`.

**Ticks.**  While a program computes, KVM's local timer interrupts it in time for each tick of its kernel, and the gate
for that leads to code which does what the hypervisor would: the event becomes pending, the upcall is bounced.  `run.c`
sets the timer (`start_ticks`); any exit ends it.

**Interruptions.**  Whatever stops the vCPU within this code, a kick or a fault, is undone by `roll_back`: the
SYSCALL instruction has just been executed, and Python, which remains the reference for all of it, carries it out.  A
tick becomes a timer that is due.

Listings: a line is a label, or an encoding and its text; `{name}` is a constant (of 4 bytes, with `:2` of 2), `{.name}`
the distance to a label (`:1` of one byte) and `{@name}` that to a field of the data page.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from struct import Struct
from typing import TYPE_CHECKING, Final

from xenolith.abi.hypercalls import HYPERVISOR_iret
from xenolith.abi.layout import (
    FLAT_RING3_CS64,
    FLAT_RING3_SS64,
    SHARED_EVTCHN_MASK,
    SHARED_EVTCHN_PENDING,
    VCPU_INFO_PENDING_SEL,
)
from xenolith.abi.x86 import (
    CS,
    EFLAGS_IF,
    EFLAGS_RF,
    GS_BASE,
    PAGE_SHIFT,
    PAGE_SIZE,
    R11,
    RAX,
    RCX,
    RFLAGS,
    RIP,
    RSP,
    SS,
    is_canonical,
)
from xenolith.machine.engines.kvm import area
from xenolith.machine.engines.kvm.alarm import host_tick_ns
from xenolith.machine.engines.protocol import TRAP_NOTHING, TRAP_SYSCALL
from xenolith.machine.native import buffer_address

if TYPE_CHECKING:
    from xenolith.machine.engines.kvm.alarm import Alarm
    from xenolith.machine.engines.kvm.native_run import KvmFields
    from xenolith.machine.engines.protocol import GuestModes
    from xenolith.machine.memory import MachineMemory

_MASK64: Final = (1 << 64) - 1
NOTHING: Final = (1 << 64) - 1  # no machine address
_USER_RIP: Final = (1 << 47) - 1

# --- the data page: words that guest-kernel code and Python share ------------------------------------
FIELDS: Final = {
    name: number * 8
    for number, name in enumerate(
        (
            "kernel_sp",  # as the guest gave it to stack_switch
            "kernel_ss",
            "other_gs",  # GS base of the mode that the vCPU is not in
            "entry",  # the guest's system-call callback
            "user_cs",  # selectors with which an iret to guest-user mode may take the fast path
            "user_ss",
            "hold",  # not 0: irets go to Python
            "vcpu_id",
            "timer_from",  # a singleshot timer of this time (ns since boot) or later need not be told of at once
            "timer",  # such a one; 0: none
            "used",  # bit 0: a field above was changed, bit 1: the mode was
            "rip",  # where to go on in guest-user mode
            "saved_rcx",  # registers as SYSCALL left them
            "saved_r11",
            "saved_rsp",
            "switches",  # system calls not yet counted
            "ticks_left",  # that may be delivered here
            "tick_now",  # ns since boot at the local timer's last interrupt
            "tick_length",
            "tick_entry",  # the guest's event callback
            "tick_word",  # address in shared_info of the word with the port's bit, among those that are pending
            "tick_bit",
            "tick_selector",  # the word's bit in evtchn_pending_sel
            "tick_rip",  # where the program was interrupted
            "tick_flags",
            "tick_stack",
        )
    )
}
_WORD: Final = {name: offset // 8 for name, offset in FIELDS.items()}
NO_SELECTOR: Final = 1 << 16
_pack_fields = Struct("<11Q").pack_into  # those before `rip`
NO_TIMER: Final = (1 << 64) - 1
TIMER_SLOP: Final = 50_000  # ns by which a timer may be late (Xen: timer_slop)
TICKS: Final = 250  # before the hypervisor looks again

# --- code ----------------------------------------------------------------------------------------------
USER_CODE: Final = """
start:
    41 f7 c3 {other_flags}      test r11d, OTHER_FLAGS
    75 02                       jne slow
gate:
    cc                          int3
    90                          nop
slow:
    e6 {port:1}                 out PORT_SYSCALL, al
    f4                          hlt
"""

KERNEL_CODE: Final = """
start:
    e9 {.hypercall}             jmp hypercall
    90 90 90 90 90              nop
landing:
    48 89 0d {@saved_rcx}       mov [saved_rcx], rcx
    4c 89 1d {@saved_r11}       mov [saved_r11], r11
    48 89 25 {@saved_rsp}       mov [saved_rsp], rsp
landing_saved:
    80 3d {@@mask} 00           cmp byte [vcpu_info.evtchn_upcall_mask], 0
    75 {.landing_slow:1}        jne landing_slow
    48 8b 25 {@kernel_sp}       mov rsp, [kernel_sp]
    48 83 e4 f0                 and rsp, -16
    68 {ss}                     push FLAT_RING3_SS64
    ff 35 {@saved_rsp}          push qword [saved_rsp]
    41 81 cb 02 02 00 00        or r11d, IF | RESERVED_ONE
    41 81 e3 {user_flags}       and r11d, USER_FLAGS
    4c 89 1d {@saved_r11}       mov [saved_r11], r11
    41 53                       push r11
    68 {cs}                     push FLAT_RING3_CS64
    51                          push rcx
    41 53                       push r11
    51                          push rcx
    f3 48 0f ae c9              rdgsbase rcx
    4c 8b 1d {@other_gs}        mov r11, [other_gs]
landing_commit:
    f3 49 0f ae db              wrgsbase r11
landing_store:
    48 89 0d {@other_gs}        mov [other_gs], rcx
landing_stored:
    c6 05 {@@mask} 01           mov byte [vcpu_info.evtchn_upcall_mask], 1
    c6 05 {@used} 03            mov byte [used], 3
    48 ff 05 {@switches}        inc qword [switches]
    4c 8b 1d {@saved_r11}       mov r11, [saved_r11]
    48 8b 0d {@saved_rcx}       mov rcx, [saved_rcx]
    fc                          cld
    ff 25 {@entry}              jmp [entry]
landing_slow:
    e6 {port:1}                 out PORT_SYSCALL, al
    f4                          hlt
landing_end:

tick:
    48 89 25 {@saved_rsp}       mov [saved_rsp], rsp
tick_stack:
    48 8d 25 {@tick_stack}      lea rsp, [tick_stack]
tick_moved:
    9c                          pushf
    48 89 0d {@saved_rcx}       mov [saved_rcx], rcx
    4c 89 1d {@saved_r11}       mov [saved_r11], r11
tick_saved:
    48 8b 0d {@tick_now}        mov rcx, [tick_now]
    48 03 0d {@tick_length}     add rcx, [tick_length]
    48 89 0d {@tick_now}        mov [tick_now], rcx
    4c 8b 1d {@timer}           mov r11, [timer]
    49 ff cb                    dec r11
    49 39 cb                    cmp r11, rcx
    0f 83 {.tick_slow}          jae tick_slow
    48 83 3d {@ticks_left} 00   cmp qword [ticks_left], 0
    0f 84 {.tick_slow}          je tick_slow
    66 83 3d {@@pending} 00     cmp word [vcpu_info.evtchn_upcall_pending], 0
    0f 85 {.tick_slow}          jne tick_slow
    8b 0d {@user_cs}            mov ecx, [user_cs]
    c1 e9 10                    shr ecx, 16
    0f 85 {.tick_slow}          jne tick_slow
    8b 0d {@tick_flags}         mov ecx, [tick_flags]
    f7 c1 {other_flags}         test ecx, OTHER_FLAGS
    0f 85 {.tick_slow}          jne tick_slow
    48 8b 0d {@tick_rip}        mov rcx, [tick_rip]
    48 c1 e9 2f                 shr rcx, 47
    0f 85 {.tick_slow}          jne tick_slow
    48 8b 0d {@tick_bit}        mov rcx, [tick_bit]
    4c 8b 1d {@tick_word}       mov r11, [tick_word]
    49 85 0b                    test [r11], rcx
    0f 85 {.tick_slow}          jne tick_slow
    49 85 8b {mask_distance}    test [r11+MASK-PENDING], rcx
    0f 85 {.tick_slow}          jne tick_slow
    48 8b 25 {@kernel_sp}       mov rsp, [kernel_sp]
    48 83 e4 f0                 and rsp, -16
    ff 35 {@user_ss}            push qword [user_ss]
    ff 35 {@saved_rsp}          push qword [saved_rsp]
    ff 35 {@tick_flags}         push qword [tick_flags]
    ff 35 {@user_cs}            push qword [user_cs]
    ff 35 {@tick_rip}           push qword [tick_rip]
    ff 35 {@saved_r11}          push qword [saved_r11]
    ff 35 {@saved_rcx}          push qword [saved_rcx]
    f3 48 0f ae c9              rdgsbase rcx
    4c 8b 1d {@other_gs}        mov r11, [other_gs]
tick_commit:
    f3 49 0f ae db              wrgsbase r11
tick_store:
    48 89 0d {@other_gs}        mov [other_gs], rcx
tick_stored:
    c6 05 {@used} 03            mov byte [used], 3
    66 c7 05 {@@pending} 01 01  mov word [vcpu_info.evtchn_upcall_pending], 0x101
tick_masked:
    48 8b 0d {@tick_selector}   mov rcx, [tick_selector]
    f0 48 09 0d {@@selector}    lock or [vcpu_info.evtchn_pending_sel], rcx
    48 8b 0d {@tick_bit}        mov rcx, [tick_bit]
    4c 8b 1d {@tick_word}       mov r11, [tick_word]
    f0 49 09 0b                 lock or [r11], rcx
    48 8b 0d {@tick_length}     mov rcx, [tick_length]
    48 01 0d {@timer_from}      add [timer_from], rcx
    48 ff 0d {@ticks_left}      dec qword [ticks_left]
    31 c9                       xor ecx, ecx
    48 89 0d {@timer}           mov [timer], rcx
    4c 8b 1d {@saved_r11}       mov r11, [saved_r11]
    48 8b 0d {@saved_rcx}       mov rcx, [saved_rcx]
    ff 25 {@tick_entry}         jmp [tick_entry]
tick_slow:
    e6 {port:1}                 out PORT_SYSCALL, al
    f4                          hlt
tick_end:

hypercall:
    48 83 f8 17                 cmp rax, HYPERVISOR_iret
    0f 84 {.iret}               je iret
    48 83 f8 03                 cmp rax, HYPERVISOR_stack_switch
    74 {.stack_switch:1}        je stack_switch
    48 83 f8 19                 cmp rax, HYPERVISOR_set_segment_base
    74 {.segment_base:1}        je segment_base
    48 83 f8 18                 cmp rax, HYPERVISOR_vcpu_op
    74 {.vcpu_op:1}             je vcpu_op
slow:
    e6 {port:1}                 out PORT_SYSCALL, al
    f4                          hlt

stack_switch:
    48 89 3d {@kernel_ss}       mov [kernel_ss], rdi
    48 89 35 {@kernel_sp}       mov [kernel_sp], rsi
done:
    80 0d {@used} 01            or byte [used], 1
    41 53                       push r11
done_flags:
    9d                          popf
    b8 00 00 00 00              mov eax, 0
back:
    ff e1                       jmp rcx

segment_base:
    85 ff                       test edi, edi
    74 {.fs_base:1}             je fs_base
    83 ff 01                    cmp edi, SEGBASE_GS_USER
    75 {.slow:1}                jne slow
    48 89 0d {@saved_rcx}       mov [saved_rcx], rcx
gs_check:
    48 89 f1                    mov rcx, rsi
    48 c1 e1 10                 shl rcx, 16
    48 c1 f9 10                 sar rcx, 16
    48 39 f1                    cmp rcx, rsi
    48 8b 0d {@saved_rcx}       mov rcx, [saved_rcx]
gs_checked:
    0f 85 {.slow}               jne slow
    48 89 35 {@other_gs}        mov [other_gs], rsi
    e9 {.done}                  jmp done
fs_base:
    f3 48 0f ae d6              wrfsbase rsi
    e9 {.done}                  jmp done

vcpu_op:
    83 ff 08                    cmp edi, VCPUOP_set_singleshot_timer
    0f 85 {.slow}               jne slow
    3b 35 {@vcpu_id}            cmp esi, [vcpu_id]
    0f 85 {.slow}               jne slow
    83 7a 08 00                 cmp dword [rdx+0x8], 0
    0f 85 {.slow}               jne slow
    48 89 0d {@saved_rcx}       mov [saved_rcx], rcx
timer_check:
    48 8b 0a                    mov rcx, [rdx]
    48 3b 0d {@timer_from}      cmp rcx, [timer_from]
    72 {.timer_slow:1}          jb timer_slow
    48 89 0d {@timer}           mov [timer], rcx
    48 8b 0d {@saved_rcx}       mov rcx, [saved_rcx]
timer_checked:
    e9 {.done}                  jmp done
timer_slow:
    48 8b 0d {@saved_rcx}       mov rcx, [saved_rcx]
timer_restored:
    e9 {.slow}                  jmp slow

iret:
    48 89 0d {@saved_rcx}       mov [saved_rcx], rcx
    4c 89 1d {@saved_r11}       mov [saved_r11], r11
iret_saved:
    0f b7 4c 24 28              movzx ecx, word [rsp+0x28]
    3b 0d {@user_cs}            cmp ecx, [user_cs]
    0f 85 {.iret_slow}          jne iret_slow
    0f b7 4c 24 40              movzx ecx, word [rsp+0x40]
    3b 0d {@user_ss}            cmp ecx, [user_ss]
    0f 85 {.iret_slow}          jne iret_slow
    48 8b 4c 24 20              mov rcx, [rsp+0x20]
    49 89 cb                    mov r11, rcx
    49 c1 eb 2f                 shr r11, 47
    0f 85 {.iret_slow}          jne iret_slow
    4c 8b 5c 24 30              mov r11, [rsp+0x30]
    41 81 f3 00 02 00 00        xor r11d, IF
    41 f7 c3 {not_user_flags}   test r11d, OTHER_FLAGS & ~RF | IF
    0f 85 {.iret_slow}          jne iret_slow
    80 3d {@hold} 00            cmp byte [hold], 0
    0f 85 {.iret_slow}          jne iret_slow
    80 3d {@@pending} 00        cmp byte [vcpu_info.evtchn_upcall_pending], 0
    0f 85 {.iret_slow}          jne iret_slow
    48 89 0d {@rip}             mov [rip], rcx
    c6 05 {@@mask} 00           mov byte [vcpu_info.evtchn_upcall_mask], 0
    c6 05 {@used} 03            mov byte [used], 3
    f3 48 0f ae c9              rdgsbase rcx
    4c 8b 1d {@other_gs}        mov r11, [other_gs]
iret_commit:
    f3 49 0f ae db              wrgsbase r11
iret_store:
    48 89 0d {@other_gs}        mov [other_gs], rcx
iret_stored:
    48 8b 04 24                 mov rax, [rsp]
    f6 44 24 19 01              test byte [rsp+0x19], VGCF_in_syscall >> 8
    75 {.from_syscall:1}        jne from_syscall
    48 8b 4c 24 10              mov rcx, [rsp+0x10]
    4c 8b 5c 24 08              mov r11, [rsp+0x8]
    eb {.go:1}                  jmp go
from_syscall:
    48 8b 4c 24 20              mov rcx, [rsp+0x20]
    4c 8b 5c 24 30              mov r11, [rsp+0x30]
go:
    ff 74 24 30                 push qword [rsp+0x30]
iret_flags:
    9d                          popf
iret_stack:
    48 8b 64 24 38              mov rsp, [rsp+0x38]
gate:
    cc                          int3
    90                          nop
iret_slow:
    e6 {port:1}                 out PORT_SYSCALL, al
    f4                          hlt
iret_end:
"""

# On the trap stack: RIP, CS, RFLAGS, RSP, SS.  Any INT3 comes here; `own` is what RIP is after this vCPU's own.
GATE_IN: Final = """
    50                          push rax
    48 8b 84 24 {in_rip}        mov rax, [rsp+in_rip]
    48 39 44 24 08              cmp [rsp+0x8], rax
    75 {.other:1}               jne other
checked:
    48 8b 84 24 {kernel_cr3}    mov rax, [rsp+kernel_cr3]
    0f 22 d8                    mov cr3, rax
tail:
    58                          pop rax
    48 cf                       iretq
other:
    58                          pop rax
    e6 03                       out 3, al
    f4                          hlt
"""
GATE_OUT: Final = """
    50                          push rax
    48 8b 84 24 {rip}           mov rax, [rsp+rip]
    48 87 44 24 08              xchg [rsp+0x8], rax
exchanged:
    48 39 84 24 {out_rip}       cmp [rsp+out_rip], rax
    75 {.other:1}               jne other
checked:
    48 8b 84 24 {user_cr3}      mov rax, [rsp+user_cr3]
    0f 22 d8                    mov cr3, rax
tail:
    58                          pop rax
    48 cf                       iretq
other:
    48 89 44 24 08              mov [rsp+0x8], rax
    58                          pop rax
    e6 03                       out 3, al
    f4                          hlt
"""
# Without an error code: the word below RIP is free.  CPL 0 is the stub for SYSCALL by 32-bit code; for 32-bit code
# itself IRETQ faults, as that has no descriptor, and the tick is rolled back.  What is left in the kernel's view begins
# at `tail`.
GATE_TICK: Final = """
    f6 44 24 08 03              test byte [rsp+0x8], 3
    74 {.other:1}               je other
    50                          push rax
pushed:
    48 8b 84 24 {tick_cr3}      mov rax, [rsp+tick_cr3]
    0f 22 d8                    mov cr3, rax
tail:
    48 8b 84 24 {tick}          mov rax, [rsp+tick]
    48 87 44 24 08              xchg [rsp+0x8], rax
exchanged:
    48 89 84 24 {tick_rip}      mov [rsp+tick_rip], rax
stored:
    58                          pop rax
    48 cf                       iretq
other:
    e6 {tick_port:1}            out PORT_TICK, al
    f4                          hlt
"""

_USER_FLAGS: Final = 0x0020_0ED7  # ID, OF, DF, IF, SF, ZF, AF, PF, CF, the reserved one
_TOKEN: Final = re.compile(r"\{(\.|@@|@)?(\w+)(?::(\d))?\}|\b([0-9a-f]{2})\b")


class Code:
    """A listing, assembled: its bytes and the offsets of its labels.

    `data`: distance from the start of the code to that of the data page; `info` to that of vcpu_info.
    """

    def __init__(self, listing: str, data: int = 0, info: int = 0, **constants: int) -> None:
        self.labels: dict[str, int] = {}
        lines: list[tuple[int, list[re.Match[str]]]] = []
        offset = 0
        for line in listing.splitlines():
            if line.endswith(":"):
                self.labels[line[:-1]] = offset
            elif line.strip():
                tokens = list(_TOKEN.finditer(line[:32]))
                offset += sum(_size(token) for token in tokens)
                lines.append((offset, tokens))
        targets = {
            ".": self.labels,
            "@": {name: data + place for name, place in FIELDS.items()},
            "@@": {"pending": info, "mask": info + 1, "selector": info + VCPU_INFO_PENDING_SEL},
        }
        self.code = b""
        for end, tokens in lines:
            for token in tokens:
                kind, name, _, byte = token.groups()
                if byte:
                    self.code += bytes.fromhex(byte)
                else:
                    value = targets[kind][name] - end if kind else constants[name]
                    size = _size(token)
                    if kind and not -(1 << 8 * size - 1) <= value < 1 << 8 * size - 1:
                        raise ValueError(f"{name} is too far away for {size} byte")
                    self.code += (value & (1 << 8 * size) - 1).to_bytes(size, "little")


def _size(token: re.Match[str]) -> int:
    return 1 if token[4] else int(token[3] or 4)


_CONSTANTS: Final = {
    "port": area.PORT_SYSCALL,
    "ss": FLAT_RING3_SS64,
    "cs": FLAT_RING3_CS64,
    "user_flags": _USER_FLAGS,
    "other_flags": ~_USER_FLAGS,
    "mask_distance": SHARED_EVTCHN_MASK - SHARED_EVTCHN_PENDING,
    # A fault leaves RF set, for instruction breakpoints, which there are none of where the fast path is used.
    "not_user_flags": ~(_USER_FLAGS | EFLAGS_RF) | EFLAGS_IF,
}
_USER: Final = Code(USER_CODE, **_CONSTANTS)
DATA_DISTANCE: Final = area.CPU_DATA - area.CPU_CODE
INFO_DISTANCE: Final = area.CPU_INFO - area.CPU_CODE


def kernel_code(info_offset: int) -> Code:
    """The code of the kernel's view for a vcpu_info at this offset in its page."""
    return Code(KERNEL_CODE, DATA_DISTANCE, INFO_DISTANCE + info_offset, **_CONSTANTS)


_AT: Final = kernel_code(0).labels
_WITHOUT_RCX: Final = (("gs_check", "gs_checked"), ("timer_check", "timer_checked"), ("timer_slow", "timer_restored"))
assert _AT["landing"] == _USER.labels["gate"] + 1


def _gates() -> tuple[Code, Code, Code]:
    # Offsets from RSP after the gate's push: the trap stack ends where the page of entry lists begins.
    top = 48
    words = {
        "in_rip": area.GATE_IN_RIP,
        "out_rip": area.GATE_OUT_RIP,
        "kernel_cr3": area.KERNEL_CR3,
        "user_cr3": area.USER_CR3,
        "tick_cr3": area.TICK_CR3,
        "tick": area.TICK_RIP,
    }
    places = {name: top + word * 8 for name, word in words.items()}
    for name in ("rip", "tick_rip"):
        places[name] = top + area.CPU_DATA - area.CPU_LIST + FIELDS[name]
    places["tick_port"] = area.PORT_TICK
    return Code(GATE_IN, **places), Code(GATE_OUT, **places), Code(GATE_TICK, **places)


GATE_IN_CODE, GATE_OUT_CODE, GATE_TICK_CODE = _gates()
GATE_IN_AT: Final = area.GATES
GATE_OUT_AT: Final = area.GATES + area.GATE_SPACING
GATE_TICK_AT: Final = area.GATES + 2 * area.GATE_SPACING


def gate_pages() -> tuple[bytes, bytes]:
    """The page of gates in the user's and in the kernel's view: each gate's end is in the view it leads to as well."""
    pages = bytearray(PAGE_SIZE), bytearray(PAGE_SIZE)
    for gate, place, view in (
        (GATE_IN_CODE, GATE_IN_AT, area.USER_VIEW),
        (GATE_OUT_CODE, GATE_OUT_AT, area.KERNEL_VIEW),
        (GATE_TICK_CODE, GATE_TICK_AT, area.USER_VIEW),
    ):
        start, tail = place - area.GATES, place - area.GATES + gate.labels["tail"]
        pages[view][start : start + len(gate.code)] = gate.code
        end = gate.code[gate.labels["tail"] :]
        pages[1 - view][tail : tail + len(end)] = end
    return bytes(pages[0]), bytes(pages[1])


class FastPath:
    """The fast path of one vCPU. All but `follow` is called around KVM_RUN."""

    def __init__(
        self,
        memory: MachineMemory,
        pages: area.CpuPages,
        regs: memoryview,
        has_view: Callable[[int, int], bool],
        info_moved: Callable[[], None],
        alarm: Alarm,
        shared: KvmFields,
    ) -> None:
        self._memory = memory
        self._alarm = alarm
        self._info_moved = info_moved  # a present entry of the area changed
        self._has_view = has_view  # whether an L4 maps the area in that view
        self._pages = pages
        self._data = pages.data
        self._data_bytes = pages.data.cast("B")
        self._list = pages.list
        self._regs = regs
        self._modes: GuestModes | None = None
        self._info = -1  # machine address that the code was made for
        self.timer_told = False  # the hypervisor was told of a timer: it had better look for events
        self._shared = shared
        shared.data = buffer_address(pages.data)
        shared.kernel_code, shared.user_code = buffer_address(pages.kernel_code), buffer_address(pages.user_code)
        shared.code_va = code = pages.code_va
        shared.slow[:] = _USER.labels["slow"], _AT["slow"]
        shared.landing_slow, shared.iret_slow = _AT["landing_slow"], _AT["iret_slow"]
        for on in (False, True):
            shared.kernel_start[on][:] = b"\xe9" + (_AT["hypercall" if on else "slow"] - 5).to_bytes(4, "little")
            shared.user_start[on][:] = _USER.code[:2] if on else bytes((0xEB, _USER.labels["slow"] - 2))
        shared.gate_rips[:] = code + _AT["landing"], code + _AT["gate"] + 1
        shared.shared_va = pages.shared_va
        pages.list[area.TICK_CR3], pages.list[area.TICK_RIP] = area.NO_CR3, code + _AT["tick"]
        pages.user_code[: len(_USER.code)] = _USER.code
        self._make_kernel_code(0)
        self._turn(False)

    def follow(self, modes: GuestModes | None) -> None:
        """Whose modes to switch; None: nobody's."""
        self._modes = modes
        self._shared.info = NOTHING
        if modes is None:
            self._turn(False)

    def alarm_is_off(self) -> None:
        """The alarm goes to another thread now, and has to be set anew."""
        self._shared.look = 0
        self._shared.alarm, self._shared.has_alarm = self._alarm.timer, True
        self._shared.host_tick = host_tick_ns()

    @property
    def on(self) -> bool:
        """Whether it is in use now."""
        return self._shared.on

    def enter(self) -> None:
        """Before the guest runs."""
        modes = self._modes
        if modes is None:
            return
        shared = self._shared
        if (
            modes.kernel_l4 != shared.kernel_l4
            or modes.user_l4 != shared.user_l4
            or modes.info != shared.info
            or modes.syscall_callback != shared.callback
            or modes.syscall_masks_events != shared.masks_events
        ):
            self._configure(modes)
        if not shared.on:
            return
        regs = self._regs
        if not modes.kernel_mode and not modes.compatibility:
            shared.pair_cs, shared.pair_ss = regs[CS] & 0xFFFF, regs[SS] & 0xFFFF
        look = modes.timer_look
        if look and look != shared.look:
            left = modes.until(look)
            if left > 0:
                shared.look = look
                self._alarm.set(left)
            else:  # nobody would look again: the guest's timer is to be told of
                modes.timer_look = look = 0
        known = (shared.pair_cs, shared.pair_ss) in modes.flat_selectors
        _pack_fields(
            self._data_bytes,
            0,
            modes.kernel_sp & _MASK64,
            modes.kernel_ss,
            modes.other_gs_base,
            modes.syscall_callback,
            shared.pair_cs if known else NO_SELECTOR,
            shared.pair_ss,
            modes.nmi_masked,
            modes.vcpu_id,
            look - TIMER_SLOP if look else NO_TIMER,
            0,
            0,
        )

    def leave(self, l4_mfn: int) -> bool | None:
        """After the guest ran: take over what the fast path did.

        The mode (True: guest-kernel) if it may have changed.
        """
        data, modes, shared = self._data, self._modes, self._shared
        used = data[_WORD["used"]]
        if modes is None or not shared.on:
            return None
        if not used and l4_mfn == (shared.kernel_l4 if modes.kernel_mode else shared.user_l4):
            return None
        modes.kernel_sp, modes.kernel_ss = data[_WORD["kernel_sp"]], data[_WORD["kernel_ss"]] & 0xFFFF
        modes.other_gs_base = _canonical(data[_WORD["other_gs"]])
        syscalls = data[_WORD["switches"]]
        if syscalls:
            data[_WORD["switches"]] = 0
            modes.count_syscalls(syscalls & 0xFFFF_FFFF)
        if data[_WORD["timer"]]:
            modes.set_timer_late(data[_WORD["timer"]])
            self.timer_told = True
        modes.kernel_mode = kernel = l4_mfn == shared.kernel_l4
        regs = self._regs
        if used & 2 or not kernel:
            pair = shared.pair_cs, shared.pair_ss
            regs[CS], regs[SS] = (FLAT_RING3_CS64, FLAT_RING3_SS64) if kernel else pair
        return kernel

    def roll_back(self, l4_mfn: int) -> tuple[int, int | None]:
        """The vCPU stopped in this code at CPL 3, its registers are in the register file; it was on this table.

        The table to be on, and what the stop counts as: TRAP_SYSCALL, just executed, TRAP_NOTHING,
        or None if the guest goes on at RIP.
        """
        regs, data = self._regs, self._data
        at = regs[RIP] - self._pages.code_va
        trap: int | None = TRAP_SYSCALL
        if not self.on or l4_mfn == self._shared.user_l4:
            pass
        elif _AT["landing"] <= at < _AT["landing_end"]:
            if at >= _AT["landing_saved"]:
                if _AT["landing_commit"] < at < _AT["landing_slow"]:
                    self._undo_gs(at == _AT["landing_store"])
                if _AT["landing_stored"] < at < _AT["landing_slow"]:
                    self._memory.b[self._info + 1] = 0
                self._restore_saved()
                regs[RSP] = data[_WORD["saved_rsp"]]
            l4_mfn = self._shared.user_l4
        elif _AT["tick"] <= at < _AT["tick_end"]:
            if at > _AT["tick_stack"]:
                regs[RSP] = data[_WORD["saved_rsp"]]
            if at >= _AT["tick_saved"]:
                if _AT["tick_commit"] < at < _AT["tick_slow"]:
                    self._undo_gs(at == _AT["tick_store"])
                if _AT["tick_masked"] <= at < _AT["tick_slow"]:
                    self._memory.b[self._info + 1] = 0
                self._restore_saved()
            if at > _AT["tick_moved"]:
                regs[RFLAGS] = data[_WORD["tick_flags"]]
            l4_mfn = self._to_interrupted(data[_WORD["tick_rip"]])
            if regs[RIP] & -PAGE_SIZE != self._pages.code_va:
                return l4_mfn, TRAP_NOTHING
        elif _AT["iret"] <= at < _AT["iret_end"]:
            if _AT["gate"] <= at < _AT["iret_slow"]:
                regs[RIP] = data[_WORD["rip"]] & _USER_RIP
                return self._shared.user_l4, None
            if at >= _AT["iret_saved"]:
                if _AT["iret_commit"] < at < _AT["gate"]:
                    self._undo_gs(at == _AT["iret_store"])
                if at == _AT["iret_flags"]:
                    regs[RSP] = regs[RSP] + 8 & _MASK64
                self._restore_saved()
            regs[RAX] = HYPERVISOR_iret
        elif at == _AT["back"]:
            trap = None
        elif at == _AT["done_flags"]:
            regs[RSP] = regs[RSP] + 8 & _MASK64
        elif any(_AT[first] <= at < _AT[last] for first, last in _WITHOUT_RCX):
            regs[RCX] = data[_WORD["saved_rcx"]]
        regs[RIP] = regs[RCX]
        regs[RFLAGS] = regs[R11]
        return l4_mfn, trap

    def finish_gate(self, rip: int) -> int | None:
        """The vCPU stopped at CPL 0, at `rip`: if in a gate, it is as if it stopped before or behind it.

        The table to be on; None: not in a gate, or not by this vCPU's own INT3.
        """
        regs, frame = self._regs, self._pages.frame
        pushed, returns_to, selector, flags, stack, _ = frame
        for gate, start, own in (
            (GATE_IN_CODE, GATE_IN_AT, area.GATE_IN_RIP),
            (GATE_OUT_CODE, GATE_OUT_AT, area.GATE_OUT_RIP),
        ):
            at, labels = rip - start, gate.labels
            if 0 <= at < labels["other"]:
                if "exchanged" in labels and labels["exchanged"] <= at < labels["checked"]:
                    returns_to = regs[RAX]
                if at < labels["checked"] and returns_to != self._list[own]:
                    return None
                if 0 < at <= labels["tail"]:
                    regs[RAX] = pushed
                regs[RSP], regs[RFLAGS] = stack, flags
                regs[RIP] = self._pages.code_va + _USER.labels["gate"]
                if gate is GATE_OUT_CODE:
                    regs[RIP] = self._data[_WORD["rip"]] & _USER_RIP
                return self._shared.user_l4
        at, labels = rip - GATE_TICK_AT, GATE_TICK_CODE.labels
        if not 0 <= at < labels["other"] or not selector & 3:
            return None
        if at == labels["exchanged"]:
            returns_to = regs[RAX]
        elif at > labels["exchanged"]:
            returns_to = self._data[_WORD["tick_rip"]]
        if labels["pushed"] <= at <= labels["stored"]:
            regs[RAX] = pushed
        regs[RSP], regs[RFLAGS] = stack, flags
        return self._to_interrupted(returns_to)

    def _to_interrupted(self, rip: int) -> int:
        """The vCPU is to go on where the local timer interrupted it, on the table that this gives."""
        self.timer_told = True
        self._regs[RIP] = rip
        return self._shared.user_l4

    def stop_ticks(self) -> None:
        """There are no more: take over what was delivered."""
        self._list[area.TICK_CR3] = area.NO_CR3
        self._shared.look = 0  # nor is there an alarm
        count = TICKS - self._data[_WORD["ticks_left"]]
        if self._modes is not None and 0 < count <= TICKS:
            self._modes.count_ticks(count, self._shared.tick_length)

    def _undo_gs(self, in_rcx: bool) -> None:
        regs, data = self._regs, self._data
        other = regs[RCX] if in_rcx else data[_WORD["other_gs"]]
        data[_WORD["other_gs"]], regs[GS_BASE] = regs[GS_BASE], _canonical(other)

    def _restore_saved(self) -> None:
        regs, data = self._regs, self._data
        regs[RCX], regs[R11] = data[_WORD["saved_rcx"]], data[_WORD["saved_r11"]]

    # --- turning it on and off ----------------------------------------------------------------------------

    def _configure(self, modes: GuestModes) -> None:
        self._turn(False)
        shared = self._shared
        shared.kernel_l4, shared.user_l4 = kernel, user = modes.kernel_l4, modes.user_l4
        shared.info, shared.callback = modes.info, modes.syscall_callback
        shared.masks_events = modes.syscall_masks_events
        shared.info_mapped = modes.info == self._info
        if not (user and kernel and modes.syscall_callback and modes.syscall_masks_events):
            return
        if not (self._has_view(kernel, area.KERNEL_VIEW) and self._has_view(user, area.USER_VIEW)):
            return
        if modes.info != self._info:
            if self._pages.map_info(modes.info >> PAGE_SHIFT, modes.shared_info >> PAGE_SHIFT):
                self._info_moved()
            self._make_kernel_code(modes.info & PAGE_SIZE - 1)
            self._info = modes.info
            shared.info_mapped = True
        self._list[area.KERNEL_CR3], self._list[area.USER_CR3] = kernel << PAGE_SHIFT, user << PAGE_SHIFT
        self._turn(True)

    def _make_kernel_code(self, info_offset: int) -> None:
        code = kernel_code(info_offset).code
        self._pages.kernel_code[: len(code)] = code

    def _turn(self, on: bool) -> None:
        """While it is off both views begin with a jump to where they leave for Python, and the gates are closed."""
        shared = self._shared
        shared.on = on
        self._pages.kernel_code[:5] = bytes(shared.kernel_start[on])
        self._pages.user_code[:2] = bytes(shared.user_start[on])
        self._list[area.GATE_IN_RIP], self._list[area.GATE_OUT_RIP] = shared.gate_rips if on else (0, 0)


def _canonical(address: int) -> int:
    """The address, or 0 where it is none: no processor would have taken it."""
    return address if is_canonical(address) else 0
