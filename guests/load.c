/*
 * What bench/scheduling.py and bench/scaling.py measure: a domain that computes for ever; with `rounds=N` so many
 * rounds; with `wakes=N` one that sleeps 5 ms so many times and says in microseconds how much later than its timer it
 * ran: the median, the 99th percentile and the worst. `busy=US` is for how long it computes after each.
 */
#include "events.h"
#include "timing.h"

#define MAX_WAKES 4096
#define SLEEP (5 * MS)

static u32 late[MAX_WAKES];

static u64 compute(u64 steps)
{
    u64 state = 1;
    while (steps--) {
        state = state * 6364136223846793005ul + 1442695040888963407ul;
        __asm__ volatile("" : "+r"(state));
    }
    return state;
}

static void sleeps(u64 wakes, u64 busy)
{
    u32 timer = (u32)evtchn_bind_virq(VIRQ_TIMER, 0);
    evtchn_unmask(timer);
    HYPERCALL(HC_vcpu_op, VCPUOP_stop_periodic_timer, 0, 0);
    for (u64 i = 0; i < wakes; i++) {
        u64 deadline = now_ns() + SLEEP;
        upcall_ports = 0;
        HYPERCALL(HC_set_timer_op, deadline);
        while (!upcall_ports) {
            HYPERCALL(HC_sched_op, SCHEDOP_block, 0);
            upcalls_disable();
        }
        u64 now = now_ns();
        late[i] = now > deadline ? (u32)((now - deadline) / 1000) : 0;
        while (now_ns() < now + busy * 1000)
            ;
    }
    for (u64 i = 1; i < wakes; i++) /* sorted, by insertion */
        for (u64 j = i; j && late[j - 1] > late[j]; j--) {
            u32 other = late[j];
            late[j] = late[j - 1];
            late[j - 1] = other;
        }
    print("late median=%u p99=%u worst=%u\n", late[wakes / 2], late[wakes * 99 / 100], late[wakes - 1]);
}

int main(void)
{
    events_quiet();
    upcalls_install();
    u64 wakes = option_value("wakes", 0), rounds = option_value("rounds", 0);
    if (wakes) {
        sleeps(wakes < MAX_WAKES ? wakes : MAX_WAKES, option_value("busy", 0));
    } else {
        for (u64 i = 0; !rounds || i < rounds; i++)
            compute(1000000);
    }
    print("done\n");
    return 0;
}
