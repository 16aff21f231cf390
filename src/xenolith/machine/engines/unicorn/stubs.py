"""The machine code between QEMU and Python.

A trap that costs Python a microsecond must not spend half of it on finding out what happened.  So QEMU's hooks
call a few instructions of our own, which put a trap's vector, error code and address into argument registers and call
the Python trap handler once; and what ring 0 asks of the engine at almost every trap (flags, TLB flushes, mode
switches) is one call into machine code.  Everything that decides anything is in Python.

Names in the listings (see machine.listing) are filled in when an engine is made: addresses (8 bytes) and numbers of
layout.py (4 bytes).  System V calling convention.
"""

from __future__ import annotations

from typing import Final

from xenolith.abi.x86 import CR4_OSXSAVE
from xenolith.machine.engines.unicorn import layout
from xenolith.machine.listing import assemble

NUMBERS: Final = {
    "cr2": layout.CR + 2 * 8,
    "cr3": layout.CR + 3 * 8,
    "eip": layout.EIP,
    "hflags": layout.HFLAGS,
    "hf_kernel": layout.HF_KERNEL,
    "hf_cs64": layout.HF_CS64,
    "not_hf_addseg": ~layout.HF_ADDSEG,
    "hf_64_bit": layout.HF_CS64 | layout.HF_CS32 | layout.HF_SS32,
    "cs_base": layout.CS_BASE,
    "cs_limit": layout.SEGMENTS + layout.SEGMENT_SIZE + 16,
    "cs_flags": layout.SEGMENTS + layout.SEGMENT_SIZE + 20,
    "ss_base": layout.SEGMENTS + 2 * layout.SEGMENT_SIZE + 8,
    "ss_limit": layout.SEGMENTS + 2 * layout.SEGMENT_SIZE + 16,
    "ss_flags": layout.SEGMENTS + 2 * layout.SEGMENT_SIZE + 20,
    "tcg_uc": layout.TCG_UC,
    "tcg_env": layout.TCG_ENV,
    "no_exit_request": layout.UC_NO_EXIT_REQUEST,
    "op_ld_i32": layout.TCG_OP_LD_I32,
    "op_set_label": layout.TCG_OP_SET_LABEL,
    "cond_lt": layout.TCG_COND_LT,
    "tcg_unused": layout.TCG_UNUSED,
    "tcg_last_op": layout.TCG_LAST_OP,
    "call_function": layout.CALL_FUNCTION,
    "call_function_3": layout.CALL_FUNCTION + 8,  # of a call with three arguments or results
    "not_mxcsr": ~layout.MXCSR_DEFINED,
    "cr4": layout.CR + 32,
    "osxsave": CR4_OSXSAVE,
    "map": layout.UC_PAGE_MAP,
    "map_size": layout.UC_PAGE_MAP + 16,
    "map_shift": layout.UC_PAGE_MAP + 20,
    "map_levels": layout.UC_PAGE_MAP + 24,
    "flat_code": layout.FLAT_CODE64,
    "flat_data": layout.FLAT_DATA,
    "error_code": layout.ERROR_CODE,
    "is_int": layout.ERROR_CODE + 4,
    "dr6": layout.DR + 6 * 8,
    "old_exception": layout.OLD_EXCEPTION,
    "settable_flags": layout.SETTABLE_FLAGS,
    "cpu_state": layout.CPU_STATE,
    "env_of_cpu": -layout.CPU_STATE,
    "pc_next": layout.BLOCK_PC_NEXT,
    "block_flags": layout.TB_FLAGS,
    "undefined": layout.UNDEFINED,
    "undefined_of_cpu": layout.UNDEFINED - layout.CPU_STATE,
    "dirty": layout.TLB_DIRTY,
    "parked_fast": layout.TLB_FAST + layout.MMU_PARKED * layout.TLB_FAST_SIZE,
    "used_fast": layout.TLB_FAST + layout.MMU_USER * layout.TLB_FAST_SIZE,
    "parked_pair": layout.TLB_DESCRIPTION + layout.MMU_PARKED * layout.TLB_DESCRIPTION_SIZE - 16,
    "used_pair": layout.TLB_DESCRIPTION + layout.MMU_USER * layout.TLB_DESCRIPTION_SIZE - 16,
    "parked_last": layout.TLB_DESCRIPTION + (layout.MMU_PARKED + 1) * layout.TLB_DESCRIPTION_SIZE - 8,
    "used_last": layout.TLB_DESCRIPTION + (layout.MMU_USER + 1) * layout.TLB_DESCRIPTION_SIZE - 8,
    "tlb_even": layout.TLB_DESCRIPTION_SIZE // 8 - 1,  # words, an odd number, without the last
    **{
        f"{name}_{kind}": layout.TLB_DESCRIPTION + index * layout.TLB_DESCRIPTION_SIZE + offset
        for name, index in (("parked", layout.MMU_PARKED), ("user", layout.MMU_USER), ("system", layout.MMU_SYSTEM))
        for kind, offset in (("used", layout.TLB_DESCRIPTION_USED), ("victim", layout.TLB_DESCRIPTION_VICTIM))
    },
}


def encode(listing: str, **names: int) -> bytes:
    """The machine code of a listing; `names` gives its addresses, and `trap` if it has one."""
    return assemble(listing, NUMBERS | names).code


# get_rflags() -> flags
GET_RFLAGS: Final = """
    48 bf {env:8}                 mov rdi, env
    48 b8 {read_eflags:8}         mov rax, read_eflags
    ff e0                         jmp rax
"""

# set_rflags(flags)
SET_RFLAGS: Final = """
    48 89 fe                      mov rsi, rdi
    48 bf {env:8}                 mov rdi, env
    ba {settable_flags}           mov edx, settable_flags
    48 b8 {write_eflags:8}        mov rax, write_eflags
    ff e0                         jmp rax
"""

# flush_tlb(): every TLB that may hold anything: that counts entries, or has used its victim entries.  QEMU's own note
# of that, `dirty`, does not follow the exchange of TLBs.
FLUSH_TLB: Final = """
    48 ba {env:8}                  mov rdx, env
    31 f6                          xor esi, esi
    48 8b 82 {parked_used}         mov rax, qword [rdx+parked_used]
    48 0b 82 {parked_victim}       or rax, qword [rdx+parked_victim]
    74 {.1:1}                      je 1
    83 ce 01                       or esi, 0x1
1:
    48 8b 82 {user_used}           mov rax, qword [rdx+user_used]
    48 0b 82 {user_victim}         or rax, qword [rdx+user_victim]
    74 {.2:1}                      je 2
    83 ce 02                       or esi, 0x2
2:
    48 8b 82 {system_used}         mov rax, qword [rdx+system_used]
    48 0b 82 {system_victim}       or rax, qword [rdx+system_victim]
    74 {.3:1}                      je 3
    83 ce 04                       or esi, 0x4
3:
    66 c7 82 {dirty} 07 00         mov word [rdx+dirty], 0x7
    48 8d ba {cpu_state}           lea rdi, [rdx+cpu_state]
    48 b8 {tlb_flush_by_mmuidx:8}  mov rax, tlb_flush_by_mmuidx
    ff e0                          jmp rax
"""

# flush_page(va)
FLUSH_PAGE: Final = """
    48 89 fe                      mov rsi, rdi
    48 bf {cpu:8}                 mov rdi, cpu
    48 b8 {tlb_flush_page:8}      mov rax, tlb_flush_page
    ff e0                         jmp rax
"""

# switch_mode(l4_mfn, user): load CR3.  If the mode changes, exchange the two modes' TLBs and mark the flags; and a
# guest kernel is entered in 64-bit code, even if a far jump that nobody saw had left that.  If the TLB now in use holds
# another page table's translations, empty it; if the processor itself has used its TLB, empty that.
SWITCH_MODE: Final = """
    48 ba {env:8}                   mov rdx, env
    48 89 f8                        mov rax, rdi
    48 c1 e0 0c                     shl rax, 0xc
    48 89 82 {cr3}                  mov qword [rdx+cr3], rax
    40 0f b6 f6                     movzx esi, sil
    8b 8a {hflags}                  mov ecx, dword [rdx+hflags]
    c1 e9 1e                        shr ecx, 0x1e
    83 e1 01                        and ecx, 0x1
    31 f1                           xor ecx, esi
    0f 85 {.2}                      jne 2
    81 b2 {hflags} {hf_kernel}      xor dword [rdx+hflags], hf_kernel
    0f 10 82 {parked_fast}          movups xmm0, [rdx+parked_fast]
    0f 10 8a {used_fast}            movups xmm1, [rdx+used_fast]
    0f 11 8a {parked_fast}          movups [rdx+parked_fast], xmm1
    0f 11 82 {used_fast}            movups [rdx+used_fast], xmm0
    48 8b 82 {parked_last}          mov rax, qword [rdx+parked_last]
    4c 8b 82 {used_last}            mov r8, qword [rdx+used_last]
    4c 89 82 {parked_last}          mov qword [rdx+parked_last], r8
    48 89 82 {used_last}            mov qword [rdx+used_last], rax
    b9 {tlb_even}                   mov ecx, tlb_even
1:
    0f 10 84 ca {parked_pair}       movups xmm0, [rdx+rcx*8+parked_pair]
    0f 10 8c ca {used_pair}         movups xmm1, [rdx+rcx*8+used_pair]
    0f 11 8c ca {parked_pair}       movups [rdx+rcx*8+parked_pair], xmm1
    0f 11 84 ca {used_pair}         movups [rdx+rcx*8+used_pair], xmm0
    83 e9 02                        sub ecx, 0x2
    75 {.1:1}                       jne 1
    85 f6                           test esi, esi
    75 {.2:1}                       jne 2
    8b 82 {hflags}                  mov eax, dword [rdx+hflags]
    a9 {hf_cs64}                    test eax, hf_cs64
    75 {.2:1}                       jne 2
    25 {not_hf_addseg}              and eax, not_hf_addseg
    0d {hf_64_bit}                  or eax, hf_64_bit
    89 82 {hflags}                  mov dword [rdx+hflags], eax
    48 c7 82 {cs_base} 00 00 00 00  mov qword [rdx+cs_base], 0x0
    c7 82 {cs_limit} ff ff ff ff    mov dword [rdx+cs_limit], 0xffffffff
    c7 82 {cs_flags} {flat_code}    mov dword [rdx+cs_flags], flat_code
    48 c7 82 {ss_base} 00 00 00 00  mov qword [rdx+ss_base], 0x0
    c7 82 {ss_limit} ff ff ff ff    mov dword [rdx+ss_limit], 0xffffffff
    c7 82 {ss_flags} {flat_data}    mov dword [rdx+ss_flags], flat_data
2:
    31 c9                           xor ecx, ecx
    49 b8 {l4_of_tlb:8}             mov r8, l4_of_tlb
    49 39 3c f0                     cmp qword [r8+rsi*8], rdi
    74 {.3:1}                       je 3
    49 89 3c f0                     mov qword [r8+rsi*8], rdi
    83 c9 02                        or ecx, 0x2
3:
    48 8b 82 {system_used}          mov rax, qword [rdx+system_used]
    48 0b 82 {system_victim}        or rax, qword [rdx+system_victim]
    74 {.4:1}                       je 4
    83 c9 04                        or ecx, 0x4
4:
    85 c9                           test ecx, ecx
    75 {.5:1}                       jne 5
    c3                              ret
5:
    66 c7 82 {dirty} 07 00          mov word [rdx+dirty], 0x7
    48 8d ba {cpu_state}            lea rdi, [rdx+cpu_state]
    89 ce                           mov esi, ecx
    48 b8 {tlb_flush_by_mmuidx:8}   mov rax, tlb_flush_by_mmuidx
    ff e0                           jmp rax
"""

# code_written(mfn): forget the frame's checksum, drop the blocks translated from it
CODE_WRITTEN: Final = """
    48 b8 {checksums:8}           mov rax, checksums
    48 c7 04 f8 00 00 00 00       mov qword [rax+rdi*8], 0x0
    48 89 fe                      mov rsi, rdi
    48 c1 e6 0c                   shl rsi, 0xc
    48 8d 96 00 10 00 00          lea rdx, [rsi+0x1000]
    48 bf {uc:8}                  mov rdi, uc
    48 b8 {invalidate:8}          mov rax, invalidate
    ff e0                         jmp rax
"""

# executable_mapped(mfn): if the checksum of the frame differs from the last one, drop the blocks translated from it
EXECUTABLE_MAPPED: Final = """
    48 89 fe                       mov rsi, rdi
    48 c1 e6 0c                    shl rsi, 0xc
    48 ba {memory:8}               mov rdx, memory
    48 01 f2                       add rdx, rsi
    49 b9 15 7c 4a 7f b9 79 37 9e  mov r9, 0x9e3779b97f4a7c15
    31 c0                          xor eax, eax
    45 31 c0                       xor r8d, r8d
    45 31 d2                       xor r10d, r10d
    45 31 db                       xor r11d, r11d
    b9 80 00 00 00                 mov ecx, 0x80
1:
    48 33 02                       xor rax, qword [rdx]
    4c 33 42 08                    xor r8, qword [rdx+0x8]
    4c 33 52 10                    xor r10, qword [rdx+0x10]
    4c 33 5a 18                    xor r11, qword [rdx+0x18]
    48 c1 c8 1d                    ror rax, 0x1d
    49 c1 c8 1d                    ror r8, 0x1d
    49 c1 ca 1d                    ror r10, 0x1d
    49 c1 cb 1d                    ror r11, 0x1d
    49 0f af c1                    imul rax, r9
    4d 0f af c1                    imul r8, r9
    4d 0f af d1                    imul r10, r9
    4d 0f af d9                    imul r11, r9
    48 83 c2 20                    add rdx, 0x20
    ff c9                          dec ecx
    75 {.1:1}                      jne 1
    49 c1 c8 10                    ror r8, 0x10
    49 c1 ca 20                    ror r10, 0x20
    49 c1 cb 30                    ror r11, 0x30
    4c 31 c0                       xor rax, r8
    4c 31 d0                       xor rax, r10
    4c 31 d8                       xor rax, r11
    48 83 c8 01                    or rax, 0x1
    49 b8 {checksums:8}            mov r8, checksums
    49 39 04 f8                    cmp qword [r8+rdi*8], rax
    74 {.2:1}                      je 2
    49 89 04 f8                    mov qword [r8+rdi*8], rax
    48 8d 96 00 10 00 00           lea rdx, [rsi+0x1000]
    48 bf {uc:8}                   mov rdi, uc
    48 b8 {invalidate:8}           mov rax, invalidate
    ff e0                          jmp rax
2:
    c3                             ret
"""

# Hook UC_HOOK_INTR(uc, vector, user_data): deliver(vector, error code, address, hook), stop if it returns false.
# INT n, except INT3 and INTO, is a #GP at the instruction.  old_exception is reset, else the next page fault would be a
# double fault.
INTERRUPT: Final = """
    49 b8 {env:8}                         mov r8, env
    41 c7 80 {old_exception} ff ff ff ff  mov dword [r8+old_exception], 0xffffffff
    89 f7                                 mov edi, esi
    41 8b b0 {error_code}                 mov esi, dword [r8+error_code]
    31 d2                                 xor edx, edx
    41 83 b8 {is_int} 00                  cmp dword [r8+is_int], 0x0
    75 {.1:1}                             jne 1
    83 ff 0e                              cmp edi, 0xe
    49 0f 44 90 {cr2}                     cmove rdx, qword [r8+cr2]
    83 ff 01                              cmp edi, 0x1
    49 0f 44 90 {dr6}                     cmove rdx, qword [r8+dr6]
    eb {.2:1}                             jmp 2
1:
    8d 47 fd                              lea eax, [rdi-0x3]
    83 f8 01                              cmp eax, 0x1
    76 {.2:1}                             jbe 2
    49 83 a8 {eip} 02                     sub qword [r8+eip], 0x2
    8d 34 fd 02 00 00 00                  lea esi, [rdi*8+0x2]
    bf 0d 00 00 00                        mov edi, 0xd
2:
    48 83 ec 08                           sub rsp, 0x8
    48 b9 {hook:8}                        mov rcx, hook
    48 b8 {deliver:8}                     mov rax, deliver
    83 ff 22                              cmp edi, 0x22
    75 {.3:1}                             jne 3
    48 b8 {deliver_cpuid:8}               mov rax, deliver_cpuid
3:
    ff d0                                 call rax
    84 c0                                 test al, al
    75 {.4:1}                             jne 4
    48 bf {uc:8}                          mov rdi, uc
    48 b8 {emu_stop:8}                    mov rax, emu_stop
    ff d0                                 call rax
4:
    48 83 c4 08                           add rsp, 0x8
    c3                                    ret
"""

# Hook UC_HOOK_INSN_INVALID(uc, user_data) -> true (go on): #UD, or INT 6
INVALID: Final = """
    49 b8 {env:8}                         mov r8, env
    41 c7 80 {old_exception} ff ff ff ff  mov dword [r8+old_exception], 0xffffffff
    bf 06 00 00 00                        mov edi, 0x6
    31 f6                                 xor esi, esi
    31 d2                                 xor edx, edx
    41 83 b8 {is_int} 00                  cmp dword [r8+is_int], 0x0
    74 {.1:1}                             je 1
    bf 0d 00 00 00                        mov edi, 0xd
    be 32 00 00 00                        mov esi, 0x32
1:
    48 83 ec 08                           sub rsp, 0x8
    48 b9 {hook:8}                        mov rcx, hook
    48 b8 {deliver_invalid:8}             mov rax, deliver_invalid
    ff d0                                 call rax
    84 c0                                 test al, al
    75 {.2:1}                             jne 2
    48 bf {uc:8}                          mov rdi, uc
    48 b8 {emu_stop:8}                    mov rax, emu_stop
    ff d0                                 call rax
2:
    b8 01 00 00 00                        mov eax, 0x1
    48 83 c4 08                           add rsp, 0x8
    c3                                    ret
"""

# Hook for SYSCALL and SYSENTER(uc, user_data): RIP goes past the instruction, whose length QEMU holds in r13 and adds
# again when we return
SYSTEM_CALL: Final = """
    49 b8 {env:8}                 mov r8, env
    4d 01 a8 {eip}                add qword [r8+eip], r13
    bf {trap}                     mov edi, trap
    31 f6                         xor esi, esi
    31 d2                         xor edx, edx
    48 83 ec 08                   sub rsp, 0x8
    48 b9 {hook:8}                mov rcx, hook
    48 b8 {deliver:8}             mov rax, deliver
    ff d0                         call rax
    49 b8 {env:8}                 mov r8, env
    4d 29 a8 {eip}                sub qword [r8+eip], r13
    84 c0                         test al, al
    75 {.1:1}                     jne 1
    48 bf {uc:8}                  mov rdi, uc
    48 b8 {emu_stop:8}            mov rax, emu_stop
    ff d0                         call rax
1:
    48 83 c4 08                   add rsp, 0x8
    c3                            ret
"""

# Hook for instructions that this Unicorn executes at CPL 3 but which must trap (CPUID, IN, OUT): raise a fault, at the
# instruction, with number `trap`.  Never returns.
RAISE_FAULT: Final = """
    48 bf {env:8}                 mov rdi, env
    be {trap}                     mov esi, trap
    31 d2                         xor edx, edx
    48 b8 {raise_exception:8}     mov rax, raise_exception
    ff e0                         jmp rax
"""

# uc_struct's function that finds the memory region of a machine address: there is one, all of machine memory.  QEMU
# also asks at every store to a page of which it takes note (notdirty_write, its TLB entry in rbp).  If no block was
# translated from the page, later stores need not come here: NOTDIRTY is taken from the entry, and "no region" ends
# notdirty_write.  Else that drops the blocks which the store overwrites; and the hook RETURN_FALSE, because it exists,
# keeps it from taking NOTDIRTY from the entry although other blocks of the page are left.
MEMORY_MAPPING: Final = """
    49 b8 {memory_size:8}         mov r8, memory_size
    4c 39 c6                      cmp rsi, r8
    73 {.1:1}                     jae 1
    48 b8 {region:8}              mov rax, region
    49 b8 {notdirty_return:8}     mov r8, notdirty_return
    4c 39 04 24                   cmp qword [rsp], r8
    74 {.2:1}                     je 2
    c3                            ret
1:
    48 b8 {find_region:8}         mov rax, find_region
    ff e0                         jmp rax
2:
    48 c1 ee 0c                   shr rsi, 0xc
    44 8b 8f {map_size}           mov r9d, dword [rdi+map_size]
    8b 8f {map_shift}             mov ecx, dword [rdi+map_shift]
    41 ff c9                      dec r9d
    48 89 f2                      mov rdx, rsi
    48 d3 ea                      shr rdx, cl
    49 21 d1                      and r9, rdx
    48 8b 97 {map}                mov rdx, qword [rdi+map]
    4a 8d 14 ca                   lea rdx, [rdx+r9*8]
    6b 8f {map_levels} 0a         imul ecx, dword [rdi+map_levels], 0xa
    eb {.4:1}                     jmp 4
3:
    48 8b 12                      mov rdx, qword [rdx]
    48 85 d2                      test rdx, rdx
    74 {.5:1}                     je 5
    49 89 f1                      mov r9, rsi
    49 d3 e9                      shr r9, cl
    41 81 e1 ff 03 00 00          and r9d, 0x3ff
    4a 8d 14 ca                   lea rdx, [rdx+r9*8]
    83 e9 0a                      sub ecx, 0xa
4:
    85 c9                         test ecx, ecx
    7f {.3:1}                     jg 3
    48 8b 12                      mov rdx, qword [rdx]
    48 85 d2                      test rdx, rdx
    74 {.5:1}                     je 5
    41 89 f1                      mov r9d, esi
    41 81 e1 ff 03 00 00          and r9d, 0x3ff
    4f 8d 0c 49                   lea r9, [r9+r9*2]
    4a 83 3c ca 00                cmp qword [rdx+r9*8], 0x0
    74 {.5:1}                     je 5
    c3                            ret
5:
    49 b8 {marked:8}              mov r8, marked
    41 c6 04 30 00                mov byte [r8+rsi], 0x0
    66 81 65 08 ff fb             and word [rbp+0x8], 0xfbff
    31 c0                         xor eax, eax
    c3                            ret
"""

# Hook UC_HOOK_EDGE_GENERATED(uc, block, previous block, user_data): a block (QEMU's own record of it is in rbx) was
# translated.  From now on stores to its pages are to be noticed, through whichever mapping: put NOTDIRTY into all
# TLB entries of these frames, unless that was done and not undone since.
BLOCK_MADE: Final = """
    48 8b 06                      mov rax, qword [rsi]
    48 3b 03                      cmp rax, qword [rbx]
    75 {.3:1}                     jne 3
    48 83 ec 08                   sub rsp, 0x8
    48 8b 4b 48                   mov rcx, qword [rbx+0x48]
    e8 {.1}                       call 1
    48 8b 4b 50                   mov rcx, qword [rbx+0x50]
    e8 {.1}                       call 1
    48 83 c4 08                   add rsp, 0x8
    c3                            ret
1:
    48 83 f9 ff                   cmp rcx, 0xffffffffffffffff
    74 {.2:1}                     je 2
    48 89 c8                      mov rax, rcx
    48 c1 e8 0c                   shr rax, 0xc
    49 b8 {marked:8}              mov r8, marked
    41 80 3c 00 00                cmp byte [r8+rax], 0x0
    75 {.2:1}                     jne 2
    41 c6 04 00 01                mov byte [r8+rax], 0x1
    48 be {memory:8}              mov rsi, memory
    48 01 ce                      add rsi, rcx
    48 bf {cpu:8}                 mov rdi, cpu
    ba 00 10 00 00                mov edx, 0x1000
    48 b8 {tlb_reset_dirty:8}     mov rax, tlb_reset_dirty
    ff e0                         jmp rax
2:
    c3                            ret
3:
    48 bf {cpu:8}                 mov rdi, cpu
    48 b8 {tlb_flush:8}           mov rax, tlb_flush
    ff e0                         jmp rax
"""

# Hook UC_HOOK_MEM_FETCH_PROT, which never happens: see MEMORY_MAPPING
RETURN_FALSE: Final = """
    31 c0                         xor eax, eax
    c3                            ret
"""

# In place of tcg_gen_callN(context, function, result, number of arguments, arguments), with which QEMU's translator
# makes a call of a helper: instead of that of helper_check_exit_request, at the start of every block, a jump to the
# block's end is made under the condition that a stop was requested (a negative word in front of env).  See
# exit_check.py.  And helpers that load MXCSR are called by way of the checks below.
CALL_MADE: Final = """
    48 b8 {check_exit_request:8}  mov rax, check_exit_request
    48 39 c6                      cmp rsi, rax
    75 {.1:1}                     jne 1
    48 8b 87 {tcg_uc}             mov rax, qword [rdi+tcg_uc]
    80 b8 {no_exit_request} 00    cmp byte [rax+no_exit_request], 0x0
    75 {.2:1}                     jne 2
1:
    48 b8 {ldmxcsr:8}             mov rax, ldmxcsr
    48 39 c6                      cmp rsi, rax
    0f 84 {.3}                    je 3
    48 b8 {fxrstor:8}             mov rax, fxrstor
    48 39 c6                      cmp rsi, rax
    0f 84 {.4}                    je 4
    48 b8 {xrstor:8}              mov rax, xrstor
    48 39 c6                      cmp rsi, rax
    0f 84 {.5}                    je 5
6:
    48 b8 {gen_call:8}            mov rax, gen_call
    ff e0                         jmp rax
2:
    53                            push rbx
    41 54                         push r12
    48 83 ec 08                   sub rsp, 0x8
    48 89 fb                      mov rbx, rdi
    31 f6                         xor esi, esi
    31 d2                         xor edx, edx
    48 b8 {temp_new:8}            mov rax, temp_new
    ff d0                         call rax
    49 89 c4                      mov r12, rax
    48 89 df                      mov rdi, rbx
    be {op_ld_i32}                mov esi, op_ld_i32
    4c 89 e2                      mov rdx, r12
    48 8b 8b {tcg_env}            mov rcx, qword [rbx+tcg_env]
    48 01 d9                      add rcx, rbx
    49 c7 c0 f0 ff ff ff          mov r8, 0xfffffffffffffff0
    48 b8 {gen_op3:8}             mov rax, gen_op3
    ff d0                         call rax
    48 89 df                      mov rdi, rbx
    48 b8 {new_label:8}           mov rax, new_label
    ff d0                         call rax
    48 89 83 {tcg_unused}         mov qword [rbx+tcg_unused], rax
    48 89 df                      mov rdi, rbx
    be {cond_lt}                  mov esi, cond_lt
    4c 89 e2                      mov rdx, r12
    48 29 da                      sub rdx, rbx
    31 c9                         xor ecx, ecx
    49 89 c0                      mov r8, rax
    48 b8 {gen_brcondi:8}         mov rax, gen_brcondi
    ff d0                         call rax
    48 89 df                      mov rdi, rbx
    4c 89 e6                      mov rsi, r12
    48 83 c4 08                   add rsp, 0x8
    41 5c                         pop r12
    5b                            pop rbx
    48 b8 {temp_free:8}           mov rax, temp_free
    ff e0                         jmp rax
3:
    49 ba {checked_ldmxcsr:8}     mov r10, checked_ldmxcsr
    eb {.7:1}                     jmp 7
4:
    49 ba {checked_fxrstor:8}     mov r10, checked_fxrstor
7:
    41 bb {call_function}         mov r11d, call_function
    eb {.8:1}                     jmp 8
5:
    49 ba {checked_xrstor:8}      mov r10, checked_xrstor
    41 bb {call_function_3}       mov r11d, call_function_3
8:
    48 8b 87 {tcg_uc}             mov rax, qword [rdi+tcg_uc]
    80 b8 {no_exit_request} 00    cmp byte [rax+no_exit_request], 0x0
    0f 84 {.6}                    je 6
    57                            push rdi
    41 52                         push r10
    41 53                         push r11
    48 b8 {gen_call:8}            mov rax, gen_call
    ff d0                         call rax
    41 5b                         pop r11
    41 5a                         pop r10
    5f                            pop rdi
    48 8b 87 {tcg_last_op}        mov rax, qword [rdi+tcg_last_op]
    4e 89 14 18                   mov qword [rax+r11], r10
    c3                            ret
"""

# The end of a check that has failed: #GP
_FAILED: Final = """
1:
    48 8b 0c 24                   mov rcx, qword [rsp]
    31 d2                         xor edx, edx
    be 0d 00 00 00                mov esi, 0xd
    48 b8 {raise_exception_ra:8}  mov rax, raise_exception_ra
    ff e0                         jmp rax
"""

# In place of helper_ldmxcsr(env, value): #GP if the value has reserved bits, which that one lets pass
CHECKED_LDMXCSR: Final = (
    """
    f7 c6 {not_mxcsr}             test esi, not_mxcsr
    75 {.1:1}                     jne 1
    48 b8 {ldmxcsr:8}             mov rax, ldmxcsr
    ff e0                         jmp rax
"""
    + _FAILED
)

# Read the 32-bit word at `address`, or behind it: between these two it may be moved on
_SAVED: Final = """
    57                            push rdi
    56                            push rsi
    52                            push rdx
    48 8b 54 24 18                mov rdx, qword [rsp+0x18]
"""
_READ: Final = """
    48 b8 {ldl_data_ra:8}         mov rax, ldl_data_ra
    ff d0                         call rax
    5a                            pop rdx
    5e                            pop rsi
    5f                            pop rdi
"""
_TO_MXCSR: Final = """
    48 83 c6 18                   add rsi, 0x18
"""

# Likewise of helper_fxrstor(env, address) and helper_xrstor(env, address, components), for the MXCSR of that image,
# which must be aligned; one that is not there is missed at its beginning
CHECKED_FXRSTOR: Final = (
    """
    40 f6 c6 {unaligned:1}        test sil, unaligned
    75 {.2:1}                     jne 2
"""
    + (_SAVED + _READ)
    + (_SAVED + _TO_MXCSR + _READ)
    + """
    a9 {not_mxcsr}                test eax, not_mxcsr
    75 {.1:1}                     jne 1
2:
    48 b8 {restore:8}             mov rax, restore
    ff e0                         jmp rax
"""
    + _FAILED
)
# The latter is undefined with CR4.OSXSAVE clear, whatever lies there.
CHECKED_XRSTOR: Final = (
    """
    f6 c2 02                      test dl, 0x2
    74 {.2:1}                     je 2
    f7 87 {cr4} {osxsave}         test dword [rdi+cr4], osxsave
    74 {.2:1}                     je 2
"""
    + CHECKED_FXRSTOR
)

# In place of tcg_gen_exit_tb(context, block, exit): the last thing made of every block is an exit of number 3, "a stop
# was requested", to which nothing leads; that is where CALL_MADE's jump goes.
EXIT_MADE: Final = """
    83 fa 03                           cmp edx, 0x3
    75 {.1:1}                          jne 1
    48 8b 87 {tcg_unused}              mov rax, qword [rdi+tcg_unused]
    48 85 c0                           test rax, rax
    75 {.2:1}                          jne 2
1:
    48 b8 {exit_tb:8}                  mov rax, exit_tb
    ff e0                              jmp rax
2:
    48 c7 87 {tcg_unused} 00 00 00 00  mov qword [rdi+tcg_unused], 0x0
    80 08 01                           or byte [rax], 0x1
    57                                 push rdi
    56                                 push rsi
    52                                 push rdx
    be {op_set_label}                  mov esi, op_set_label
    48 89 c2                           mov rdx, rax
    48 b8 {gen_op1:8}                  mov rax, gen_op1
    ff d0                              call rax
    5a                                 pop rdx
    5e                                 pop rsi
    5f                                 pop rdi
    eb {.1:1}                          jmp 1
"""

# In place of tb_exec_unlock(uc), which does nothing on this host, but is called at the beginning of the function that
# ends a block, then in r13: forget_block(uc, block).  See softmmu.py.
UNLOCKED: Final = """
    48 b8 {invalidate_return:8}   mov rax, invalidate_return
    48 39 04 24                   cmp qword [rsp], rax
    75 {.1:1}                     jne 1
    4c 89 ee                      mov rsi, r13
    48 b8 {forget_block:8}        mov rax, forget_block
    ff e0                         jmp rax
1:
    c3                            ret
"""

# In place of translator_loop(operations, block, cpu, ...): with our own table of operations.  See vex.py.
TRANSLATE: Final = """
    48 bf {operations:8}          mov rdi, operations
    48 b8 {translator_loop:8}     mov rax, translator_loop
    ff e0                         jmp rax
"""

# In place of the operation translate_insn(block, cpu).  The instruction at the block's pc_next, behind any legacy and
# REX prefixes, is a far transfer if it begins with CA, CB, CF, 9A, EA, or FF /3 or /5, and translated as UD2.  It is
# VEX-encoded if it begins with C4 or C5; in 32-bit code those are LES and LDS unless the next byte's highest two bits
# are set.  Of these QEMU knows ANDN, BLSR and its kin, BZHI, PDEP, PEXT, MULX, BEXTR and the shifts (map 2, F2, F3,
# F5-F7) and RORX (map 3, F0).  Any other is translated as UD2.
TRANSLATE_INSTRUCTION: Final = """
    53                                          push rbx
    41 54                                       push r12
    41 55                                       push r13
    41 56                                       push r14
    48 83 ec 08                                 sub rsp, 0x8
    48 89 fb                                    mov rbx, rdi
    49 89 f4                                    mov r12, rsi
    4c 8b af {pc_next}                          mov r13, qword [rdi+pc_next]
1:
    4c 89 ee                                    mov rsi, r13
    e8 {.9}                                     call 9
    44 0f b6 f0                                 movzx r14d, al
    41 8d 8e 36 ff ff ff                        lea ecx, [r14+0xffffffffffffff36]
    83 f9 01                                    cmp ecx, 0x1
    0f 86 {.6}                                  jbe 6
    41 81 fe cf 00 00 00                        cmp r14d, 0xcf
    0f 84 {.6}                                  je 6
    41 81 fe 9a 00 00 00                        cmp r14d, 0x9a
    0f 84 {.6}                                  je 6
    41 81 fe ea 00 00 00                        cmp r14d, 0xea
    0f 84 {.6}                                  je 6
    41 81 fe ff 00 00 00                        cmp r14d, 0xff
    0f 84 {.8}                                  je 8
    41 8d 8e 3c ff ff ff                        lea ecx, [r14+0xffffffffffffff3c]
    83 f9 01                                    cmp ecx, 0x1
    76 {.3:1}                                   jbe 3
    44 89 f1                                    mov ecx, r14d
    81 e1 e7 00 00 00                           and ecx, 0xe7
    83 f9 26                                    cmp ecx, 0x26
    74 {.2:1}                                   je 2
    41 8d 4e 9c                                 lea ecx, [r14+0xffffffffffffff9c]
    83 f9 03                                    cmp ecx, 0x3
    76 {.2:1}                                   jbe 2
    41 81 fe f0 00 00 00                        cmp r14d, 0xf0
    74 {.2:1}                                   je 2
    41 8d 8e 0e ff ff ff                        lea ecx, [r14+0xffffffffffffff0e]
    83 f9 01                                    cmp ecx, 0x1
    76 {.2:1}                                   jbe 2
    48 8b 03                                    mov rax, qword [rbx]
    f7 80 {block_flags} {hf_cs64}               test dword [rax+block_flags], hf_cs64
    0f 84 {.7}                                  je 7
    41 81 e6 f0 00 00 00                        and r14d, 0xf0
    41 83 fe 40                                 cmp r14d, 0x40
    0f 85 {.7}                                  jne 7
2:
    49 ff c5                                    inc r13
    4c 89 e9                                    mov rcx, r13
    48 2b 8b {pc_next}                          sub rcx, qword [rbx+pc_next]
    48 83 f9 0e                                 cmp rcx, 0xe
    0f 82 {.1}                                  jb 1
    eb {.7:1}                                   jmp 7
3:
    49 8d 75 01                                 lea rsi, [r13+0x1]
    e8 {.9}                                     call 9
    48 8b 0b                                    mov rcx, qword [rbx]
    f7 81 {block_flags} {hf_cs64}               test dword [rcx+block_flags], hf_cs64
    75 {.4:1}                                   jne 4
    89 c1                                       mov ecx, eax
    81 e1 c0 00 00 00                           and ecx, 0xc0
    81 f9 c0 00 00 00                           cmp ecx, 0xc0
    75 {.7:1}                                   jne 7
4:
    41 81 fe c5 00 00 00                        cmp r14d, 0xc5
    74 {.6:1}                                   je 6
    83 e0 1f                                    and eax, 0x1f
    41 89 c6                                    mov r14d, eax
    83 e8 02                                    sub eax, 0x2
    83 f8 01                                    cmp eax, 0x1
    77 {.6:1}                                   ja 6
    49 8d 75 03                                 lea rsi, [r13+0x3]
    e8 {.9}                                     call 9
    0f b6 c0                                    movzx eax, al
    41 83 fe 03                                 cmp r14d, 0x3
    74 {.5:1}                                   je 5
    2d f2 00 00 00                              sub eax, 0xf2
    83 f8 05                                    cmp eax, 0x5
    77 {.6:1}                                   ja 6
    83 f8 02                                    cmp eax, 0x2
    75 {.7:1}                                   jne 7
    eb {.6:1}                                   jmp 6
5:
    3d f0 00 00 00                              cmp eax, 0xf0
    74 {.7:1}                                   je 7
6:
    41 c7 84 24 {undefined_of_cpu} 02 00 00 00  mov dword [r12+undefined_of_cpu], 0x2
7:
    48 89 df                                    mov rdi, rbx
    4c 89 e6                                    mov rsi, r12
    48 83 c4 08                                 add rsp, 0x8
    41 5e                                       pop r14
    41 5d                                       pop r13
    41 5c                                       pop r12
    5b                                          pop rbx
    48 b8 {translate_instruction:8}             mov rax, translate_instruction
    ff e0                                       jmp rax
8:
    49 8d 75 01                                 lea rsi, [r13+0x1]
    e8 {.9}                                     call 9
    83 e0 38                                    and eax, 0x38
    83 f8 18                                    cmp eax, 0x18
    74 {.6:1}                                   je 6
    83 f8 28                                    cmp eax, 0x28
    74 {.6:1}                                   je 6
    eb {.7:1}                                   jmp 7
9:
    49 8d bc 24 {env_of_cpu}                    lea rdi, [r12+env_of_cpu]
    48 b8 {load_byte:8}                         mov rax, load_byte
    ff e0                                       jmp rax
"""

# In place of cpu_ldub_code(env, va): the two bytes of UD2 when TRANSLATE_INSTRUCTION says so
LOAD_CODE_BYTE: Final = """
    8b 87 {undefined}             mov eax, dword [rdi+undefined]
    85 c0                         test eax, eax
    75 {.1:1}                     jne 1
    48 b8 {load_byte:8}           mov rax, load_byte
    ff e0                         jmp rax
1:
    ff 8f {undefined}             dec dword [rdi+undefined]
    83 f8 02                      cmp eax, 0x2
    b8 0b 00 00 00                mov eax, 0xb
    b9 0f 00 00 00                mov ecx, 0xf
    0f 44 c1                      cmove eax, ecx
    c3                            ret
"""
