"""The code of the fast path, as listings: what vCPUs execute without a trap, at CPL 3 and, in the gates, at CPL 0.

See fast_path, which says what all of it is for and why it is sound.

In the listings (see machine.listing) `{@name}` is the distance to a field of the data page or of vcpu_info.
"""

from __future__ import annotations

from typing import Final

from xenolith.abi.hypercalls import (
    SEGBASE_GS_USER,
    HYPERVISOR_iret,
    HYPERVISOR_set_segment_base,
    HYPERVISOR_stack_switch,
    HYPERVISOR_vcpu_op,
    VCPUOP_set_singleshot_timer,
)
from xenolith.abi.layout import (
    FLAT_RING3_CS64,
    FLAT_RING3_SS64,
    SHARED_EVTCHN_MASK,
    SHARED_EVTCHN_PENDING,
    VCPU_INFO_PENDING_SEL,
)
from xenolith.abi.x86 import EFLAGS_IF, EFLAGS_RF, PAGE_SIZE
from xenolith.machine.engines.kvm import area
from xenolith.machine.listing import Code, assemble

NOTHING: Final = (1 << 64) - 1  # no machine address

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
WORD: Final = {name: offset // 8 for name, offset in FIELDS.items()}
NO_SELECTOR: Final = 1 << 16
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
    80 3d {@mask} 00           cmp byte [vcpu_info.evtchn_upcall_mask], 0
    0f 85 {.landing_slow}       jne landing_slow
    48 8b 25 {@kernel_sp}       mov rsp, [kernel_sp]
    48 83 e4 f0                 and rsp, -16
    9c                          pushf
    f7 04 24 {other_flags}      test dword [rsp], OTHER_FLAGS
    0f 85 {.landing_slow}       jne landing_slow
    48 8d 64 24 08              lea rsp, [rsp+0x8]
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
    c6 05 {@mask} 01           mov byte [vcpu_info.evtchn_upcall_mask], 1
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
    66 83 3d {@pending} 00     cmp word [vcpu_info.evtchn_upcall_pending], 0
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
    66 c7 05 {@pending} 01 01  mov word [vcpu_info.evtchn_upcall_pending], 0x101
tick_masked:
    48 8b 0d {@tick_selector}   mov rcx, [tick_selector]
    f0 48 09 0d {@selector}    lock or [vcpu_info.evtchn_pending_sel], rcx
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
    48 83 f8 {iret:1}           cmp rax, HYPERVISOR_iret
    0f 84 {.iret}               je iret
    48 83 f8 {stack:1}          cmp rax, HYPERVISOR_stack_switch
    74 {.stack_switch:1}        je stack_switch
    48 83 f8 {base:1}           cmp rax, HYPERVISOR_set_segment_base
    74 {.segment_base:1}        je segment_base
    48 83 f8 {vcpu:1}           cmp rax, HYPERVISOR_vcpu_op
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
    83 ff {gs_user:1}           cmp edi, SEGBASE_GS_USER
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
    83 ff {timer:1}             cmp edi, VCPUOP_set_singleshot_timer
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
    80 3d {@pending} 00        cmp byte [vcpu_info.evtchn_upcall_pending], 0
    0f 85 {.iret_slow}          jne iret_slow
    48 89 0d {@rip}             mov [rip], rcx
    c6 05 {@mask} 00           mov byte [vcpu_info.evtchn_upcall_mask], 0
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

_CONSTANTS: Final = {
    "port": area.PORT_SYSCALL,
    "ss": FLAT_RING3_SS64,
    "cs": FLAT_RING3_CS64,
    "user_flags": _USER_FLAGS,
    "other_flags": ~_USER_FLAGS,
    "iret": HYPERVISOR_iret,
    "stack": HYPERVISOR_stack_switch,
    "base": HYPERVISOR_set_segment_base,
    "vcpu": HYPERVISOR_vcpu_op,
    "gs_user": SEGBASE_GS_USER,
    "timer": VCPUOP_set_singleshot_timer,
    "mask_distance": SHARED_EVTCHN_MASK - SHARED_EVTCHN_PENDING,
    # A fault leaves RF set, for instruction breakpoints, which there are none of where the fast path is used.
    "not_user_flags": ~(_USER_FLAGS | EFLAGS_RF) | EFLAGS_IF,
}
USER: Final = assemble(USER_CODE, _CONSTANTS)
DATA_DISTANCE: Final = area.CPU_DATA - area.CPU_CODE
INFO_DISTANCE: Final = area.CPU_INFO - area.CPU_CODE


def kernel_code(info_offset: int) -> Code:
    """The code of the kernel's view for a vcpu_info at this offset in its page."""
    info = INFO_DISTANCE + info_offset
    places = {name: DATA_DISTANCE + place for name, place in FIELDS.items()}
    places |= {"pending": info, "mask": info + 1, "selector": info + VCPU_INFO_PENDING_SEL}
    return assemble(KERNEL_CODE, _CONSTANTS, places)


AT: Final = kernel_code(0).labels
WITHOUT_RCX: Final = (("gs_check", "gs_checked"), ("timer_check", "timer_checked"), ("timer_slow", "timer_restored"))
assert AT["landing"] == USER.labels["gate"] + 1


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
    return assemble(GATE_IN, places), assemble(GATE_OUT, places), assemble(GATE_TICK, places)


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
