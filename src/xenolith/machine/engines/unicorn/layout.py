"""Private layout of the Unicorn 2.1.4 wheel: where QEMU keeps what, and what its flags mean.

Everything here is specific to that one build (offsets in bytes; CPUX86State is called `env`, as in QEMU) and is
proved by the probes of verify.py before a guest runs.  env is preceded by CPUState, whose last part is the software
TLB: for each MMU index a table (`mask`, `table`) and its description (victim entries and usage counters).
"""

from typing import Final

# --- uc_struct ------------------------------------------------------------------------------------
UC_MEMORY_MAPPING: Final = 288  # pointer to the function that finds a machine address's memory region
UC_CPU: Final = 440  # the CPUState
UC_TCG: Final = 768  # the TCGContext
UC_PAGE_MAP: Final = 736  # radix tree of the pages with code: pointer, 8 bytes, u32 size, i32 shift, i32 levels
UC_NO_EXIT_REQUEST: Final = 2034  # true: do not look for a stop request after every load and store
UC_STRUCT_SIZE: Final = 14900  # at least

# notdirty_write asks UC_MEMORY_MAPPING; where it goes on, relative to an exported function, and the code around
NOTDIRTY_RETURN: Final = ("tlb_set_dirty_x86_64", 0x242)
NOTDIRTY_CODE: Final = bytes.fromhex("ff 90 20 01 00 00 48 85 c0")  # call [rax + 288]; test rax, rax
NOTDIRTY_CALL_SIZE: Final = 6

# --- the translator -------------------------------------------------------------------------------
TCG_EPILOGUE: Final = 0x98  # in TCGContext: where a block goes to leave translated code
TCG_BUFFER: Final = 0xA0  # in TCGContext: where the buffer of translated code begins, u64
TCG_LIMIT: Final = 0xD0  # in TCGContext: how far it may be filled, u64
TCG_LAST_OP: Final = 0x7390  # in TCGContext: pointer to the 8th byte of the operation made last ...
CALL_FUNCTION: Final = 0x20  # ... and from there, for a call with a result and an argument: the function
TCG_UC: Final = 0x9970  # in TCGContext: the uc_struct
TCG_ENV: Final = 0x98F0  # in TCGContext: the variable that stands for env, relative to TCGContext
TCG_OP_SET_LABEL: Final = 1
TCG_OP_LD_I32: Final = 13
TCG_COND_LT: Final = 2
TCG_UNUSED: Final = 0x98D8  # in TCGContext: for instruction counting, which is off; ours, see stubs.CALL_MADE
# Code that must look like this where the names above and the call through the linkage table come from
TRANSLATOR_CODE: Final = (
    ("check_exit_request_x86_64", 0, "48 8b b7 70 99 00 00 80 be f2 07 00 00 00"),  # mov rsi, [rdi + 0x9970]; cmp ...
    ("tcg_gen_lookup_and_goto_ptr_x86_64", 0x28, "48 8b 85 f0 98 00 00"),  # mov rax, [rbp + 0x98f0]
    ("tcg_gen_lookup_and_goto_ptr_x86_64", 0x3F, "e8"),  # call tcg_gen_callN
)

# The linkage table's entries, relative to that of tcg_gen_callN
SLOTS: Final = {
    "tcg_gen_callN_x86_64": 0,
    "tcg_gen_exit_tb_x86_64": 0x7450,
    "tb_htable_lookup_x86_64": 0x70C0,
    "tcg_region_reset_all_x86_64": 0x3508,
    "tb_exec_unlock_x86_64": -0x2208,
    "tlb_set_page_with_attrs_x86_64": -0x1B58,
    "tlb_flush_by_mmuidx_x86_64": 0x1180,
    "tb_gen_code_x86_64": -0x28E8,
    "translator_loop_x86_64": 0xA1C8,
    "cpu_ldub_code_x86_64": 0x3238,
    "cpu_check_watchpoint_x86_64": 0x3738,
    "cpu_watchpoint_address_matches_x86_64": 0x7098,
}
OPERATIONS_CODE: Final = ("gen_intermediate_code_x86_64", 0x26, "48 8d 3d")  # lea rdi, [rip + i386_tr_ops]
OPERATIONS: Final = 7  # functions in that table ...
TRANSLATE_INSN: Final = 4  # ... of which this translates an instruction
BLOCK_PC_NEXT: Final = 0x10  # in DisasContextBase, which begins with a pointer to the TranslationBlock

# --- TranslationBlock: begins with the block's address; its machine code follows ------------------
TB_FLAGS: Final = 0x10  # u32
TB_CFLAGS: Final = 0x18  # u32: how it was translated
TB_CODE: Final = 0x20  # pointer
TB_PAGES: Final = 0x48  # machine addresses of its code's page and, if it crosses into that, the next; else all ones
TB_SIZE: Final = 0xC0  # from its beginning to its machine code
BLOCK_EFLAGS: Final = 0x73100  # these of EFLAGS go into a block's flags, besides hflags: AC VM RF IOPL TF
BLOCK_CFLAGS: Final = 0xFF000000  # how blocks are translated, unless for a single execution

# do_tb_phys_invalidate, the end of a block (then in r13), calls tb_exec_unlock: where it goes on, and the code there
INVALIDATE_RETURN: Final = ("tb_flush_x86_64", 0x1083, "41 8b 45 18 89 c2 81 ca 00 00 04 00")

# --- CPUState, relative to env --------------------------------------------------------------------
CPU_STATE: Final = -0x8A50  # the start of CPUState
CPU_JUMPS: Final = CPU_STATE + 0x138  # tb_jmp_cache: 4096 pointers to blocks
CPU_OPAQUE: Final = CPU_STATE + 0x8170  # pointer that QEMU keeps for others and never reads: ours, see softmmu.py
CPU_UC: Final = CPU_STATE + 0x81A8
CPU_CLASS: Final = CPU_STATE + 0x81B0  # pointer to its CPUClass ...
CLASS_FILL_TLB: Final = 0x48  # ... which holds what to call when a page is not in the TLB ...
CLASS_DEBUG_HANDLER: Final = 0x78  # ... and when a block ends in EXCP_DEBUG
TLB_DIRTY: Final = -0x890  # u16: one bit for each MMU index used since its last flush
TLB_DESCRIPTION: Final = -0x870
TLB_DESCRIPTION_SIZE: Final = 0x2B8
TLB_DESCRIPTION_USED: Final = 0x20  # within it: u64, number of entries in use, victim entries not counted
TLB_DESCRIPTION_VICTIM: Final = 0x28  # u64, number of victim entries ever used since the last flush
TLB_FAST: Final = -0x40
TLB_FAST_SIZE: Final = 0x10  # u64 mask, pointer to the table
TLB_ENTRY_BITS: Final = 6  # log2 of the size of an entry
TLB_INVALID: Final = 1 << 11  # flags in an entry's addresses
TLB_NOTDIRTY: Final = 1 << 10
VICTIMS: Final = 8
TLB_AREA: Final = TLB_DIRTY  # the lowest of these

# MMU indices
MMU_PARKED: Final = 0  # "kernel, SMAP": never used here as SMAP is off; the other mode's translations rest in it
MMU_USER: Final = 1  # what code at CPL 3 uses
MMU_SYSTEM: Final = 2  # the processor's own accesses: descriptors, stack pops of far returns

# --- CPUX86State ----------------------------------------------------------------------------------
EIP: Final = 128
EFLAGS: Final = 136
HFLAGS: Final = 176
SEGMENTS: Final = 184  # ES CS SS DS FS GS: u32 selector, pad, u64 base, u32 limit, u32 flags
SEGMENT_SIZE: Final = 24
CS_BASE: Final = SEGMENTS + SEGMENT_SIZE + 8
LDT: Final = 328  # u32 selector, pad, u64 base, u32 limit, u32 flags: as for the segments
TR: Final = 352
GDT: Final = 376
IDT: Final = 400
TABLE_SIZE: Final = 24  # of LDT, TR, GDT and IDT each
UNDEFINED: Final = TR + 4  # u32, padding that QEMU leaves alone: ours, see stubs.LOAD_CODE_BYTE
CR: Final = 424  # CR0..CR4, u64 each
CR3: Final = CR + 3 * 8
EFER: Final = 592
FPSTT: Final = 604  # u32: top of the x87 stack
FPUS: Final = 608  # u16: x87 status word, without the top
FPUC: Final = 610  # u16: x87 control word
FPTAGS: Final = 612  # 8 bytes: 1 = empty, by physical register
FPREGS: Final = 624  # 8 of 16 bytes, by physical register
FPIP: Final = 760  # u64
FPDP: Final = 768  # u64
MXCSR: Final = 816  # u32
MXCSR_DEFINED: Final = 0xFFFF  # its bits that are not reserved
XMM: Final = 824  # 32 of 64 bytes
XMM_STRIDE: Final = 64
XCR0: Final = 4904
ERROR_CODE: Final = 5384  # u32, and after it u32 exception_is_int: raised by INT n, INT3 or INTO
DR: Final = 5400  # DR0..DR7, u64 each
DR6: Final = DR + 6 * 8
OLD_EXCEPTION: Final = 5496  # i32: for the double fault logic, which must never see a second fault
ENV_SIZE: Final = 5568

VCPU_BLOCK: Final = XMM + 16 * XMM_STRIDE  # env up to here is all that guest code can change of a vCPU

# --- flags that ring 0 may set: ID AC RF NT DF IF TF and the status flags; IOPL and VM stay 0 -------------------
SETTABLE_FLAGS: Final = 0x254FD5

# --- hflags: what a block's translation depends on, besides the address ----------------------------
HF_CPL: Final = 3
HF_CS32: Final = 1 << 4
HF_SS32: Final = 1 << 5
HF_ADDSEG: Final = 1 << 6
HF_TF: Final = 1 << 8  # single steps, as TF in EFLAGS
HF_TS: Final = 1 << 11
HF_LMA: Final = 1 << 14
HF_CS64: Final = 1 << 15
HF_KERNEL: Final = 1 << 30  # ours, unused by QEMU: keeps guest-kernel and guest-user blocks apart

# --- segment attributes: the descriptor's second word, as is (SDM vol. 3, 3.4.5) --------------------
DESC_A: Final = 1 << 8
DESC_W: Final = 1 << 9  # data: writable; code: readable
DESC_C: Final = 1 << 10  # code: conforming
DESC_CODE: Final = 1 << 11
DESC_S: Final = 1 << 12
DESC_DPL_SHIFT: Final = 13
DESC_P: Final = 1 << 15
DESC_L: Final = 1 << 21
DESC_B: Final = 1 << 22
DESC_G: Final = 1 << 23
FLAT_CODE64: Final = 0x00AFFB00
FLAT_CODE32: Final = 0x00CFFB00
FLAT_DATA: Final = 0x00CFF300
