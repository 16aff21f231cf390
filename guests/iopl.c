/*
 * The I/O privilege level with VMASST_TYPE_architectural_iopl (public xen.h): frames show it, iret loads it, and a
 * kernel's CLI is allowed at any level, as in ring 0.
 */
#include "events.h"
#include "traps.h"

#define VMASST_enable 0
#define VMASST_disable 1
#define VMASST_architectural_iopl 4
#define FLAGS_IOPL 0x3000ul

static long set_iopl(u32 iopl)
{
    return HYPERCALL(HC_physdev_op, 6, &iopl);
}

static u64 cli(void)
{
    TRY("cli", : : : "memory");
    return fault.vector;
}

/* What the frame of a fault shows. */
static u64 shown(void)
{
    TRY("ud2", : : : "memory");
    return fault.rflags & FLAGS_IOPL;
}

static void iret_with(u64 flags)
{
    u64 frame[9] = {0, 0, 0, 0, (u64)iret_raw_landed, FLAT_RING3_CS64 & ~3, 2 | flags, 0, FLAT_RING3_SS};
    frame[7] = (u64)(frame + 9);
    check_eq("  iret", iret_raw(frame), 0);
}

int main(void)
{
    traps_install();
    events_quiet();
    print("# without the assist\n");
    check_eq("  a kernel's CLI at level 0: #GP", (long)cli(), VECTOR_GP);
    check_eq("  set_iopl 1", set_iopl(1), 0);
    check_eq("  CLI at level 1", (long)cli(), NO_FAULT);
    check_eq("  frames show level 0", (long)shown(), 0);
    iret_with(0x3000);
    check_eq("  iret does not load it", (long)shown(), 0);
    print("# with it\n");
    check_eq("  vm_assist", HYPERCALL(HC_vm_assist, VMASST_enable, VMASST_architectural_iopl), 0);
    check_eq("  frames show the level", (long)shown(), 0x1000);
    check_eq("  and the way back from them keeps it", (long)shown(), 0x1000);
    iret_with(0x3000);
    check_eq("  iret loads it", (long)shown(), 0x3000);
    check_eq("  set_iopl 2", set_iopl(2), 0);
    check_eq("  which is shown", (long)shown(), 0x2000);
    iret_with(0);
    check_eq("  iret loads 0", (long)shown(), 0);
    check_eq("  CLI at level 0", (long)cli(), NO_FAULT);
    check_eq("  the flags that can be read have no level", (long)(read_flags() & FLAGS_IOPL), 0);
    print("# without it again\n");
    check_eq("  set_iopl 3", set_iopl(3), 0);
    check_eq("  vm_assist", HYPERCALL(HC_vm_assist, VMASST_disable, VMASST_architectural_iopl), 0);
    check_eq("  frames show level 0", (long)shown(), 0);
    check_eq("  the level is what it was", (long)cli(), NO_FAULT);
    check_eq("  set_iopl 0", set_iopl(0), 0);
    check_eq("  CLI: #GP", (long)cli(), VECTOR_GP);
    return 0;
}
