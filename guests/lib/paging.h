/*
 * Page tables. The guest's own tables are found through start_info and lie, read-only, in the initial
 * mapping like every other page of the image; so a table's virtual address follows from its mfn.
 */
#ifndef GUEST_PAGING_H
#define GUEST_PAGING_H

#include "guest.h"

#define PTE_P 1ul
#define PTE_W 2ul
#define PTE_U 4ul
#define PTE_PWT 8ul
#define PTE_PCD 0x10ul
#define PTE_A 0x20ul
#define PTE_D 0x40ul
#define PTE_PS 0x80ul
#define PTE_G 0x100ul
#define PTE_AVL0 0x200ul
#define PTE_NX (1ul << 63)
#define PTE_KERNEL (PTE_P | PTE_W | PTE_A | PTE_D)
#define PTE_KERNEL_RO (PTE_P | PTE_A | PTE_D)
#define PTE_TABLE (PTE_P | PTE_W | PTE_U | PTE_A)
#define PTE_MFN(pte) (((pte) & 0x000ffffffffff000ul) >> PAGE_SHIFT)

struct mmu_update {
    u64 ptr; /* machine address of the entry; the low bits are the sub-command */
    u64 val;
};
#define MMU_NORMAL_PT_UPDATE 0
#define MMU_MACHPHYS_UPDATE 1
#define MMU_PT_UPDATE_PRESERVE_AD 2
#define MMU_PT_UPDATE_NO_TRANSLATE 3
#define MMU_UPDATE_PREEMPTED 0x80000000u

struct mmuext_op {
    u32 cmd;
    u64 arg1; /* mfn or linear address */
    u64 arg2; /* nr_ents, vCPU mask pointer or source mfn */
};
#define MMUEXT_PIN_L1_TABLE 0
#define MMUEXT_PIN_L2_TABLE 1
#define MMUEXT_PIN_L3_TABLE 2
#define MMUEXT_PIN_L4_TABLE 3
#define MMUEXT_UNPIN_TABLE 4
#define MMUEXT_NEW_BASEPTR 5
#define MMUEXT_TLB_FLUSH_LOCAL 6
#define MMUEXT_INVLPG_LOCAL 7
#define MMUEXT_TLB_FLUSH_MULTI 8
#define MMUEXT_INVLPG_MULTI 9
#define MMUEXT_TLB_FLUSH_ALL 10
#define MMUEXT_INVLPG_ALL 11
#define MMUEXT_FLUSH_CACHE 12
#define MMUEXT_SET_LDT 13
#define MMUEXT_NEW_USER_BASEPTR 15
#define MMUEXT_CLEAR_PAGE 16
#define MMUEXT_COPY_PAGE 17
#define MMUEXT_FLUSH_CACHE_GLOBAL 18
#define MMUEXT_MARK_SUPER 19
#define MMUEXT_UNMARK_SUPER 20

void *page_alloc(void); /* a zeroed page of the image, from a fixed pool */
u64 *table_va(u64 mfn); /* where in the initial mapping this frame of ours is */
u64 *pte_of(const void *va, int level); /* the entry that maps va, in the current kernel tables */
static inline u64 machine_address(const void *va) { return va_to_mfn(va) << PAGE_SHIFT | ((u64)va & 0xfff); }

long mmu_update(u64 ptr, u64 val);      /* one update of our own */
long mmuext(u32 cmd, u64 arg1, u64 arg2); /* one operation of our own */
long update_va(const void *va, u64 pte, u64 flags);
static inline u64 entry(const void *page, u64 flags) { return va_to_mfn(page) << PAGE_SHIFT | flags; }

/* Tables of our own for the 512 GiB of one L4 slot, linked; only t1[0] is used, for `page`. */
struct region {
    u64 base;
    u64 *l4, *t3, *t2, *t1;
    u8 *page;
};
struct region region_build(u64 slot);
long region_take_down(struct region *region); /* unlink; 0 if all its tables are then free */

/* A frame that is not ours: nobody's or another domain's. */
u64 foreign_mfn(void);

struct m2p {
    u64 v_start, v_end, max_mfn;
};
struct m2p machphys_mapping(void);

long set_read_only(const void *va);
long set_writable(const void *va);

#endif
