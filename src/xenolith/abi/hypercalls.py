"""Hypercall and sub-operation numbers, flags and limits of the Xen ABI (public/*.h).

Numbers only; the layout of the structures that hypercalls take is in `abi.layout`.
"""

from typing import Final

# --- hypercall numbers (public/xen.h) ----------------------------------------------------------------
HYPERVISOR_set_trap_table: Final = 0
HYPERVISOR_mmu_update: Final = 1
HYPERVISOR_set_gdt: Final = 2
HYPERVISOR_stack_switch: Final = 3
HYPERVISOR_set_callbacks: Final = 4
HYPERVISOR_fpu_taskswitch: Final = 5
HYPERVISOR_sched_op_compat: Final = 6
HYPERVISOR_platform_op: Final = 7
HYPERVISOR_set_debugreg: Final = 8
HYPERVISOR_get_debugreg: Final = 9
HYPERVISOR_update_descriptor: Final = 10
HYPERVISOR_memory_op: Final = 12
HYPERVISOR_multicall: Final = 13
HYPERVISOR_update_va_mapping: Final = 14
HYPERVISOR_set_timer_op: Final = 15
HYPERVISOR_event_channel_op_compat: Final = 16
HYPERVISOR_xen_version: Final = 17
HYPERVISOR_console_io: Final = 18
HYPERVISOR_physdev_op_compat: Final = 19
HYPERVISOR_grant_table_op: Final = 20
HYPERVISOR_vm_assist: Final = 21
HYPERVISOR_update_va_mapping_otherdomain: Final = 22
HYPERVISOR_iret: Final = 23
HYPERVISOR_vcpu_op: Final = 24
HYPERVISOR_set_segment_base: Final = 25
HYPERVISOR_mmuext_op: Final = 26
HYPERVISOR_xsm_op: Final = 27
HYPERVISOR_nmi_op: Final = 28
HYPERVISOR_sched_op: Final = 29
HYPERVISOR_callback_op: Final = 30
HYPERVISOR_xenoprof_op: Final = 31
HYPERVISOR_event_channel_op: Final = 32
HYPERVISOR_physdev_op: Final = 33
HYPERVISOR_hvm_op: Final = 34
HYPERVISOR_sysctl: Final = 35
HYPERVISOR_domctl: Final = 36
HYPERVISOR_kexec_op: Final = 37
HYPERVISOR_tmem_op: Final = 38
HYPERVISOR_argo_op: Final = 39
HYPERVISOR_xenpmu_op: Final = 40
HYPERVISOR_dm_op: Final = 41
HYPERVISOR_hypfs_op: Final = 42
HYPERCALLS: Final = 64  # the hypercall page has a stub for each number below this

# --- well-known domains (public/xen.h) -------------------------------------------------------------
DOMID_FIRST_RESERVED: Final = 0x7FF0
INT_MAX: Final = (1 << 31) - 1  # counts that Xen takes as an int
DOMID_SELF: Final = 0x7FF0
DOMID_IO: Final = 0x7FF1
DOMID_XEN: Final = 0x7FF2
DOMID_COW: Final = 0x7FF3
DOMID_INVALID: Final = 0x7FF4
DOMID_IDLE: Final = 0x7FFF

# --- mmu_update (public/xen.h) ---------------------------------------------------------------------
MMU_NORMAL_PT_UPDATE: Final = 0
MMU_MACHPHYS_UPDATE: Final = 1
MMU_PT_UPDATE_PRESERVE_AD: Final = 2
MMU_PT_UPDATE_NO_TRANSLATE: Final = 3
MMU_UPDATE_PREEMPTED: Final = 1 << 31  # in the count: this is a continuation

# --- mmuext_op -------------------------------------------------------------------------------------
MMUEXT_PIN_L1_TABLE: Final = 0
MMUEXT_PIN_L2_TABLE: Final = 1
MMUEXT_PIN_L3_TABLE: Final = 2
MMUEXT_PIN_L4_TABLE: Final = 3
MMUEXT_UNPIN_TABLE: Final = 4
MMUEXT_NEW_BASEPTR: Final = 5
MMUEXT_TLB_FLUSH_LOCAL: Final = 6
MMUEXT_INVLPG_LOCAL: Final = 7
MMUEXT_TLB_FLUSH_MULTI: Final = 8
MMUEXT_INVLPG_MULTI: Final = 9
MMUEXT_TLB_FLUSH_ALL: Final = 10
MMUEXT_INVLPG_ALL: Final = 11
MMUEXT_FLUSH_CACHE: Final = 12
MMUEXT_SET_LDT: Final = 13
MMUEXT_NEW_USER_BASEPTR: Final = 15
MMUEXT_CLEAR_PAGE: Final = 16
MMUEXT_COPY_PAGE: Final = 17
MMUEXT_FLUSH_CACHE_GLOBAL: Final = 18
MMUEXT_MARK_SUPER: Final = 19
MMUEXT_UNMARK_SUPER: Final = 20

UVMF_NONE: Final = 0
UVMF_TLB_FLUSH: Final = 1
UVMF_INVLPG: Final = 2
UVMF_FLUSHTYPE_MASK: Final = 3
UVMF_ALL: Final = 4  # otherwise LOCAL, or a pointer to a bitmap of vCPUs

# --- callbacks (public/callback.h) -----------------------------------------------------------------
CALLBACKOP_register: Final = 0
CALLBACKOP_unregister: Final = 1
CALLBACKTYPE_event: Final = 0
CALLBACKTYPE_failsafe: Final = 1
CALLBACKTYPE_syscall: Final = 2
CALLBACKTYPE_sysenter_deprecated: Final = 3
CALLBACKTYPE_nmi: Final = 4
CALLBACKTYPE_sysenter: Final = 5
CALLBACKTYPE_syscall32: Final = 7
CALLBACKF_mask_events: Final = 1

SEGBASE_FS: Final = 0
SEGBASE_GS_USER: Final = 1
SEGBASE_GS_KERNEL: Final = 2
SEGBASE_GS_USER_SEL: Final = 3

VGCF_in_syscall: Final = 1 << 8  # iret frame flags: the frame came from SYSCALL

# --- memory_op (public/memory.h) -------------------------------------------------------------------
XENMEM_increase_reservation: Final = 0
XENMEM_decrease_reservation: Final = 1
XENMEM_maximum_ram_page: Final = 2
XENMEM_current_reservation: Final = 3
XENMEM_maximum_reservation: Final = 4
XENMEM_machphys_mfn_list: Final = 5
XENMEM_populate_physmap: Final = 6
XENMEM_add_to_physmap: Final = 7
XENMEM_memory_map: Final = 9
XENMEM_machine_memory_map: Final = 10
XENMEM_exchange: Final = 11
XENMEM_machphys_mapping: Final = 12
XENMEM_set_memory_map: Final = 13
XENMEM_maximum_gpfn: Final = 14
XENMEM_remove_from_physmap: Final = 15
XENMEM_get_sharing_freed_pages: Final = 18
XENMEM_get_sharing_shared_pages: Final = 19
XENMEM_claim_pages: Final = 24
XENMEM_get_vnumainfo: Final = 26
XENMEMF_address_bits: Final = 0xFF

# --- sched_op (public/sched.h) ---------------------------------------------------------------------
SCHEDOP_yield: Final = 0
SCHEDOP_block: Final = 1
SCHEDOP_shutdown: Final = 2
SCHEDOP_poll: Final = 3
SCHEDOP_remote_shutdown: Final = 4
SCHEDOP_shutdown_code: Final = 5
SCHEDOP_watchdog: Final = 6
SCHEDOP_pin_override: Final = 7
SHUTDOWN_poweroff: Final = 0
SHUTDOWN_reboot: Final = 1
SHUTDOWN_suspend: Final = 2
SHUTDOWN_crash: Final = 3
SHUTDOWN_watchdog: Final = 4
SHUTDOWN_soft_reset: Final = 5
SHUTDOWN_MAX: Final = 5

# --- vcpu_op (public/vcpu.h) -----------------------------------------------------------------------
VCPUOP_initialise: Final = 0
VCPUOP_up: Final = 1
VCPUOP_down: Final = 2
VCPUOP_is_up: Final = 3
VCPUOP_get_runstate_info: Final = 4
VCPUOP_register_runstate_memory_area: Final = 5
VCPUOP_set_periodic_timer: Final = 6
VCPUOP_stop_periodic_timer: Final = 7
VCPUOP_set_singleshot_timer: Final = 8
VCPUOP_stop_singleshot_timer: Final = 9
VCPUOP_register_vcpu_info: Final = 10
VCPUOP_send_nmi: Final = 11
VCPUOP_get_physid: Final = 12
VCPUOP_register_vcpu_time_memory_area: Final = 13
VCPU_SSHOTTMR_future: Final = 1

RUNSTATE_running: Final = 0
RUNSTATE_runnable: Final = 1
RUNSTATE_blocked: Final = 2
RUNSTATE_offline: Final = 3
XEN_RUNSTATE_UPDATE: Final = 1 << 63

# --- event_channel_op (public/event_channel.h) -----------------------------------------------------
EVTCHNOP_bind_interdomain: Final = 0
EVTCHNOP_bind_virq: Final = 1
EVTCHNOP_bind_pirq: Final = 2
EVTCHNOP_close: Final = 3
EVTCHNOP_send: Final = 4
EVTCHNOP_status: Final = 5
EVTCHNOP_alloc_unbound: Final = 6
EVTCHNOP_bind_ipi: Final = 7
EVTCHNOP_bind_vcpu: Final = 8
EVTCHNOP_unmask: Final = 9
EVTCHNOP_reset: Final = 10
EVTCHNOP_init_control: Final = 11
EVTCHNOP_expand_array: Final = 12
EVTCHNOP_set_priority: Final = 13
EVTCHNSTAT_closed: Final = 0
EVTCHNSTAT_unbound: Final = 1
EVTCHNSTAT_interdomain: Final = 2
EVTCHNSTAT_pirq: Final = 3
EVTCHNSTAT_virq: Final = 4
EVTCHNSTAT_ipi: Final = 5
EVTCHN_2L_NR_CHANNELS: Final = 4096

VIRQ_TIMER: Final = 0
VIRQ_DEBUG: Final = 1
VIRQ_CONSOLE: Final = 2
VIRQ_DOM_EXC: Final = 3
VIRQ_TBUF: Final = 4
VIRQ_DEBUGGER: Final = 6
VIRQ_XENOPROF: Final = 7
VIRQ_CON_RING: Final = 8
VIRQ_PCPU_STATE: Final = 9
VIRQ_MEM_EVENT: Final = 10
VIRQ_ARGO: Final = 11
VIRQ_ENOMEM: Final = 12
VIRQ_XENPMU: Final = 13
VIRQ_ARCH_0: Final = 16
NR_VIRQS: Final = 24

# --- xen_version (public/version.h) ----------------------------------------------------------------
XENVER_version: Final = 0
XENVER_extraversion: Final = 1
XENVER_compile_info: Final = 2
XENVER_capabilities: Final = 3
XENVER_changeset: Final = 4
XENVER_platform_parameters: Final = 5
XENVER_get_features: Final = 6
XENVER_pagesize: Final = 7
XENVER_guest_handle: Final = 8
XENVER_commandline: Final = 9
XENVER_build_id: Final = 10
XENFEAT_writable_page_tables: Final = 0
XENFEAT_writable_descriptor_tables: Final = 1
XENFEAT_auto_translated_physmap: Final = 2
XENFEAT_supervisor_mode_kernel: Final = 3
XENFEAT_pae_pgdir_above_4gb: Final = 4
XENFEAT_mmu_pt_update_preserve_ad: Final = 5
XENFEAT_gnttab_map_avail_bits: Final = 7
XENFEAT_dom0: Final = 11

# --- vm_assist, console_io, grant tables -----------------------------------------------------------
VMASST_CMD_enable: Final = 0
VMASST_CMD_disable: Final = 1
VMASST_TYPE_4gb_segments: Final = 0
VMASST_TYPE_4gb_segments_notify: Final = 1
VMASST_TYPE_writable_pagetables: Final = 2
VMASST_TYPE_pae_extended_cr3: Final = 3
VMASST_TYPE_architectural_iopl: Final = 4
VMASST_TYPE_runstate_update_flag: Final = 5
VMASST_TYPE_m2p_strict: Final = 32
CONSOLEIO_write: Final = 0
CONSOLEIO_read: Final = 1

GNTTABOP_map_grant_ref: Final = 0
GNTTABOP_unmap_grant_ref: Final = 1
GNTTABOP_setup_table: Final = 2
GNTTABOP_dump_table: Final = 3
GNTTABOP_transfer: Final = 4
GNTTABOP_copy: Final = 5
GNTTABOP_query_size: Final = 6
GNTTABOP_unmap_and_replace: Final = 7
GNTTABOP_set_version: Final = 8
GNTTABOP_get_status_frames: Final = 9
GNTTABOP_get_version: Final = 10
GNTTABOP_swap_grant_ref: Final = 11
GNTTABOP_cache_flush: Final = 12
