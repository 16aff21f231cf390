/* Xen's time as a guest computes it: vcpu_time_info and the processor's time-stamp counter. */
#ifndef GUEST_TIMING_H
#define GUEST_TIMING_H

#include "guest.h"

#define MS 1000000ul /* in ns */
#define VCPUOP_initialise 0
#define VCPUOP_up 1
#define VCPUOP_down 2
#define VCPUOP_is_up 3
#define VCPUOP_get_runstate_info 4
#define VCPUOP_register_runstate_memory_area 5
#define VCPUOP_set_periodic_timer 6
#define VCPUOP_stop_periodic_timer 7
#define VCPUOP_set_singleshot_timer 8
#define VCPUOP_stop_singleshot_timer 9
#define VCPUOP_register_vcpu_info 10
#define VCPUOP_send_nmi 11
#define VCPUOP_register_vcpu_time_memory_area 13

struct runstate {
    u32 state;
    u64 state_entry_time;
    u64 time[4]; /* running, runnable, blocked, offline */
};

static inline u64 rdtsc(void)
{
    u32 low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (u64)high << 32 | low;
}

/* ns since the machine began, by this vcpu_time_info. */
static inline u64 system_time(volatile struct vcpu_time_info *info)
{
    u32 version;
    u64 now;
    do {
        while ((version = info->version) & 1)
            ;
        barrier();
        u64 delta = rdtsc() - info->tsc_timestamp;
        delta = info->tsc_shift < 0 ? delta >> -info->tsc_shift : delta << info->tsc_shift;
        now = info->system_time + (u64)((unsigned __int128)delta * info->tsc_to_system_mul >> 32);
        barrier();
    } while (version != info->version);
    return now;
}

static inline u64 now_ns(void) { return system_time(&shared_info->vcpu[0].time); }

#endif
