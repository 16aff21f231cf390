"""The machine code between QEMU and Python.

A trap that costs Python a microsecond must not spend half of it on finding out what happened.  So QEMU's hooks
call a few instructions of our own, which put a trap's vector, error code and address into argument registers and call
the Python trap handler once; and what ring 0 asks of the engine at almost every trap (flags, TLB flushes, mode
switches) is one call into machine code.  Everything that decides anything is in Python.

A listing has one line an instruction: its offset, its encoding, its text.  Names in braces are filled in when
an engine is made: addresses (8 bytes) and numbers of layout.py (4 bytes).  System V calling convention.
"""

from __future__ import annotations

from typing import Final

from xenolith.machine.engines.unicorn import layout

Listing = tuple[tuple[int, str, str], ...]

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


def encode(listing: Listing, **names: int) -> bytes:
    """The machine code of a listing; `names` gives its addresses, and `trap` (a number of 4 bytes) if it has one."""
    values = {name: (number & 0xFFFF_FFFF).to_bytes(4, "little").hex() for name, number in NUMBERS.items()}
    for name, number in names.items():
        values[name] = number.to_bytes(4 if name == "trap" else 8, "little").hex()
    return bytes.fromhex(" ".join(encoding.format(**values) for _, encoding, _ in listing))


# get_rflags() -> flags
GET_RFLAGS: Final[Listing] = (
    (0x00, "48 bf {env}", "mov rdi, env"),
    (0x0A, "48 b8 {read_eflags}", "mov rax, read_eflags"),
    (0x14, "ff e0", "jmp rax"),
)

# set_rflags(flags)
SET_RFLAGS: Final[Listing] = (
    (0x00, "48 89 fe", "mov rsi, rdi"),
    (0x03, "48 bf {env}", "mov rdi, env"),
    (0x0D, "ba {settable_flags}", "mov edx, settable_flags"),
    (0x12, "48 b8 {write_eflags}", "mov rax, write_eflags"),
    (0x1C, "ff e0", "jmp rax"),
)

# flush_tlb(): every TLB that may hold anything: that counts entries, or has used its victim entries.  QEMU's own note
# of that, `dirty`, does not follow the exchange of TLBs.
FLUSH_TLB: Final[Listing] = (
    (0x00, "48 ba {env}", "mov rdx, env"),
    (0x0A, "31 f6", "xor esi, esi"),
    (0x0C, "48 8b 82 {parked_used}", "mov rax, qword [rdx+parked_used]"),
    (0x13, "48 0b 82 {parked_victim}", "or rax, qword [rdx+parked_victim]"),
    (0x1A, "74 03", "je 0x1f"),
    (0x1C, "83 ce 01", "or esi, 0x1"),
    (0x1F, "48 8b 82 {user_used}", "mov rax, qword [rdx+user_used]"),
    (0x26, "48 0b 82 {user_victim}", "or rax, qword [rdx+user_victim]"),
    (0x2D, "74 03", "je 0x32"),
    (0x2F, "83 ce 02", "or esi, 0x2"),
    (0x32, "48 8b 82 {system_used}", "mov rax, qword [rdx+system_used]"),
    (0x39, "48 0b 82 {system_victim}", "or rax, qword [rdx+system_victim]"),
    (0x40, "74 03", "je 0x45"),
    (0x42, "83 ce 04", "or esi, 0x4"),
    (0x45, "66 c7 82 {dirty} 07 00", "mov word [rdx+dirty], 0x7"),
    (0x4E, "48 8d ba {cpu_state}", "lea rdi, [rdx+cpu_state]"),
    (0x55, "48 b8 {tlb_flush_by_mmuidx}", "mov rax, tlb_flush_by_mmuidx"),
    (0x5F, "ff e0", "jmp rax"),
)

# flush_page(va)
FLUSH_PAGE: Final[Listing] = (
    (0x00, "48 89 fe", "mov rsi, rdi"),
    (0x03, "48 bf {cpu}", "mov rdi, cpu"),
    (0x0D, "48 b8 {tlb_flush_page}", "mov rax, tlb_flush_page"),
    (0x17, "ff e0", "jmp rax"),
)

# switch_mode(l4_mfn, user): load CR3.  If the mode changes, exchange the two modes' TLBs and mark the flags; and a
# guest kernel is entered in 64-bit code, even if a far jump that nobody saw had left that.  If the TLB now in use holds
# another page table's translations, empty it; if the processor itself has used its TLB, empty that.
SWITCH_MODE: Final[Listing] = (
    (0x00, "48 ba {env}", "mov rdx, env"),
    (0x0A, "48 89 f8", "mov rax, rdi"),
    (0x0D, "48 c1 e0 0c", "shl rax, 0xc"),
    (0x11, "48 89 82 {cr3}", "mov qword [rdx+cr3], rax"),
    (0x18, "40 0f b6 f6", "movzx esi, sil"),
    (0x1C, "8b 8a {hflags}", "mov ecx, dword [rdx+hflags]"),
    (0x22, "c1 e9 1e", "shr ecx, 0x1e"),
    (0x25, "83 e1 01", "and ecx, 0x1"),
    (0x28, "31 f1", "xor ecx, esi"),
    (0x2A, "0f 85 cb 00 00 00", "jne 0xfb"),
    (0x30, "81 b2 {hflags} {hf_kernel}", "xor dword [rdx+hflags], hf_kernel"),
    (0x3A, "0f 10 82 {parked_fast}", "movups xmm0, [rdx+parked_fast]"),
    (0x41, "0f 10 8a {used_fast}", "movups xmm1, [rdx+used_fast]"),
    (0x48, "0f 11 8a {parked_fast}", "movups [rdx+parked_fast], xmm1"),
    (0x4F, "0f 11 82 {used_fast}", "movups [rdx+used_fast], xmm0"),
    (0x56, "48 8b 82 {parked_last}", "mov rax, qword [rdx+parked_last]"),
    (0x5D, "4c 8b 82 {used_last}", "mov r8, qword [rdx+used_last]"),
    (0x64, "4c 89 82 {parked_last}", "mov qword [rdx+parked_last], r8"),
    (0x6B, "48 89 82 {used_last}", "mov qword [rdx+used_last], rax"),
    (0x72, "b9 {tlb_even}", "mov ecx, tlb_even"),
    (0x77, "0f 10 84 ca {parked_pair}", "movups xmm0, [rdx+rcx*8+parked_pair]"),
    (0x7F, "0f 10 8c ca {used_pair}", "movups xmm1, [rdx+rcx*8+used_pair]"),
    (0x87, "0f 11 8c ca {parked_pair}", "movups [rdx+rcx*8+parked_pair], xmm1"),
    (0x8F, "0f 11 84 ca {used_pair}", "movups [rdx+rcx*8+used_pair], xmm0"),
    (0x97, "83 e9 02", "sub ecx, 0x2"),
    (0x9A, "75 db", "jne 0x77"),
    (0x9C, "85 f6", "test esi, esi"),
    (0x9E, "75 5b", "jne 0xfb"),
    (0xA0, "8b 82 {hflags}", "mov eax, dword [rdx+hflags]"),
    (0xA6, "a9 {hf_cs64}", "test eax, hf_cs64"),
    (0xAB, "75 4e", "jne 0xfb"),
    (0xAD, "25 {not_hf_addseg}", "and eax, not_hf_addseg"),
    (0xB2, "0d {hf_64_bit}", "or eax, hf_64_bit"),
    (0xB7, "89 82 {hflags}", "mov dword [rdx+hflags], eax"),
    (0xBD, "48 c7 82 {cs_base} 00 00 00 00", "mov qword [rdx+cs_base], 0x0"),
    (0xC8, "c7 82 {cs_limit} ff ff ff ff", "mov dword [rdx+cs_limit], 0xffffffff"),
    (0xD2, "c7 82 {cs_flags} {flat_code}", "mov dword [rdx+cs_flags], flat_code"),
    (0xDC, "48 c7 82 {ss_base} 00 00 00 00", "mov qword [rdx+ss_base], 0x0"),
    (0xE7, "c7 82 {ss_limit} ff ff ff ff", "mov dword [rdx+ss_limit], 0xffffffff"),
    (0xF1, "c7 82 {ss_flags} {flat_data}", "mov dword [rdx+ss_flags], flat_data"),
    (0xFB, "31 c9", "xor ecx, ecx"),
    (0xFD, "49 b8 {l4_of_tlb}", "mov r8, l4_of_tlb"),
    (0x107, "49 39 3c f0", "cmp qword [r8+rsi*8], rdi"),
    (0x10B, "74 07", "je 0x114"),
    (0x10D, "49 89 3c f0", "mov qword [r8+rsi*8], rdi"),
    (0x111, "83 c9 02", "or ecx, 0x2"),
    (0x114, "48 8b 82 {system_used}", "mov rax, qword [rdx+system_used]"),
    (0x11B, "48 0b 82 {system_victim}", "or rax, qword [rdx+system_victim]"),
    (0x122, "74 03", "je 0x127"),
    (0x124, "83 c9 04", "or ecx, 0x4"),
    (0x127, "85 c9", "test ecx, ecx"),
    (0x129, "75 01", "jne 0x12c"),
    (0x12B, "c3", "ret"),
    (0x12C, "66 c7 82 {dirty} 07 00", "mov word [rdx+dirty], 0x7"),
    (0x135, "48 8d ba {cpu_state}", "lea rdi, [rdx+cpu_state]"),
    (0x13C, "89 ce", "mov esi, ecx"),
    (0x13E, "48 b8 {tlb_flush_by_mmuidx}", "mov rax, tlb_flush_by_mmuidx"),
    (0x148, "ff e0", "jmp rax"),
)

# code_written(mfn): forget the frame's checksum, drop the blocks translated from it
CODE_WRITTEN: Final[Listing] = (
    (0x00, "48 b8 {checksums}", "mov rax, checksums"),
    (0x0A, "48 c7 04 f8 00 00 00 00", "mov qword [rax+rdi*8], 0x0"),
    (0x12, "48 89 fe", "mov rsi, rdi"),
    (0x15, "48 c1 e6 0c", "shl rsi, 0xc"),
    (0x19, "48 8d 96 00 10 00 00", "lea rdx, [rsi+0x1000]"),
    (0x20, "48 bf {uc}", "mov rdi, uc"),
    (0x2A, "48 b8 {invalidate}", "mov rax, invalidate"),
    (0x34, "ff e0", "jmp rax"),
)

# executable_mapped(mfn): if the checksum of the frame differs from the last one, drop the blocks translated from it
EXECUTABLE_MAPPED: Final[Listing] = (
    (0x00, "48 89 fe", "mov rsi, rdi"),
    (0x03, "48 c1 e6 0c", "shl rsi, 0xc"),
    (0x07, "48 ba {memory}", "mov rdx, memory"),
    (0x11, "48 01 f2", "add rdx, rsi"),
    (0x14, "49 b9 15 7c 4a 7f b9 79 37 9e", "mov r9, 0x9e3779b97f4a7c15"),
    (0x1E, "31 c0", "xor eax, eax"),
    (0x20, "45 31 c0", "xor r8d, r8d"),
    (0x23, "45 31 d2", "xor r10d, r10d"),
    (0x26, "45 31 db", "xor r11d, r11d"),
    (0x29, "b9 80 00 00 00", "mov ecx, 0x80"),
    (0x2E, "48 33 02", "xor rax, qword [rdx]"),
    (0x31, "4c 33 42 08", "xor r8, qword [rdx+0x8]"),
    (0x35, "4c 33 52 10", "xor r10, qword [rdx+0x10]"),
    (0x39, "4c 33 5a 18", "xor r11, qword [rdx+0x18]"),
    (0x3D, "48 c1 c8 1d", "ror rax, 0x1d"),
    (0x41, "49 c1 c8 1d", "ror r8, 0x1d"),
    (0x45, "49 c1 ca 1d", "ror r10, 0x1d"),
    (0x49, "49 c1 cb 1d", "ror r11, 0x1d"),
    (0x4D, "49 0f af c1", "imul rax, r9"),
    (0x51, "4d 0f af c1", "imul r8, r9"),
    (0x55, "4d 0f af d1", "imul r10, r9"),
    (0x59, "4d 0f af d9", "imul r11, r9"),
    (0x5D, "48 83 c2 20", "add rdx, 0x20"),
    (0x61, "ff c9", "dec ecx"),
    (0x63, "75 c9", "jne 0x2e"),
    (0x65, "49 c1 c8 10", "ror r8, 0x10"),
    (0x69, "49 c1 ca 20", "ror r10, 0x20"),
    (0x6D, "49 c1 cb 30", "ror r11, 0x30"),
    (0x71, "4c 31 c0", "xor rax, r8"),
    (0x74, "4c 31 d0", "xor rax, r10"),
    (0x77, "4c 31 d8", "xor rax, r11"),
    (0x7A, "48 83 c8 01", "or rax, 0x1"),
    (0x7E, "49 b8 {checksums}", "mov r8, checksums"),
    (0x88, "49 39 04 f8", "cmp qword [r8+rdi*8], rax"),
    (0x8C, "74 21", "je 0xaf"),
    (0x8E, "49 89 04 f8", "mov qword [r8+rdi*8], rax"),
    (0x92, "48 8d 96 00 10 00 00", "lea rdx, [rsi+0x1000]"),
    (0x99, "48 bf {uc}", "mov rdi, uc"),
    (0xA3, "48 b8 {invalidate}", "mov rax, invalidate"),
    (0xAD, "ff e0", "jmp rax"),
    (0xAF, "c3", "ret"),
)

# Hook UC_HOOK_INTR(uc, vector, user_data): deliver(vector, error code, address, hook), stop if it returns false.
# INT n, except INT3 and INTO, is a #GP at the instruction.  old_exception is reset, else the next page fault would be a
# double fault.
INTERRUPT: Final[Listing] = (
    (0x00, "49 b8 {env}", "mov r8, env"),
    (0x0A, "41 c7 80 {old_exception} ff ff ff ff", "mov dword [r8+old_exception], 0xffffffff"),
    (0x15, "89 f7", "mov edi, esi"),
    (0x17, "41 8b b0 {error_code}", "mov esi, dword [r8+error_code]"),
    (0x1E, "31 d2", "xor edx, edx"),
    (0x20, "41 83 b8 {is_int} 00", "cmp dword [r8+is_int], 0x0"),
    (0x28, "75 18", "jne 0x42"),
    (0x2A, "83 ff 0e", "cmp edi, 0xe"),
    (0x2D, "49 0f 44 90 {cr2}", "cmove rdx, qword [r8+cr2]"),
    (0x35, "83 ff 01", "cmp edi, 0x1"),
    (0x38, "49 0f 44 90 {dr6}", "cmove rdx, qword [r8+dr6]"),
    (0x40, "eb 1c", "jmp 0x5e"),
    (0x42, "8d 47 fd", "lea eax, [rdi-0x3]"),
    (0x45, "83 f8 01", "cmp eax, 0x1"),
    (0x48, "76 14", "jbe 0x5e"),
    (0x4A, "49 83 a8 {eip} 02", "sub qword [r8+eip], 0x2"),
    (0x52, "8d 34 fd 02 00 00 00", "lea esi, [rdi*8+0x2]"),
    (0x59, "bf 0d 00 00 00", "mov edi, 0xd"),
    (0x5E, "48 83 ec 08", "sub rsp, 0x8"),
    (0x62, "48 b9 {hook}", "mov rcx, hook"),
    (0x6C, "48 b8 {deliver}", "mov rax, deliver"),
    (0x76, "83 ff 22", "cmp edi, 0x22"),
    (0x79, "75 0a", "jne 0x85"),
    (0x7B, "48 b8 {deliver_cpuid}", "mov rax, deliver_cpuid"),
    (0x85, "ff d0", "call rax"),
    (0x87, "84 c0", "test al, al"),
    (0x89, "75 16", "jne 0xa1"),
    (0x8B, "48 bf {uc}", "mov rdi, uc"),
    (0x95, "48 b8 {emu_stop}", "mov rax, emu_stop"),
    (0x9F, "ff d0", "call rax"),
    (0xA1, "48 83 c4 08", "add rsp, 0x8"),
    (0xA5, "c3", "ret"),
)

# Hook UC_HOOK_INSN_INVALID(uc, user_data) -> true (go on): #UD, or INT 6
INVALID: Final[Listing] = (
    (0x00, "49 b8 {env}", "mov r8, env"),
    (0x0A, "41 c7 80 {old_exception} ff ff ff ff", "mov dword [r8+old_exception], 0xffffffff"),
    (0x15, "bf 06 00 00 00", "mov edi, 0x6"),
    (0x1A, "31 f6", "xor esi, esi"),
    (0x1C, "31 d2", "xor edx, edx"),
    (0x1E, "41 83 b8 {is_int} 00", "cmp dword [r8+is_int], 0x0"),
    (0x26, "74 0a", "je 0x32"),
    (0x28, "bf 0d 00 00 00", "mov edi, 0xd"),
    (0x2D, "be 32 00 00 00", "mov esi, 0x32"),
    (0x32, "48 83 ec 08", "sub rsp, 0x8"),
    (0x36, "48 b9 {hook}", "mov rcx, hook"),
    (0x40, "48 b8 {deliver_invalid}", "mov rax, deliver_invalid"),
    (0x4A, "ff d0", "call rax"),
    (0x4C, "84 c0", "test al, al"),
    (0x4E, "75 16", "jne 0x66"),
    (0x50, "48 bf {uc}", "mov rdi, uc"),
    (0x5A, "48 b8 {emu_stop}", "mov rax, emu_stop"),
    (0x64, "ff d0", "call rax"),
    (0x66, "b8 01 00 00 00", "mov eax, 0x1"),
    (0x6B, "48 83 c4 08", "add rsp, 0x8"),
    (0x6F, "c3", "ret"),
)

# Hook for SYSCALL and SYSENTER(uc, user_data): RIP goes past the instruction, whose length QEMU holds in r13 and adds
# again when we return
SYSTEM_CALL: Final[Listing] = (
    (0x00, "49 b8 {env}", "mov r8, env"),
    (0x0A, "4d 01 a8 {eip}", "add qword [r8+eip], r13"),
    (0x11, "bf {trap}", "mov edi, trap"),
    (0x16, "31 f6", "xor esi, esi"),
    (0x18, "31 d2", "xor edx, edx"),
    (0x1A, "48 83 ec 08", "sub rsp, 0x8"),
    (0x1E, "48 b9 {hook}", "mov rcx, hook"),
    (0x28, "48 b8 {deliver}", "mov rax, deliver"),
    (0x32, "ff d0", "call rax"),
    (0x34, "49 b8 {env}", "mov r8, env"),
    (0x3E, "4d 29 a8 {eip}", "sub qword [r8+eip], r13"),
    (0x45, "84 c0", "test al, al"),
    (0x47, "75 16", "jne 0x5f"),
    (0x49, "48 bf {uc}", "mov rdi, uc"),
    (0x53, "48 b8 {emu_stop}", "mov rax, emu_stop"),
    (0x5D, "ff d0", "call rax"),
    (0x5F, "48 83 c4 08", "add rsp, 0x8"),
    (0x63, "c3", "ret"),
)

# Hook for instructions that this Unicorn executes at CPL 3 but which must trap (CPUID, IN, OUT): raise a fault, at the
# instruction, with number `trap`.  Never returns.
RAISE_FAULT: Final[Listing] = (
    (0x00, "48 bf {env}", "mov rdi, env"),
    (0x0A, "be {trap}", "mov esi, trap"),
    (0x0F, "31 d2", "xor edx, edx"),
    (0x11, "48 b8 {raise_exception}", "mov rax, raise_exception"),
    (0x1B, "ff e0", "jmp rax"),
)

# uc_struct's function that finds the memory region of a machine address: there is one, all of machine memory.  QEMU
# also asks at every store to a page of which it takes note (notdirty_write, its TLB entry in rbp).  If no block was
# translated from the page, later stores need not come here: NOTDIRTY is taken from the entry, and "no region" ends
# notdirty_write.  Else that drops the blocks which the store overwrites; and the hook RETURN_FALSE, because it exists,
# keeps it from taking NOTDIRTY from the entry although other blocks of the page are left.
MEMORY_MAPPING: Final[Listing] = (
    (0x00, "49 b8 {memory_size}", "mov r8, memory_size"),
    (0x0A, "4c 39 c6", "cmp rsi, r8"),
    (0x0D, "73 1b", "jae 0x2a"),
    (0x0F, "48 b8 {region}", "mov rax, region"),
    (0x19, "49 b8 {notdirty_return}", "mov r8, notdirty_return"),
    (0x23, "4c 39 04 24", "cmp qword [rsp], r8"),
    (0x27, "74 0d", "je 0x36"),
    (0x29, "c3", "ret"),
    (0x2A, "48 b8 {find_region}", "mov rax, find_region"),
    (0x34, "ff e0", "jmp rax"),
    (0x36, "48 c1 ee 0c", "shr rsi, 0xc"),
    (0x3A, "44 8b 8f {map_size}", "mov r9d, dword [rdi+map_size]"),
    (0x41, "8b 8f {map_shift}", "mov ecx, dword [rdi+map_shift]"),
    (0x47, "41 ff c9", "dec r9d"),
    (0x4A, "48 89 f2", "mov rdx, rsi"),
    (0x4D, "48 d3 ea", "shr rdx, cl"),
    (0x50, "49 21 d1", "and r9, rdx"),
    (0x53, "48 8b 97 {map}", "mov rdx, qword [rdi+map]"),
    (0x5A, "4a 8d 14 ca", "lea rdx, [rdx+r9*8]"),
    (0x5E, "6b 8f {map_levels} 0a", "imul ecx, dword [rdi+map_levels], 0xa"),
    (0x65, "eb 1c", "jmp 0x83"),
    (0x67, "48 8b 12", "mov rdx, qword [rdx]"),
    (0x6A, "48 85 d2", "test rdx, rdx"),
    (0x6D, "74 36", "je 0xa5"),
    (0x6F, "49 89 f1", "mov r9, rsi"),
    (0x72, "49 d3 e9", "shr r9, cl"),
    (0x75, "41 81 e1 ff 03 00 00", "and r9d, 0x3ff"),
    (0x7C, "4a 8d 14 ca", "lea rdx, [rdx+r9*8]"),
    (0x80, "83 e9 0a", "sub ecx, 0xa"),
    (0x83, "85 c9", "test ecx, ecx"),
    (0x85, "7f e0", "jg 0x67"),
    (0x87, "48 8b 12", "mov rdx, qword [rdx]"),
    (0x8A, "48 85 d2", "test rdx, rdx"),
    (0x8D, "74 16", "je 0xa5"),
    (0x8F, "41 89 f1", "mov r9d, esi"),
    (0x92, "41 81 e1 ff 03 00 00", "and r9d, 0x3ff"),
    (0x99, "4f 8d 0c 49", "lea r9, [r9+r9*2]"),
    (0x9D, "4a 83 3c ca 00", "cmp qword [rdx+r9*8], 0x0"),
    (0xA2, "74 01", "je 0xa5"),
    (0xA4, "c3", "ret"),
    (0xA5, "49 b8 {marked}", "mov r8, marked"),
    (0xAF, "41 c6 04 30 00", "mov byte [r8+rsi], 0x0"),
    (0xB4, "66 81 65 08 ff fb", "and word [rbp+0x8], 0xfbff"),
    (0xBA, "31 c0", "xor eax, eax"),
    (0xBC, "c3", "ret"),
)

# Hook UC_HOOK_EDGE_GENERATED(uc, block, previous block, user_data): a block (QEMU's own record of it is in rbx) was
# translated.  From now on stores to its pages are to be noticed, through whichever mapping: put NOTDIRTY into all
# TLB entries of these frames, unless that was done and not undone since.
BLOCK_MADE: Final[Listing] = (
    (0x00, "48 8b 06", "mov rax, qword [rsi]"),
    (0x03, "48 3b 03", "cmp rax, qword [rbx]"),
    (0x06, "75 67", "jne 0x6f"),
    (0x08, "48 83 ec 08", "sub rsp, 0x8"),
    (0x0C, "48 8b 4b 48", "mov rcx, qword [rbx+0x48]"),
    (0x10, "e8 0e 00 00 00", "call 0x23"),
    (0x15, "48 8b 4b 50", "mov rcx, qword [rbx+0x50]"),
    (0x19, "e8 05 00 00 00", "call 0x23"),
    (0x1E, "48 83 c4 08", "add rsp, 0x8"),
    (0x22, "c3", "ret"),
    (0x23, "48 83 f9 ff", "cmp rcx, 0xffffffffffffffff"),
    (0x27, "74 45", "je 0x6e"),
    (0x29, "48 89 c8", "mov rax, rcx"),
    (0x2C, "48 c1 e8 0c", "shr rax, 0xc"),
    (0x30, "49 b8 {marked}", "mov r8, marked"),
    (0x3A, "41 80 3c 00 00", "cmp byte [r8+rax], 0x0"),
    (0x3F, "75 2d", "jne 0x6e"),
    (0x41, "41 c6 04 00 01", "mov byte [r8+rax], 0x1"),
    (0x46, "48 be {memory}", "mov rsi, memory"),
    (0x50, "48 01 ce", "add rsi, rcx"),
    (0x53, "48 bf {cpu}", "mov rdi, cpu"),
    (0x5D, "ba 00 10 00 00", "mov edx, 0x1000"),
    (0x62, "48 b8 {tlb_reset_dirty}", "mov rax, tlb_reset_dirty"),
    (0x6C, "ff e0", "jmp rax"),
    (0x6E, "c3", "ret"),
    (0x6F, "48 bf {cpu}", "mov rdi, cpu"),
    (0x79, "48 b8 {tlb_flush}", "mov rax, tlb_flush"),
    (0x83, "ff e0", "jmp rax"),
)

# Hook UC_HOOK_MEM_FETCH_PROT, which never happens: see MEMORY_MAPPING
RETURN_FALSE: Final[Listing] = (
    (0x00, "31 c0", "xor eax, eax"),
    (0x02, "c3", "ret"),
)

# In place of tcg_gen_callN(context, function, result, number of arguments, arguments), with which QEMU's translator
# makes a call of a helper: instead of that of helper_check_exit_request, at the start of every block, a jump to the
# block's end is made under the condition that a stop was requested (a negative word in front of env).  See
# exit_check.py.
CALL_MADE: Final[Listing] = (
    (0x00, "48 b8 {check_exit_request}", "mov rax, check_exit_request"),
    (0x0A, "48 39 c6", "cmp rsi, rax"),
    (0x0D, "75 10", "jne 0x1f"),
    (0x0F, "48 8b 87 {tcg_uc}", "mov rax, qword [rdi+tcg_uc]"),
    (0x16, "80 b8 {no_exit_request} 00", "cmp byte [rax+no_exit_request], 0x0"),
    (0x1D, "75 0c", "jne 0x2b"),
    (0x1F, "48 b8 {gen_call}", "mov rax, gen_call"),
    (0x29, "ff e0", "jmp rax"),
    (0x2B, "53", "push rbx"),
    (0x2C, "41 54", "push r12"),
    (0x2E, "48 83 ec 08", "sub rsp, 0x8"),
    (0x32, "48 89 fb", "mov rbx, rdi"),
    (0x35, "31 f6", "xor esi, esi"),
    (0x37, "31 d2", "xor edx, edx"),
    (0x39, "48 b8 {temp_new}", "mov rax, temp_new"),
    (0x43, "ff d0", "call rax"),
    (0x45, "49 89 c4", "mov r12, rax"),
    (0x48, "48 89 df", "mov rdi, rbx"),
    (0x4B, "be {op_ld_i32}", "mov esi, op_ld_i32"),
    (0x50, "4c 89 e2", "mov rdx, r12"),
    (0x53, "48 8b 8b {tcg_env}", "mov rcx, qword [rbx+tcg_env]"),
    (0x5A, "48 01 d9", "add rcx, rbx"),
    (0x5D, "49 c7 c0 f0 ff ff ff", "mov r8, 0xfffffffffffffff0"),
    (0x64, "48 b8 {gen_op3}", "mov rax, gen_op3"),
    (0x6E, "ff d0", "call rax"),
    (0x70, "48 89 df", "mov rdi, rbx"),
    (0x73, "48 b8 {new_label}", "mov rax, new_label"),
    (0x7D, "ff d0", "call rax"),
    (0x7F, "48 89 83 {tcg_unused}", "mov qword [rbx+tcg_unused], rax"),
    (0x86, "48 89 df", "mov rdi, rbx"),
    (0x89, "be {cond_lt}", "mov esi, cond_lt"),
    (0x8E, "4c 89 e2", "mov rdx, r12"),
    (0x91, "48 29 da", "sub rdx, rbx"),
    (0x94, "31 c9", "xor ecx, ecx"),
    (0x96, "49 89 c0", "mov r8, rax"),
    (0x99, "48 b8 {gen_brcondi}", "mov rax, gen_brcondi"),
    (0xA3, "ff d0", "call rax"),
    (0xA5, "48 89 df", "mov rdi, rbx"),
    (0xA8, "4c 89 e6", "mov rsi, r12"),
    (0xAB, "48 83 c4 08", "add rsp, 0x8"),
    (0xAF, "41 5c", "pop r12"),
    (0xB1, "5b", "pop rbx"),
    (0xB2, "48 b8 {temp_free}", "mov rax, temp_free"),
    (0xBC, "ff e0", "jmp rax"),
)

# In place of tcg_gen_exit_tb(context, block, exit): the last thing made of every block is an exit of number 3, "a stop
# was requested", to which nothing leads; that is where CALL_MADE's jump goes.
EXIT_MADE: Final[Listing] = (
    (0x00, "83 fa 03", "cmp edx, 0x3"),
    (0x03, "75 0c", "jne 0x11"),
    (0x05, "48 8b 87 {tcg_unused}", "mov rax, qword [rdi+tcg_unused]"),
    (0x0C, "48 85 c0", "test rax, rax"),
    (0x0F, "75 0c", "jne 0x1d"),
    (0x11, "48 b8 {exit_tb}", "mov rax, exit_tb"),
    (0x1B, "ff e0", "jmp rax"),
    (0x1D, "48 c7 87 {tcg_unused} 00 00 00 00", "mov qword [rdi+tcg_unused], 0x0"),
    (0x28, "80 08 01", "or byte [rax], 0x1"),
    (0x2B, "57", "push rdi"),
    (0x2C, "56", "push rsi"),
    (0x2D, "52", "push rdx"),
    (0x2E, "be {op_set_label}", "mov esi, op_set_label"),
    (0x33, "48 89 c2", "mov rdx, rax"),
    (0x36, "48 b8 {gen_op1}", "mov rax, gen_op1"),
    (0x40, "ff d0", "call rax"),
    (0x42, "5a", "pop rdx"),
    (0x43, "5e", "pop rsi"),
    (0x44, "5f", "pop rdi"),
    (0x45, "eb ca", "jmp 0x11"),
)

# In place of tb_exec_unlock(uc), which does nothing on this host, but is called at the beginning of the function that
# ends a block, then in r13: forget_block(uc, block).  See softmmu.py.
UNLOCKED: Final[Listing] = (
    (0x00, "48 b8 {invalidate_return}", "mov rax, invalidate_return"),
    (0x0A, "48 39 04 24", "cmp qword [rsp], rax"),
    (0x0E, "75 0f", "jne 0x1f"),
    (0x10, "4c 89 ee", "mov rsi, r13"),
    (0x13, "48 b8 {forget_block}", "mov rax, forget_block"),
    (0x1D, "ff e0", "jmp rax"),
    (0x1F, "c3", "ret"),
)

# In place of translator_loop(operations, block, cpu, ...): with our own table of operations.  See vex.py.
TRANSLATE: Final[Listing] = (
    (0x00, "48 bf {operations}", "mov rdi, operations"),
    (0x0A, "48 b8 {translator_loop}", "mov rax, translator_loop"),
    (0x14, "ff e0", "jmp rax"),
)

# In place of the operation translate_insn(block, cpu).  The instruction at the block's pc_next, behind any legacy and
# REX prefixes, is a far transfer if it begins with CA, CB, CF, 9A, EA, or FF /3 or /5, and translated as UD2.  It is
# VEX-encoded if it begins with C4 or C5; in 32-bit code those are LES and LDS unless the next byte's highest two bits
# are set.  Of these QEMU knows ANDN, BLSR and its kin, BZHI, PDEP, PEXT, MULX, BEXTR and the shifts (map 2, F2, F3,
# F5-F7) and RORX (map 3, F0).  Any other is translated as UD2.
TRANSLATE_INSTRUCTION: Final[Listing] = (
    (0x00, "53", "push rbx"),
    (0x01, "41 54", "push r12"),
    (0x03, "41 55", "push r13"),
    (0x05, "41 56", "push r14"),
    (0x07, "48 83 ec 08", "sub rsp, 0x8"),
    (0x0B, "48 89 fb", "mov rbx, rdi"),
    (0x0E, "49 89 f4", "mov r12, rsi"),
    (0x11, "4c 8b af {pc_next}", "mov r13, qword [rdi+pc_next]"),
    (0x18, "4c 89 ee", "mov rsi, r13"),
    (0x1B, "e8 67 01 00 00", "call 0x187"),
    (0x20, "44 0f b6 f0", "movzx r14d, al"),
    (0x24, "41 8d 8e 36 ff ff ff", "lea ecx, [r14+0xffffffffffffff36]"),
    (0x2B, "83 f9 01", "cmp ecx, 0x1"),
    (0x2E, "0f 86 12 01 00 00", "jbe 0x146"),
    (0x34, "41 81 fe cf 00 00 00", "cmp r14d, 0xcf"),
    (0x3B, "0f 84 05 01 00 00", "je 0x146"),
    (0x41, "41 81 fe 9a 00 00 00", "cmp r14d, 0x9a"),
    (0x48, "0f 84 f8 00 00 00", "je 0x146"),
    (0x4E, "41 81 fe ea 00 00 00", "cmp r14d, 0xea"),
    (0x55, "0f 84 eb 00 00 00", "je 0x146"),
    (0x5B, "41 81 fe ff 00 00 00", "cmp r14d, 0xff"),
    (0x62, "0f 84 07 01 00 00", "je 0x16f"),
    (0x68, "41 8d 8e 3c ff ff ff", "lea ecx, [r14+0xffffffffffffff3c]"),
    (0x6F, "83 f9 01", "cmp ecx, 0x1"),
    (0x72, "76 69", "jbe 0xdd"),
    (0x74, "44 89 f1", "mov ecx, r14d"),
    (0x77, "81 e1 e7 00 00 00", "and ecx, 0xe7"),
    (0x7D, "83 f9 26", "cmp ecx, 0x26"),
    (0x80, "74 42", "je 0xc4"),
    (0x82, "41 8d 4e 9c", "lea ecx, [r14+0xffffffffffffff9c]"),
    (0x86, "83 f9 03", "cmp ecx, 0x3"),
    (0x89, "76 39", "jbe 0xc4"),
    (0x8B, "41 81 fe f0 00 00 00", "cmp r14d, 0xf0"),
    (0x92, "74 30", "je 0xc4"),
    (0x94, "41 8d 8e 0e ff ff ff", "lea ecx, [r14+0xffffffffffffff0e]"),
    (0x9B, "83 f9 01", "cmp ecx, 0x1"),
    (0x9E, "76 24", "jbe 0xc4"),
    (0xA0, "48 8b 03", "mov rax, qword [rbx]"),
    (0xA3, "f7 80 {block_flags} {hf_cs64}", "test dword [rax+block_flags], hf_cs64"),
    (0xAD, "0f 84 9f 00 00 00", "je 0x152"),
    (0xB3, "41 81 e6 f0 00 00 00", "and r14d, 0xf0"),
    (0xBA, "41 83 fe 40", "cmp r14d, 0x40"),
    (0xBE, "0f 85 8e 00 00 00", "jne 0x152"),
    (0xC4, "49 ff c5", "inc r13"),
    (0xC7, "4c 89 e9", "mov rcx, r13"),
    (0xCA, "48 2b 8b {pc_next}", "sub rcx, qword [rbx+pc_next]"),
    (0xD1, "48 83 f9 0e", "cmp rcx, 0xe"),
    (0xD5, "0f 82 3d ff ff ff", "jb 0x18"),
    (0xDB, "eb 75", "jmp 0x152"),
    (0xDD, "49 8d 75 01", "lea rsi, [r13+0x1]"),
    (0xE1, "e8 a1 00 00 00", "call 0x187"),
    (0xE6, "48 8b 0b", "mov rcx, qword [rbx]"),
    (0xE9, "f7 81 {block_flags} {hf_cs64}", "test dword [rcx+block_flags], hf_cs64"),
    (0xF3, "75 10", "jne 0x105"),
    (0xF5, "89 c1", "mov ecx, eax"),
    (0xF7, "81 e1 c0 00 00 00", "and ecx, 0xc0"),
    (0xFD, "81 f9 c0 00 00 00", "cmp ecx, 0xc0"),
    (0x103, "75 4d", "jne 0x152"),
    (0x105, "41 81 fe c5 00 00 00", "cmp r14d, 0xc5"),
    (0x10C, "74 38", "je 0x146"),
    (0x10E, "83 e0 1f", "and eax, 0x1f"),
    (0x111, "41 89 c6", "mov r14d, eax"),
    (0x114, "83 e8 02", "sub eax, 0x2"),
    (0x117, "83 f8 01", "cmp eax, 0x1"),
    (0x11A, "77 2a", "ja 0x146"),
    (0x11C, "49 8d 75 03", "lea rsi, [r13+0x3]"),
    (0x120, "e8 62 00 00 00", "call 0x187"),
    (0x125, "0f b6 c0", "movzx eax, al"),
    (0x128, "41 83 fe 03", "cmp r14d, 0x3"),
    (0x12C, "74 11", "je 0x13f"),
    (0x12E, "2d f2 00 00 00", "sub eax, 0xf2"),
    (0x133, "83 f8 05", "cmp eax, 0x5"),
    (0x136, "77 0e", "ja 0x146"),
    (0x138, "83 f8 02", "cmp eax, 0x2"),
    (0x13B, "75 15", "jne 0x152"),
    (0x13D, "eb 07", "jmp 0x146"),
    (0x13F, "3d f0 00 00 00", "cmp eax, 0xf0"),
    (0x144, "74 0c", "je 0x152"),
    (0x146, "41 c7 84 24 {undefined_of_cpu} 02 00 00 00", "mov dword [r12+undefined_of_cpu], 0x2"),
    (0x152, "48 89 df", "mov rdi, rbx"),
    (0x155, "4c 89 e6", "mov rsi, r12"),
    (0x158, "48 83 c4 08", "add rsp, 0x8"),
    (0x15C, "41 5e", "pop r14"),
    (0x15E, "41 5d", "pop r13"),
    (0x160, "41 5c", "pop r12"),
    (0x162, "5b", "pop rbx"),
    (0x163, "48 b8 {translate_instruction}", "mov rax, translate_instruction"),
    (0x16D, "ff e0", "jmp rax"),
    (0x16F, "49 8d 75 01", "lea rsi, [r13+0x1]"),
    (0x173, "e8 0f 00 00 00", "call 0x187"),
    (0x178, "83 e0 38", "and eax, 0x38"),
    (0x17B, "83 f8 18", "cmp eax, 0x18"),
    (0x17E, "74 c6", "je 0x146"),
    (0x180, "83 f8 28", "cmp eax, 0x28"),
    (0x183, "74 c1", "je 0x146"),
    (0x185, "eb cb", "jmp 0x152"),
    (0x187, "49 8d bc 24 {env_of_cpu}", "lea rdi, [r12+env_of_cpu]"),
    (0x18F, "48 b8 {load_byte}", "mov rax, load_byte"),
    (0x199, "ff e0", "jmp rax"),
)

# In place of cpu_ldub_code(env, va): the two bytes of UD2 when TRANSLATE_INSTRUCTION says so
LOAD_CODE_BYTE: Final[Listing] = (
    (0x00, "8b 87 {undefined}", "mov eax, dword [rdi+undefined]"),
    (0x06, "85 c0", "test eax, eax"),
    (0x08, "75 0c", "jne 0x16"),
    (0x0A, "48 b8 {load_byte}", "mov rax, load_byte"),
    (0x14, "ff e0", "jmp rax"),
    (0x16, "ff 8f {undefined}", "dec dword [rdi+undefined]"),
    (0x1C, "83 f8 02", "cmp eax, 0x2"),
    (0x1F, "b8 0b 00 00 00", "mov eax, 0xb"),
    (0x24, "b9 0f 00 00 00", "mov ecx, 0xf"),
    (0x29, "0f 44 c1", "cmove eax, ecx"),
    (0x2C, "c3", "ret"),
)
