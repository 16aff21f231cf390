/*
 * Non-maskable interrupts: the callback, what holds one back and what does not (public callback.h, vcpu.h).
 *
 * By itself the guest sends them with VCPUOP_send_nmi. With external=N on the command line it waits, blocked,
 * for N from outside (`xl trigger DOMAIN nmi`), and says when it is ready for each.
 */
#include "events.h"
#include "timing.h"
#include "traps.h"

#define VECTOR_NMI 2

static volatile u64 nmis, depth, deepest, mask_on_entry, mask_in_frame, seen_inside;
static volatile int sends_inside;

static long send_nmi(void) { return HYPERCALL(HC_vcpu_op, VCPUOP_send_nmi, 0, 0); }

static bool on_nmi(struct regs *regs)
{
    if (regs->vector != VECTOR_NMI)
        return false;
    nmis++;
    if (++depth > deepest)
        deepest = depth;
    mask_on_entry = entry_upcall_mask;
    mask_in_frame = regs->cs >> 32 & 0xff;
    for (; sends_inside; sends_inside--) {
        send_nmi();
        HYPERCALL(HC_xen_version, 0, 0);
        seen_inside = nmis;
    }
    depth--;
    return true;
}

static void without_callback(void)
{
    print("# no callback\n");
    check_eq("  send_nmi", send_nmi(), 0);
    trap_hook = on_nmi;
    check_eq("  a callback that is not canonical", callback_register(CALLBACKTYPE_nmi, 0, (void (*)(void))(1ul << 63)), -EINVAL);
    check_eq("  register the callback", callback_register(CALLBACKTYPE_nmi, 0, trap_2), 0);
    HYPERCALL(HC_xen_version, 0, 0);
    check_eq("  the NMI of before is lost", (long)nmis, 0);
}

static void delivery(void)
{
    volatile struct vcpu_info *vcpu = &shared_info->vcpu[0];
    print("# delivery\n");
    vcpu->upcall_mask = 0;
    check_eq("  send_nmi", send_nmi(), 0);
    check_eq("  the callback has run once", (long)nmis, 1);
    check_eq("  with upcalls masked", (long)mask_on_entry, 1);
    check_eq("  its frame has the mask of before", (long)mask_in_frame, 0);
    check_eq("  which iret gives back", vcpu->upcall_mask, 0);
    vcpu->upcall_mask = 1;
    send_nmi();
    check_eq("  the upcall mask holds none back", (long)nmis, 2);
    check_eq("  the frame has the mask of before", (long)mask_in_frame, 1);
    check_eq("  and so has the vCPU again", vcpu->upcall_mask, 1);
}

static void one_at_a_time(void)
{
    print("# sent by the callback\n");
    nmis = deepest = 0;
    sends_inside = 1;
    send_nmi();
    check_eq("  it is held back while the callback runs", (long)seen_inside, 1);
    check_eq("  and comes with its iret", (long)nmis, 2);
    check_eq("  never one in another", (long)deepest, 1);
    nmis = deepest = 0;
    sends_inside = 3;
    send_nmi();
    check_eq("  three are held back", (long)seen_inside, 1);
    check_eq("  and are one", (long)nmis, 2);
    check_eq("  never one in another", (long)deepest, 1);
}

static void trap_table_entry(void)
{
    struct {
        u16 type;
    } unregister = {CALLBACKTYPE_nmi};
    print("# the callback and entry 2 of the trap table are one\n");
    nmis = 0;
    check_eq("  unregister", HYPERCALL(HC_callback_op, CALLBACKOP_unregister, &unregister), 0);
    send_nmi();
    HYPERCALL(HC_xen_version, 0, 0);
    check_eq("  none comes", (long)nmis, 0);
    trap_set(VECTOR_NMI, 0, trap_2);
    shared_info->vcpu[0].upcall_mask = 0;
    send_nmi();
    check_eq("  set_trap_table: one comes there", (long)nmis, 1);
    check_eq("  with the mask that the entry asks for", (long)mask_on_entry, 0);
    shared_info->vcpu[0].upcall_mask = 1;
    check_eq("  unregister", HYPERCALL(HC_callback_op, CALLBACKOP_unregister, &unregister), 0);
    send_nmi();
    HYPERCALL(HC_xen_version, 0, 0);
    check_eq("  the entry is gone too", (long)nmis, 1);
}

static void from_outside(u64 count)
{
    print("# from outside\n");
    trap_hook = on_nmi;
    check_eq("  register the callback", callback_register(CALLBACKTYPE_nmi, 0, trap_2), 0);
    for (u64 n = 1; n <= count; n++) {
        print("ready for NMI %ld\n", n);
        while (nmis < n)
            HYPERCALL(HC_sched_op, SCHEDOP_block, 0);
        check_eq("  it ends the sleep and comes once", (long)nmis, (long)n);
    }
}

int main(void)
{
    u64 external = option_value("external", 0);
    events_quiet();
    if (external) {
        from_outside(external);
        return 0;
    }
    without_callback();
    delivery();
    one_at_a_time();
    trap_table_entry();
    return 0;
}
