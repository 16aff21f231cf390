/*
 * The parts of Xen's public interface that the guests use: numbers and structures of the x86-64 PV
 * ABI (public headers xen.h, arch-x86/xen-x86_64.h, event_channel.h, sched.h, vcpu.h, memory.h,
 * version.h, grant_table.h, io/console.h). Facts of the interface, in our own words.
 */
#ifndef GUEST_XEN_H
#define GUEST_XEN_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;
typedef signed char s8;
typedef short s16;
typedef int s32;
typedef long s64;
typedef _Bool bool;
#define true 1
#define false 0
#define NULL ((void *)0)

#define PAGE_SIZE 4096ul
#define PAGE_SHIFT 12
#define DOMID_SELF 0x7ff0
#define DOMID_IO 0x7ff1
#define DOMID_XEN 0x7ff2
#define DOMID_INVALID 0x7ff4

/* Hypercall numbers. */
#define HC_set_trap_table 0
#define HC_mmu_update 1
#define HC_set_gdt 2
#define HC_stack_switch 3
#define HC_set_callbacks 4
#define HC_fpu_taskswitch 5
#define HC_sched_op_compat 6
#define HC_platform_op 7
#define HC_set_debugreg 8
#define HC_get_debugreg 9
#define HC_update_descriptor 10
#define HC_memory_op 12
#define HC_multicall 13
#define HC_update_va_mapping 14
#define HC_set_timer_op 15
#define HC_event_channel_op_compat 16
#define HC_xen_version 17
#define HC_console_io 18
#define HC_physdev_op_compat 19
#define HC_grant_table_op 20
#define HC_vm_assist 21
#define HC_update_va_mapping_otherdomain 22
#define HC_iret 23
#define HC_vcpu_op 24
#define HC_set_segment_base 25
#define HC_mmuext_op 26
#define HC_xsm_op 27
#define HC_nmi_op 28
#define HC_sched_op 29
#define HC_callback_op 30
#define HC_xenoprof_op 31
#define HC_event_channel_op 32
#define HC_physdev_op 33
#define HC_hvm_op 34
#define HC_sysctl 35
#define HC_domctl 36
#define HC_kexec_op 37
#define HC_tmem_op 38
#define HC_argo_op 39
#define HC_xenpmu_op 40
#define HC_dm_op 41
#define HC_hypfs_op 42

/* Xen's errno values, which hypercalls return negated. */
#define EPERM 1
#define ENOENT 2
#define ESRCH 3
#define ENXIO 6
#define E2BIG 7
#define EBADF 9
#define EAGAIN 11
#define ENOMEM 12
#define EACCES 13
#define EFAULT 14
#define EBUSY 16
#define EEXIST 17
#define EXDEV 18
#define ENODEV 19
#define EINVAL 22
#define ENOSPC 28
#define ENOSYS 38
#define ENOBUFS 105
#define EOPNOTSUPP 95
#define ETIME 62
#define ERANGE 34

/* Flat segments of Xen's GDT, as a guest names them (RPL 3). */
#define FLAT_RING3_CS32 0xe023
#define FLAT_RING3_SS 0xe02b
#define FLAT_RING3_CS64 0xe033

struct vcpu_time_info {
    u32 version;
    u32 pad0;
    u64 tsc_timestamp;
    u64 system_time;
    u32 tsc_to_system_mul;
    s8 tsc_shift;
    u8 flags;
    u8 pad1[2];
};

struct vcpu_info {
    u8 upcall_pending;
    u8 upcall_mask;
    u64 pending_selector;
    u64 cr2;
    u64 pad;
    struct vcpu_time_info time;
};

struct shared_info {
    struct vcpu_info vcpu[32];
    u64 evtchn_pending[64];
    u64 evtchn_mask[64];
    u32 wc_version, wc_sec, wc_nsec, wc_sec_hi;
    u64 max_pfn, p2m_frame_list_list, nmi_reason, p2m_cr3, p2m_vaddr, p2m_generation;
};

struct start_info {
    char magic[32];
    u64 nr_pages;
    u64 shared_info; /* machine address */
    u32 flags;
    u64 store_mfn;
    u32 store_evtchn;
    u64 console_mfn;
    u32 console_evtchn;
    u64 pt_base; /* virtual address of the L4 */
    u64 nr_pt_frames;
    u64 mfn_list; /* virtual address of the p2m */
    u64 mod_start;
    u64 mod_len;
    char cmd_line[1024];
    u64 first_p2m_pfn;
    u64 nr_p2m_frames;
};

struct console_ring {
    char in[1024];
    char out[2048];
    u32 in_cons, in_prod, out_cons, out_prod;
};

/* sched_op */
#define SCHEDOP_yield 0
#define SCHEDOP_block 1
#define SCHEDOP_shutdown 2
#define SCHEDOP_poll 3
#define SCHEDOP_remote_shutdown 4
#define SCHEDOP_shutdown_code 5
#define SCHEDOP_watchdog 6
#define SCHEDOP_pin_override 7
#define SHUTDOWN_poweroff 0
#define SHUTDOWN_reboot 1
#define SHUTDOWN_crash 3

/* event_channel_op */
#define EVTCHNOP_bind_interdomain 0
#define EVTCHNOP_bind_virq 1
#define EVTCHNOP_bind_pirq 2
#define EVTCHNOP_close 3
#define EVTCHNOP_send 4
#define EVTCHNOP_status 5
#define EVTCHNOP_alloc_unbound 6
#define EVTCHNOP_bind_ipi 7
#define EVTCHNOP_bind_vcpu 8
#define EVTCHNOP_unmask 9
#define EVTCHNOP_reset 10
#define EVTCHNOP_init_control 11
#define EVTCHNOP_expand_array 12
#define EVTCHNOP_set_priority 13
#define EVTCHNOP_reset_cont 14

/* console_io */
#define CONSOLEIO_write 0
#define CONSOLEIO_read 1

/* update_va_mapping flags; a pointer to a vCPU bitmap may be or-ed in. */
#define UVMF_NONE 0
#define UVMF_TLB_FLUSH 1
#define UVMF_INVLPG 2
#define UVMF_LOCAL 0
#define UVMF_MULTI 0
#define UVMF_ALL 4

_Static_assert(sizeof(struct vcpu_info) == 64, "public ABI");
_Static_assert(__builtin_offsetof(struct shared_info, evtchn_pending) == 2048, "public ABI");
_Static_assert(__builtin_offsetof(struct shared_info, wc_version) == 3072, "public ABI");
_Static_assert(__builtin_offsetof(struct start_info, cmd_line) == 128, "public ABI");
_Static_assert(__builtin_offsetof(struct start_info, first_p2m_pfn) == 1152, "public ABI");
_Static_assert(__builtin_offsetof(struct console_ring, in_cons) == 3072, "public ABI");

#endif
