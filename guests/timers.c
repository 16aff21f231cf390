/*
 * Time: vcpu_time_info and the wall clock, the timers, blocking and polling, and the accounts that Xen
 * keeps of what a vCPU did (public xen.h, vcpu.h, sched.h). No check bounds a time from above.
 */
#include "timing.h"

#include "events.h"
#include "paging.h"
#include "traps.h"

#define WILD 0x700000000000ul

static u32 timer; /* the port of VIRQ_TIMER */

static void clocks(void)
{
    volatile struct vcpu_time_info *info = &shared_info->vcpu[0].time;
    print("# clocks\n");
    check_eq("  vcpu_time_info has an even version", info->version & 1, 0);
    check_eq("  and a multiplier", info->tsc_to_system_mul != 0, 1);
    u64 before = now_ns(), backwards = 0;
    for (int i = 0; i < 20000; i++) {
        u64 now = now_ns();
        backwards += now < before;
        before = now;
    }
    check_eq("  system time never runs backwards", (long)backwards, 0);
    u64 tsc = rdtsc(), start = now_ns();
    while (now_ns() - start < 5 * MS)
        ;
    check_eq("  5 ms of system time are some of the TSC", rdtsc() - tsc > 1000, 1);
    check_eq("  the wall clock has an even version", shared_info->wc_version & 1, 0);
    /* wc_sec is the wall-clock time at system time 0. */
    u64 seconds = shared_info->wc_sec + (u64)shared_info->wc_sec_hi * (1ul << 32) + now_ns() / 1000000000;
    check_eq("  it is later than 2020", seconds > 1577836800, 1);
    check_eq("  and earlier than 2100", seconds < 4102444800, 1);
    check_eq("  its nanoseconds are less than a second", shared_info->wc_nsec < 1000000000, 1);

    static struct vcpu_time_info area;
    u64 address = (u64)&area;
    check_eq("  register_vcpu_time_memory_area", HYPERCALL(HC_vcpu_op, VCPUOP_register_vcpu_time_memory_area, 0, &address), 0);
    check_eq("  it is filled in at once", area.tsc_to_system_mul, info->tsc_to_system_mul);
    u64 there = system_time(&area), here = now_ns();
    check_eq("  and shows the same time", here >= there && here - there < 60000 * MS, 1);
}

/* Wait by blocking until a timer event has come. */
static void wait_for_timer(void)
{
    upcall_ports = 0;
    while (upcall_ports == 0) {
        HYPERCALL(HC_sched_op, SCHEDOP_block, 0);
        upcalls_disable();
    }
}

static void timer_op(void)
{
    print("# set_timer_op\n");
    u64 deadline = now_ns() + 20 * MS;
    upcall_ports = 0;
    check_eq("  in 20 ms", HYPERCALL(HC_set_timer_op, deadline), 0);
    wait_for_timer();
    check_eq("  the event is VIRQ_TIMER's", (long)upcall_ports, 1l << timer);
    check_eq("  not early", now_ns() >= deadline, 1);
    check_eq("  in the past", HYPERCALL(HC_set_timer_op, now_ns() - 1 * MS), 0);
    wait_for_timer();
    check_eq("  comes at once", (long)upcall_ports, 1l << timer);
    check_eq("  in an hour", HYPERCALL(HC_set_timer_op, now_ns() + 3600000 * MS), 0);
    check_eq("  and never", HYPERCALL(HC_set_timer_op, 0), 0);
}

static void singleshot(void)
{
    struct {
        u64 timeout;
        u32 flags;
    } single = {now_ns() + 10 * MS, 0};
    print("# the singleshot timer\n");
    check_eq("  in 10 ms", HYPERCALL(HC_vcpu_op, VCPUOP_set_singleshot_timer, 0, &single), 0);
    wait_for_timer();
    check_eq("  not early", now_ns() >= single.timeout, 1);
    single.timeout = now_ns() - 1 * MS;
    check_eq("  in the past: comes at once", HYPERCALL(HC_vcpu_op, VCPUOP_set_singleshot_timer, 0, &single), 0);
    wait_for_timer();
    single.flags = 1;
    check_eq("  in the past, with the flag that once refused it", HYPERCALL(HC_vcpu_op, VCPUOP_set_singleshot_timer, 0, &single), 0);
    wait_for_timer();
    single.timeout = now_ns() + 3600000 * MS;
    check_eq("  in an hour", HYPERCALL(HC_vcpu_op, VCPUOP_set_singleshot_timer, 0, &single), 0);
    check_eq("  stopped", HYPERCALL(HC_vcpu_op, VCPUOP_stop_singleshot_timer, 0, 0), 0);
    check_eq("  for a vCPU that does not exist", HYPERCALL(HC_vcpu_op, VCPUOP_set_singleshot_timer, 31, &single), -ENOENT);
    check_eq("  a wild pointer", HYPERCALL(HC_vcpu_op, VCPUOP_set_singleshot_timer, 0, WILD), -EFAULT);
}

static void periodic(void)
{
    u64 period = 10 * MS, start = now_ns();
    print("# the periodic timer\n");
    check_eq("  every 10 ms", HYPERCALL(HC_vcpu_op, VCPUOP_set_periodic_timer, 0, &period), 0);
    /* Only while the vCPU runs: Xen stops the tick of one that blocks. */
    u64 target = upcall_count + 3;
    upcalls_enable();
    while (upcall_count < target && now_ns() - start < 10000 * MS)
        ;
    upcalls_disable();
    check_eq("  three came while we ran", upcall_count >= target, 1);
    check_eq("  they took at least 20 ms", now_ns() - start >= 20 * MS, 1);
    check_eq("  stop", HYPERCALL(HC_vcpu_op, VCPUOP_stop_periodic_timer, 0, 0), 0);
    period = 999999;
    check_eq("  less than 1 ms", HYPERCALL(HC_vcpu_op, VCPUOP_set_periodic_timer, 0, &period), -EINVAL);
    period = ~0ul;
    check_eq("  for ever", HYPERCALL(HC_vcpu_op, VCPUOP_set_periodic_timer, 0, &period), -EINVAL);
    check_eq("  a wild pointer", HYPERCALL(HC_vcpu_op, VCPUOP_set_periodic_timer, 0, WILD), -EFAULT);
    evtchn_clear(timer);
}

static void blocking(void)
{
    struct {
        u32 *ports;
        u32 nr_ports;
        u64 timeout;
    } poll = {&timer, 1, 0};
    print("# waiting\n");
    u32 ipi = (u32)evtchn_bind_ipi(0);
    evtchn_unmask(ipi);
    evtchn_send(ipi);
    HYPERCALL(HC_sched_op, SCHEDOP_block, 0);
    check_eq("  block with an event pending comes back", shared_info->vcpu[0].upcall_mask, 0);
    upcalls_disable();

    evtchn_mask(timer);
    evtchn_clear(timer);
    poll.timeout = now_ns() + 10 * MS;
    check_eq("  poll until 10 ms have gone by", HYPERCALL(HC_sched_op, SCHEDOP_poll, &poll), 0);
    check_eq("  not early", now_ns() >= poll.timeout, 1);
    check_eq("  the port is not pending", evtchn_pending(timer), 0);
    u64 deadline = now_ns() + 10 * MS;
    HYPERCALL(HC_set_timer_op, deadline);
    poll.timeout = now_ns() + 3600000 * MS;
    check_eq("  poll until the timer fires", HYPERCALL(HC_sched_op, SCHEDOP_poll, &poll), 0);
    check_eq("  the port is pending", evtchn_pending(timer), 1);
    check_eq("  not early", now_ns() >= deadline, 1);
    evtchn_clear(timer);
    poll.timeout = 0;
    HYPERCALL(HC_set_timer_op, now_ns() + 5 * MS);
    check_eq("  poll without a time limit", HYPERCALL(HC_sched_op, SCHEDOP_poll, &poll), 0);
    check_eq("  the port is pending", evtchn_pending(timer), 1);
    evtchn_clear(timer);
    evtchn_unmask(timer);
    check_eq("  yield", HYPERCALL(HC_sched_op, SCHEDOP_yield, 0), 0);
    check_eq("  an unknown operation", HYPERCALL(HC_sched_op, 99, 0), -ENOSYS);
    u32 id_and_reason[2] = {0, 0};
    check_eq("  remote_shutdown of domain 0", HYPERCALL(HC_sched_op, SCHEDOP_remote_shutdown, id_and_reason), -EPERM);
    check_eq("  shutdown with a wild pointer", HYPERCALL(HC_sched_op, SCHEDOP_shutdown, WILD), -EFAULT);
}

static void accounts(void)
{
    static struct runstate area;
    struct runstate info;
    u64 address = (u64)&area;
    print("# the runstate\n");
    check_eq("  get_runstate_info", HYPERCALL(HC_vcpu_op, VCPUOP_get_runstate_info, 0, &info), 0);
    check_eq("  running", info.state, 0);
    check_eq("  some time was spent running", info.time[0] > 0, 1);
    check_eq("  and some blocked", info.time[2] > 0, 1);
    check_eq("  the state began in the past", info.state_entry_time <= now_ns(), 1);
    u64 blocked = info.time[2];
    check_eq("  register_runstate_memory_area", HYPERCALL(HC_vcpu_op, VCPUOP_register_runstate_memory_area, 0, &address), 0);
    check_eq("  it is filled in: running", area.state, 0);
    check_eq("  with the time spent running", area.time[0] > 0, 1);
    HYPERCALL(HC_set_timer_op, now_ns() + 20 * MS);
    wait_for_timer();
    check_eq("  after 20 ms of blocking", HYPERCALL(HC_vcpu_op, VCPUOP_get_runstate_info, 0, &info), 0);
    check_eq("  the time blocked has grown", info.time[2] > blocked, 1);
    check_eq("  the area shows it too", *(volatile u64 *)&area.time[2] > blocked, 1);
    check_eq("  a vCPU that does not exist", HYPERCALL(HC_vcpu_op, VCPUOP_get_runstate_info, 31, &info), -ENOENT);
    check_eq("  a wild pointer", HYPERCALL(HC_vcpu_op, VCPUOP_get_runstate_info, 0, WILD), -EFAULT);
    address = 0;
    check_eq("  no area any more", HYPERCALL(HC_vcpu_op, VCPUOP_register_runstate_memory_area, 0, &address), 0);
    check_eq("  vCPU 0 is up", HYPERCALL(HC_vcpu_op, VCPUOP_is_up, 0, 0), 1);
    check_eq("  vCPU 31 does not exist", HYPERCALL(HC_vcpu_op, VCPUOP_is_up, 31, 0), -ENOENT);
    check_eq("  an unknown operation", HYPERCALL(HC_vcpu_op, 99, 0, 0), -ENOSYS);
}

int main(void)
{
    traps_install();
    events_quiet();
    upcalls_install();
    HYPERCALL(HC_vcpu_op, VCPUOP_stop_periodic_timer, 0, 0);
    timer = (u32)evtchn_bind_virq(VIRQ_TIMER, 0);
    evtchn_unmask(timer);
    clocks();
    timer_op();
    singleshot();
    periodic();
    blocking();
    accounts();
    return 0;
}
