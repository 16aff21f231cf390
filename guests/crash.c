/*
 * Endings. One way to end a domain, chosen by the first word of the command line; most
 * are faults that Xen can deliver to nobody, so it crashes the domain.
 *
 *   shutdown reason=N   SCHEDOP_shutdown with that reason
 *   no-handler          a fault with no trap table
 *   no-stack            a fault with the stack pointer in unmapped memory
 *   read-only-stack     a fault with the stack pointer in a read-only page
 *   no-iret-frame       the iret hypercall with the stack pointer in unmapped memory
 *   no-callback         an event with upcalls unmasked and no event callback
 *   recursion           a page-fault handler that faults, until the stack has run over
 *   reset               EVTCHNOP_reset, which takes the console too; then reason 7, or a crash if it went wrong
 *   watchdog            a watchdog of one second that nobody pats
 *   no-user-tables      a jump to user mode with no user page tables
 */
#include "events.h"
#include "paging.h"
#include "traps.h"

#define WILD 0x0000700000000000ul

static u8 page[PAGE_SIZE] PAGE_ALIGNED;

static void fault_on_stack(u64 rsp)
{
    __asm__ volatile("mov %0, %%rsp\n ud2" : : "r"(rsp) : "memory");
}

static void event_without_callback(void)
{
    long port = evtchn_bind_ipi(0);
    evtchn_send((u32)port);
    shared_info->vcpu[0].upcall_mask = 0;
    HYPERCALL(HC_xen_version, 0, 0);
}

static void user_mode_without_tables(void)
{
    u64 frame[9] = {0, 0, 0, 0, (u64)page, FLAT_RING3_CS64, 0x202, (u64)page, FLAT_RING3_SS};
    iret_raw(frame);
}

static void reset_events(void)
{
    struct {
        u16 dom;
    } self = {DOMID_SELF};
    u32 port = (u32)evtchn_bind_ipi(0);
    evtchn_send(port);
    bool right = HYPERCALL(HC_event_channel_op, EVTCHNOP_reset, &self) == 0;
    right = right && evtchn_send(port) == -EINVAL && evtchn_close(start_info->console_evtchn) == -EINVAL;
    right = right && evtchn_bind_ipi(0) == 1; /* the lowest port is free, the store's as a rule */
    unsigned reason = right ? 7 : SHUTDOWN_crash;
    HYPERCALL(HC_sched_op, SCHEDOP_shutdown, &reason);
}

static void never_pat_the_watchdog(void)
{
    struct {
        u32 id, timeout; /* in seconds */
    } watchdog = {0, 1};
    if (HYPERCALL(HC_sched_op, SCHEDOP_watchdog, &watchdog) < 0)
        return;
    for (;;)
        HYPERCALL(HC_sched_op, SCHEDOP_yield, 0);
}

int main(void)
{
    print("ending: %s\n", start_info->cmd_line);
    console_drain();
    if (option("shutdown"))
        shut_down((unsigned)option_value("reason", 0));
    if (option("no-handler"))
        __asm__ volatile("ud2");
    traps_install();
    if (option("no-stack"))
        fault_on_stack(WILD);
    if (option("read-only-stack")) {
        set_read_only(page);
        fault_on_stack((u64)page + 2048);
    }
    if (option("no-iret-frame"))
        __asm__ volatile("mov %0, %%rsp\n syscall" : : "r"(WILD), "a"(HC_iret) : "memory");
    if (option("no-callback"))
        event_without_callback();
    if (option("recursion")) {
        trap_set(VECTOR_PF, TRAP_MASKS_UPCALLS, (void (*)(void))WILD);
        *(volatile u64 *)WILD = 1;
    }
    if (option("reset"))
        reset_events();
    if (option("watchdog"))
        never_pat_the_watchdog();
    if (option("no-user-tables"))
        user_mode_without_tables();
    check(false, "the domain should not have lived to see this");
    return 0;
}
