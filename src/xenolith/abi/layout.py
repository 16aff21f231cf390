"""Layout of the structures that a 64-bit guest shares with Xen (public/xen.h, arch-x86/xen.h).

Offsets in bytes from the start of the structure; `Struct`s for what is moved as a whole.
"""

from struct import Struct
from typing import Final

U16: Final = Struct("<H")
U32: Final = Struct("<I")
U64: Final = Struct("<Q")

# --- where Xen lives in every address space (arch-x86/xen-x86_64.h) ---------------------------------
XEN_FIRST_SLOT: Final = 256  # L4 slots 256..271 belong to Xen
XEN_LAST_SLOT: Final = 271
HYPERVISOR_VIRT_START: Final = 0xFFFF_8000_0000_0000
HYPERVISOR_VIRT_END: Final = 0xFFFF_8800_0000_0000
MACH2PHYS_VIRT_START: Final = 0xFFFF_8000_0000_0000  # L4 slot 256
MACH2PHYS_VIRT_END: Final = 0xFFFF_8040_0000_0000

# --- selectors Xen offers (FLAT_*; the GDT entries behind them are Xen's own) ----------------------
FLAT_RING3_CS32: Final = 0xE023
FLAT_RING3_CS64: Final = 0xE033
FLAT_RING3_DS32: Final = 0xE02B
FLAT_RING3_DS64: Final = 0x0000
FLAT_RING3_SS32: Final = 0xE02B
FLAT_RING3_SS64: Final = 0xE02B
FIRST_RESERVED_GDT_PAGE: Final = 14
FIRST_RESERVED_GDT_ENTRY: Final = FIRST_RESERVED_GDT_PAGE * 512
LAST_RESERVED_GDT_ENTRY: Final = FIRST_RESERVED_GDT_ENTRY + 1023

# --- vcpu_info (64 bytes), vcpu_time_info (32 bytes, at 32) ----------------------------------------
VCPU_INFO_SIZE: Final = 64
VCPU_INFO_UPCALL_PENDING: Final = 0  # u8
VCPU_INFO_UPCALL_MASK: Final = 1  # u8
VCPU_INFO_PENDING_SEL: Final = 8  # u64
VCPU_INFO_ARCH_CR2: Final = 16  # u64
VCPU_INFO_TIME: Final = 32
# u32 version, u32 pad, u64 tsc_timestamp, u64 system_time (ns), u32 tsc_to_system_mul, s8 tsc_shift, u8 flags, u16 pad
VCPU_TIME_INFO: Final = Struct("<IIQQIbBH")
XEN_PVCLOCK_TSC_STABLE_BIT: Final = 1
XEN_PVCLOCK_GUEST_STOPPED: Final = 2

# --- shared_info -----------------------------------------------------------------------------------
XEN_LEGACY_MAX_VCPUS: Final = 32
SHARED_VCPU_INFO: Final = 0  # 32 vcpu_info
SHARED_EVTCHN_PENDING: Final = 2048  # 64 words of 64 bits
SHARED_EVTCHN_MASK: Final = 2560
SHARED_WC_VERSION: Final = 3072  # u32
SHARED_WC_SEC: Final = 3076  # u32
SHARED_WC_NSEC: Final = 3080  # u32
SHARED_WC_SEC_HI: Final = 3084  # u32
SHARED_MAX_PFN: Final = 3088  # arch.max_pfn, u64
SHARED_P2M_TOP: Final = 3096  # arch.pfn_to_mfn_frame_list_list, u64
SHARED_NMI_REASON: Final = 3104
SHARED_P2M_CR3: Final = 3112
SHARED_P2M_VADDR: Final = 3120
SHARED_P2M_GENERATION: Final = 3128

# --- start_info ------------------------------------------------------------------------------------
START_INFO_MAGIC: Final = 0  # char[32]
START_INFO_NR_PAGES: Final = 32
START_INFO_SHARED_INFO: Final = 40  # machine address
START_INFO_FLAGS: Final = 48  # u32
START_INFO_STORE_MFN: Final = 56
START_INFO_STORE_EVTCHN: Final = 64  # u32
START_INFO_CONSOLE_MFN: Final = 72
START_INFO_CONSOLE_EVTCHN: Final = 80  # u32
START_INFO_PT_BASE: Final = 88
START_INFO_NR_PT_FRAMES: Final = 96
START_INFO_MFN_LIST: Final = 104
START_INFO_MOD_START: Final = 112
START_INFO_MOD_LEN: Final = 120
START_INFO_CMD_LINE: Final = 128  # char[1024]
START_INFO_FIRST_P2M_PFN: Final = 1152
START_INFO_NR_P2M_FRAMES: Final = 1160
MAX_GUEST_CMDLINE: Final = 1024
SIF_PRIVILEGED: Final = 1
SIF_INITDOMAIN: Final = 2
SIF_MULTIBOOT_MOD: Final = 4
SIF_MOD_START_PFN: Final = 8
SIF_VIRT_P2M_4TOOLS: Final = 16

# --- hypercall arguments ---------------------------------------------------------------------------
MMU_UPDATE: Final = Struct("<QQ")  # ptr | command, val
MMUEXT_OP: Final = Struct("<IIQQ")  # cmd, pad, arg1 (mfn or linear_addr), arg2 (nr_ents, vcpumask, src_mfn)
MULTICALL_ENTRY: Final = Struct("<QqQQQQQQ")  # op, result, args[6]
TRAP_INFO: Final = Struct("<BBHIQ")  # vector, flags, cs, pad, address
TRAP_INFO_DPL: Final = 3  # flags: DPL in bits 0-1
TRAP_INFO_MASK_EVENTS: Final = 4
VCPU_RUNSTATE_INFO: Final = Struct("<iIQ4Q")  # state, pad, state_entry_time (ns), time[4] (ns)
ADD_TO_PHYSMAP_SIZE: Final = 24
MEMORY_RESERVATION: Final = Struct("<QQIIHHI")  # extent_start, nr_extents, extent_order, mem_flags, domid, pad, pad
IRET_FRAME_FIELDS: Final = ("rax", "r11", "rcx", "flags", "rip", "cs", "rflags", "rsp", "ss")
IRET_FRAME: Final = Struct(f"<{len(IRET_FRAME_FIELDS)}Q")
CALLBACK_REGISTER: Final = Struct("<HHIQ")  # type, flags, pad, address
VCPU_GUEST_CONTEXT_SIZE: Final = 5168
