"""x86-64 facts: the register file's layout, flag and page-table bits, exception vectors, selectors.

The register file is one flat array of 64-bit words, the form in which every room passes a vCPU's
registers around (design decision 4).  Sources: Intel SDM vol. 1 ch. 3, vol. 3 ch. 4 and 6.
"""

from typing import Final

MASK16: Final = 0xFFFF
MASK32: Final = 0xFFFF_FFFF
MASK64: Final = 0xFFFF_FFFF_FFFF_FFFF

# --- the register file: indices into an array of 64-bit words --------------------------------------
# Words 0..17 are the general registers in instruction-encoding order, then RIP and RFLAGS.  A segment
# register takes three words: selector, base, and limit | attributes (the attributes' own layout is the
# engine's).  Words not named here belong to the engine.  (This is also how Unicorn's CPUX86State begins,
# so that engine works on the array in place.)
RAX: Final = 0
RCX: Final = 1
RDX: Final = 2
RBX: Final = 3
RSP: Final = 4
RBP: Final = 5
RSI: Final = 6
RDI: Final = 7
R8: Final = 8
R9: Final = 9
R10: Final = 10
R11: Final = 11
R12: Final = 12
R13: Final = 13
R14: Final = 14
R15: Final = 15
RIP: Final = 16
RFLAGS: Final = 17
ES: Final = 23
CS: Final = 26
SS: Final = 29
DS: Final = 32
FS: Final = 35
GS: Final = 38
SEGMENT_BASE: Final = 1  # added to ES..GS: the word with the segment's base address
FS_BASE: Final = FS + SEGMENT_BASE
GS_BASE: Final = GS + SEGMENT_BASE
REGISTER_WORDS: Final = 64

# --- RFLAGS ----------------------------------------------------------------------------------------
EFLAGS_CF: Final = 1 << 0
EFLAGS_RESERVED_ONE: Final = 1 << 1
EFLAGS_TF: Final = 1 << 8
EFLAGS_IF: Final = 1 << 9
EFLAGS_DF: Final = 1 << 10
EFLAGS_IOPL: Final = 3 << 12
EFLAGS_NT: Final = 1 << 14
EFLAGS_RF: Final = 1 << 16
EFLAGS_VM: Final = 1 << 17
EFLAGS_AC: Final = 1 << 18
EFLAGS_VIF: Final = 1 << 19
EFLAGS_VIP: Final = 1 << 20
EFLAGS_ID: Final = 1 << 21
EFLAGS_STATUS: Final = 0x8D5  # CF PF AF ZF SF OF
DR6_BREAKPOINTS: Final = 0xF  # B0 to B3
DR6_STEP: Final = 1 << 14  # BS
EFLAGS_DEFINED: Final = 0x3F7FD7  # every flag that exists

# --- exception vectors -----------------------------------------------------------------------------
VECTOR_DE: Final = 0
VECTOR_DB: Final = 1
VECTOR_NMI: Final = 2
VECTOR_BP: Final = 3
VECTOR_OF: Final = 4
VECTOR_BR: Final = 5
VECTOR_UD: Final = 6
VECTOR_NM: Final = 7
VECTOR_DF: Final = 8
VECTOR_TS: Final = 10
VECTOR_NP: Final = 11
VECTOR_SS: Final = 12
VECTOR_GP: Final = 13
VECTOR_PF: Final = 14
VECTOR_MF: Final = 16
VECTOR_AC: Final = 17
VECTOR_MC: Final = 18
VECTOR_XM: Final = 19
VECTORS_WITH_ERROR_CODE: Final = frozenset((8, 10, 11, 12, 13, 14, 17, 21))

EXCEPTION_NAMES: Final = {
    VECTOR_DE: "#DE",
    VECTOR_DB: "#DB",
    VECTOR_NMI: "NMI",
    VECTOR_BP: "#BP",
    VECTOR_OF: "#OF",
    VECTOR_BR: "#BR",
    VECTOR_UD: "#UD",
    VECTOR_NM: "#NM",
    VECTOR_DF: "#DF",
    VECTOR_TS: "#TS",
    VECTOR_NP: "#NP",
    VECTOR_SS: "#SS",
    VECTOR_GP: "#GP",
    VECTOR_PF: "#PF",
    VECTOR_MF: "#MF",
    VECTOR_AC: "#AC",
    VECTOR_MC: "#MC",
    VECTOR_XM: "#XM",
}
PFEC_PRESENT: Final = 1
PFEC_WRITE: Final = 2
PFEC_USER: Final = 4
PFEC_RESERVED: Final = 8
PFEC_INSN: Final = 16

# --- control registers -----------------------------------------------------------------------------
CR0_PE: Final = 1 << 0
CR0_MP: Final = 1 << 1
CR0_EM: Final = 1 << 2
CR0_TS: Final = 1 << 3
CR0_ET: Final = 1 << 4
CR0_NE: Final = 1 << 5
CR0_WP: Final = 1 << 16
CR0_AM: Final = 1 << 18
CR0_PG: Final = 1 << 31
CR4_TSD: Final = 1 << 2
CR4_DE: Final = 1 << 3
CR4_PAE: Final = 1 << 5
CR4_PGE: Final = 1 << 7
CR4_MCE: Final = 1 << 6
CR4_OSFXSR: Final = 1 << 9
CR4_OSXMMEXCPT: Final = 1 << 10
CR4_FSGSBASE: Final = 1 << 16
CR4_OSXSAVE: Final = 1 << 18
CR4_SMEP: Final = 1 << 20
CR4_SMAP: Final = 1 << 21
EFER_SCE: Final = 1 << 0
EFER_LME: Final = 1 << 8
EFER_LMA: Final = 1 << 10
EFER_NX: Final = 1 << 11

# --- paging ----------------------------------------------------------------------------------------
PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
PAGE_MASK: Final = PAGE_SIZE - 1
ENTRIES: Final = 512  # entries in a page table of any level
PTE_P: Final = 1 << 0
PTE_RW: Final = 1 << 1
PTE_US: Final = 1 << 2
PTE_PWT: Final = 1 << 3
PTE_PCD: Final = 1 << 4
PTE_A: Final = 1 << 5
PTE_D: Final = 1 << 6
PTE_PSE: Final = 1 << 7  # L2, L3; in an L1 entry the same bit is PAT
PTE_PAT: Final = 1 << 7
PTE_G: Final = 1 << 8
PTE_AVAIL: Final = 7 << 9
PTE_AVAIL_HIGH: Final = 0x7FF << 52
PTE_NX: Final = 1 << 63
PTE_ADDRESS: Final = ((1 << 52) - 1) & ~PAGE_MASK  # the machine address in an entry
L2_SHIFT: Final = 21
L3_SHIFT: Final = 30
L4_SHIFT: Final = 39


DR6_ONES: Final = 0xFFFF_0FF0  # of DR6, always read as one (SDM vol. 3, 17.2.3)
LOWER_HALF_END: Final = 1 << 47  # of the canonical addresses
UPPER_HALF: Final = (1 << 64) - (1 << 47)


def is_canonical(va: int) -> bool:
    """Whether a 64-bit address is sign-extended from bit 47 (SDM vol. 1, 3.3.7.1)."""
    return 0 <= va < LOWER_HALF_END or UPPER_HALF <= va < 1 << 64


def is_legal_xcr0(value: int) -> bool:
    """Whether XSETBV would take it on a processor that has all of its components (SDM vol. 1, 13.3)."""
    x87, avx_without_sse = value & 1, value & 6 == 4
    mpx, avx512, amx = value >> 3 & 3, value >> 5 & 7, value >> 17 & 3
    whole = mpx in (0, 3) and avx512 in (0, 7) and amx in (0, 3)
    return bool(x87 and not avx_without_sse and whole and (not avx512 or value & 4))


def is_canonical_range(va: int, size: int) -> bool:
    """Whether `size` bytes (at least one) from a linear address on lie in one of the two canonical halves.

    What goes on beyond the end of the address space does not.
    """
    last = va + size - 1
    return 0 <= va <= last < LOWER_HALF_END or UPPER_HALF <= va <= last < 1 << 64


def advanced(address: int, by: int) -> int:
    """A 64-bit register that holds an address, so many bytes further on (or back): it wraps as the processor's does."""
    return address + by & MASK64


# --- opcodes (SDM vol. 2, appendix A) --------------------------------------------------------------
OPCODE_TWO_BYTES: Final = 0x0F  # the first byte of two
OPCODE_CPUID: Final = 0xA2  # the second of two
OPCODE_INT3: Final = 0xCC
OPCODE_INT_N: Final = 0xCD
OPCODE_INTO: Final = 0xCE  # of 32-bit code
OPCODE_IRET: Final = 0xCF
OPCODE_RDPMC: Final = b"\x0f\x33"
OPCODE_CLI: Final = 0xFA
OPCODE_STI: Final = 0xFB

# --- MSRs ------------------------------------------------------------------------------------------
MSR_TSC: Final = 0x10
MSR_PLATFORM_ID: Final = 0x17
MSR_APIC_BASE: Final = 0x1B
MSR_FEATURE_CONTROL: Final = 0x3A
MSR_BIOS_SIGN_ID: Final = 0x8B
MSR_MISC_ENABLE: Final = 0x1A0
MSR_PAT: Final = 0x277
MSR_EFER: Final = 0xC000_0080
MSR_STAR: Final = 0xC000_0081
MSR_FS_BASE: Final = 0xC000_0100
MSR_GS_BASE: Final = 0xC000_0101
MSR_KERNEL_GS_BASE: Final = 0xC000_0102
MSR_TSC_AUX: Final = 0xC000_0103

# The XSAVE area (SDM vol. 1, 13.4): offsets in its legacy region, and of its header; components 0 to 2.
XSAVE_MXCSR: Final = 24
XSAVE_MXCSR_MASK: Final = 28  # the bits that the processor has; 0: all but the one of denormals-are-zeros
XSAVE_HEADER: Final = 512  # XSTATE_BV, XCOMP_BV, and 48 bytes that must be 0 in the compacted format
XSAVE_EXTENDED: Final = 576  # behind the header: the components from 2 on
XSTATE_X87: Final = 1
XSTATE_SSE: Final = 2
XSTATE_AVX: Final = 4
INITIAL_MXCSR: Final = 0x1F80

CPUID_NULL_SELECTOR_CLEARS_BASE: Final = 1 << 6  # 80000021.eax
