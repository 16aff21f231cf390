/*
 * What a guest finds once page-table entries are no longer validated: it maps every frame number that there
 * could be, reads it, and then writes to all that are not its own. For a test that has switched the validation
 * of L1 entries off; with it on, nothing but the guest's own frames can be mapped.
 *
 * `frames=N` how far to go, `write` write, too, `far=N` go on with the Nth of some numbers that no memory has. What other
 * domains hold is told from what is ours by the word SECRET.
 */
#include "paging.h"
#include "traps.h"

#define SECRET 0x5ec2e75ec2e75ec2ul /* never stored in this guest's image as it stands */
#define KEY 0x1111111111111111ul

static const u64 far[] = {0xfee00, 0xfec00, 0xfffff, 0x100000, 0x1000000, 0x3fffffff, 0xfffffffff, 0xffffffffff};
static u64 tried, mapped, read_ok, found;
static struct region region;

static bool map(u64 mfn, u64 flags)
{
    tried++;
    return !mmu_update(machine_address(region.t1), mfn << PAGE_SHIFT | flags)
        && !mmuext(MMUEXT_INVLPG_LOCAL, region.base, 0);
}

static void look_at(u64 mfn, u64 key)
{
    volatile u64 *words = (u64 *)region.base;
    u64 value = 0;
    if (!map(mfn, PTE_KERNEL_RO | PTE_NX))
        return;
    mapped++;
    for (int i = 0; i < 512; i += 64) {
        TRY("mov (%1), %0", : "=r"(value) : "r"(&words[i]) : "memory");
        if (fault.vector != NO_FAULT)
            return;
        found += (value ^ KEY) == key;
    }
    read_ok++;
}

static void write_to(u64 mfn)
{
    if (mfn_to_pfn(mfn) == ~0ul && map(mfn, PTE_KERNEL | PTE_NX))
        for (int i = 8; i < 512; i += 64)
            TRY("mov %0, (%1)", : : "r"(KEY), "r"((u64 *)region.base + i) : "memory");
}

int main(void)
{
    u64 limit = option_value("frames", 0x8000), key = SECRET ^ KEY;
    traps_install();
    region = region_build(40);
    for (u64 mfn = 0; mfn < limit; mfn++)
        look_at(mfn, key);
    print("tried %lu mapped %lu read %lu\n", tried, mapped, read_ok);
    check_eq("secrets of others that it found", found, 0);
    console_drain();
    for (u64 mfn = 0; option("write") && mfn < limit; mfn++)
        write_to(mfn);
    for (unsigned i = option_value("far", LENGTH(far)); i < LENGTH(far); i++) {
        look_at(far[i], key);
        write_to(far[i]);
        check_eq("secrets that it found far away", found, 0);
    }
    map(0, 0);
    return 0;
}
