/*
 * The machine-to-physical table at the address that the ABI fixes (public arch-x86/xen-x86_64.h,
 * MACH2PHYS_VIRT_START), which small kernels read without asking for another: loads of every common form, and
 * what is no load.
 */
#include "events.h"
#include "paging.h"
#include "traps.h"

#define M2P ((const u64 *)0xffff800000000000ul)

static const u64 *at;
static u64 pfn;

static void loads(void)
{
    u64 a = 0, b = 0, flags = 0, index = at - M2P;
    TRY("mov (%1), %0", : "=r"(a) : "r"(at) : "memory");
    check_eq("a load", fault.vector, NO_FAULT);
    check_eq("  is our pfn", a, pfn);
    TRY("mov (%1, %2, 8), %0", : "=r"(a) : "r"(M2P), "r"(index) : "memory");
    check_eq("base and index", a, pfn);
    TRY("mov (%0), %0", : "=r"(a) : "0"(at) : "memory");
    check_eq("into the base register", a, pfn);
    TRY("movabs 0xffff800000000000, %%rax", : "=a"(a) : : "memory");
    check_eq("from the table's beginning, by its full address", fault.vector, NO_FAULT);
    check_eq("  the same as by a register", a, M2P[0]);
    a = ~0ul;
    TRY("mov (%1), %k0", : "+r"(a) : "r"(at) : "memory");
    check_eq("32 bits clear the upper half", a, (u32)pfn);
    a = 0x1122334455667788;
    TRY("mov (%1), %w0", : "+r"(a) : "r"(at) : "memory");
    check_eq("16 bits leave the rest", a, (0x1122334455660000 | (u16)pfn));
    a = 0x1122334455667788;
    TRY("mov (%1), %b0", : "+q"(a) : "r"(at) : "memory");
    check_eq("8 bits leave the rest", a, (0x1122334455667700 | (u8)pfn));
    a = 0x1122334455667788;
    TRY("mov (%1), %%ah", : "+a"(a) : "r"(at) : "memory");
    check_eq("AH", a, (0x1122334455660088 | (u64)(u8)pfn << 8));
    TRY("movzbl (%1), %k0", : "=r"(a) : "r"(at) : "memory");
    check_eq("movzbl", a, (u8)pfn);
    TRY("movzwl (%1), %k0", : "=r"(a) : "r"(at) : "memory");
    check_eq("movzwl", a, (u16)pfn);
    TRY("movsbq (%1), %0", : "=r"(a) : "r"(at) : "memory");
    check_eq("movsbq", a, (s64)(s8)pfn);
    TRY("movslq (%1), %0", : "=r"(a) : "r"(at) : "memory");
    check_eq("movslq", a, (s64)(s32)pfn);
    b = pfn;
    TRY("cmp (%2), %1\n sete %b0", : "+q"(flags) : "r"(b), "r"(at) : "memory", "cc");
    check_eq("cmp with our pfn: equal", flags & 1, 1);
    TRY("cmpq $0, (%1)\n seta %b0", : "+q"(flags) : "r"(at) : "memory", "cc");
    check_eq("cmp with 0: above", flags & 1, 1);
    TRY("testq $0x0, (%1)\n sete %b0", : "+q"(flags) : "r"(at) : "memory", "cc");
    check_eq("test with 0: zero", flags & 1, 1);
    a = 5;
    TRY("add (%1), %0", : "+r"(a) : "r"(at) : "memory", "cc");
    check_eq("add", a, pfn + 5);
    a = 5;
    TRY("sub (%1), %0", : "+r"(a) : "r"(at) : "memory", "cc");
    check_eq("sub", a, 5 - pfn);
    a = 0xff;
    TRY("and (%1), %0", : "+r"(a) : "r"(at) : "memory", "cc");
    check_eq("and", a, pfn & 0xff);
    a = 1ul << 40;
    TRY("or (%1), %0", : "+r"(a) : "r"(at) : "memory", "cc");
    check_eq("or", a, pfn | 1ul << 40);
    a = pfn;
    TRY("xor (%1), %0", : "+r"(a) : "r"(at) : "memory", "cc");
    check_eq("xor", a, 0);
    a = 7;
    TRY("cmp $1, %2\n cmove (%1), %0", : "+r"(a) : "r"(at), "r"(1) : "memory", "cc");
    check_eq("cmove", a, pfn);
    a = 7;
    TRY("cmp $1, %2\n cmovb (%1), %0", : "+r"(a) : "r"(at), "r"(1) : "memory", "cc");
    check_eq("a cmov that is not done", a, 7);
    TRY("pushq (%1)\n pop %0", : "=r"(a) : "r"(at) : "memory");
    check_eq("push", a, pfn);
    const u64 *from = at;
    TRY("cld\n lodsq", : "=a"(a), "+S"(from) : : "memory");
    check_eq("lodsq", a, pfn);
    check_eq("  moves on", from - at, 1);
}

static void copies(void)
{
    static u64 copy[600];
    const u64 *first = at - M2P > 299 ? at - 299 : M2P, *from = first;
    u64 *to = copy, count = 600, wrong = 0;
    TRY("cld\n rep movsq", : "+S"(from), "+D"(to), "+c"(count) : : "memory");
    check_eq("rep movsq of 600 entries", fault.vector, NO_FAULT);
    check_eq("  all of them", count, 0);
    check_eq("  and on", to - copy, 600);
    for (int i = 0; i < 600; i++)
        wrong += copy[i] != first[i];
    check_eq("  as they are one by one", wrong, 0);
    check_eq("  ours in its place", copy[at - first], pfn);
}

static void no_loads(void)
{
    TRY("movq $0, (%0)", : : "r"(at) : "memory");
    check_eq("a store: #PF", fault.vector, VECTOR_PF);
    check_eq("  cr2", fault.cr2, (u64)at);
    TRY("addq $1, (%0)", : : "r"(at) : "memory", "cc");
    check_eq("an add to it: #PF", fault.vector, VECTOR_PF);
    u64 a = 1;
    TRY("xchg %0, (%1)", : "+r"(a) : "r"(at) : "memory");
    check_eq("xchg: #PF", fault.vector, VECTOR_PF);
    check_eq("  nothing was loaded", a, 1);
    check_eq("the entry is as it was", *at, pfn);
    TRY("mov (%1), %0", : "=r"(a) : "r"(0xffff803ffffff000ul) : "memory");
    check_eq("a load behind the table's end: #PF", fault.vector, VECTOR_PF);
    check_eq("  cr2", fault.cr2, 0xffff803ffffff000ul);
}

int main(void)
{
    traps_install();
    events_quiet();
    u8 *page = page_alloc();
    pfn = va_to_pfn(page);
    at = M2P + va_to_mfn(page);
    loads();
    copies();
    no_loads();
    u64 wrong = 0;
    for (u64 i = 0; i < start_info->nr_pages; i += 16)
        wrong += M2P[pfn_to_mfn(i)] != i;
    check_eq("every 16th frame of ours is there", wrong, 0);
    return 0;
}
