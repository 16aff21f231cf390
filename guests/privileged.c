/*
 * Privileged instructions in guest-kernel mode. The guest runs in ring 3, so each of them faults, and
 * Xen either emulates it or hands the fault on as #GP (Intel SDM volume 3, section 5.9).
 *
 * The forced-emulation prefix, ud2 and the letters "xen", asks Xen for the CPUID that it shows guests.
 */
#include "events.h"
#include "paging.h"
#include "traps.h"

#define MSR_TSC 0x10
#define MSR_APIC_BASE 0x1b
#define MSR_SYSENTER_CS 0x174
#define MSR_MISC_ENABLE 0x1a0
#define MSR_DEBUGCTL 0x1d9
#define MSR_PAT 0x277
#define MSR_EFER 0xc0000080
#define MSR_STAR 0xc0000081
#define MSR_LSTAR 0xc0000082
#define MSR_FS_BASE 0xc0000100

#define RUNS(what, text)                          \
    do {                                          \
        TRY(text, : : : "rax", "rdx", "memory", "cc"); \
        check_eq(what, (long)fault.vector, NO_FAULT);  \
    } while (0)
#define FAULTS(what, text)                        \
    do {                                          \
        TRY(text, : : : "rax", "rdx", "memory", "cc"); \
        check_eq(what, (long)fault.vector, VECTOR_GP); \
        check_eq("    error code", (long)fault.error, 0); \
    } while (0)

static bool rdmsr(u32 msr, u64 *value)
{
    u32 low = 0, high = 0;
    TRY("rdmsr", : "+a"(low), "+d"(high) : "c"(msr) : "memory");
    *value = (u64)high << 32 | low;
    return fault.vector == NO_FAULT;
}

static bool wrmsr(u32 msr, u64 value)
{
    TRY("wrmsr", : : "a"((u32)value), "d"((u32)(value >> 32)), "c"(msr) : "memory");
    return fault.vector == NO_FAULT;
}

static long set_iopl(u32 iopl)
{
    return HYPERCALL(HC_physdev_op, 6, &iopl);
}

static void interrupt_flag(void)
{
    volatile struct vcpu_info *vcpu = &shared_info->vcpu[0];
    print("# the interrupt flag is not the guest's: it has the upcall mask\n");
    FAULTS("  cli at IOPL 0", "cli");
    FAULTS("  sti at IOPL 0", "sti");
    check_eq("physdev_op set_iopl 1", set_iopl(1), 0);
    RUNS("  sti", "sti");
    check_eq("  it does not touch the upcall mask", vcpu->upcall_mask, 1);
    RUNS("  cli", "cli");
    check_eq("  nor does it", vcpu->upcall_mask, 1);
    check_eq("  rflags show IF, always", (long)(read_flags() & 0x200), 0x200);
    check_eq("  and IOPL 0", (long)(read_flags() & 0x3000), 0);
    RUNS("  popf without IF", "push $2\n popf");
    check_eq("  rflags show IF", (long)(read_flags() & 0x200), 0x200);
    check_eq("physdev_op set_iopl 0", set_iopl(0), 0);
}

static void control_registers(void)
{
    u64 value;
    print("# control registers\n");
    TRY("mov %%cr0, %0", : "=r"(value) : : "memory");
    check_eq("  mov from cr0", (long)fault.vector, NO_FAULT);
    check_eq("  PE and PG", (long)(value & 0x80000001), 0x80000001);
    check_eq("  WP", (long)(value & 0x10000), 0x10000);
    TRY("mov %0, %%cr0", : : "r"(value) : "memory");
    check_eq("  mov to cr0 of the same value", (long)fault.vector, NO_FAULT);
    TRY("mov %0, %%cr0", : : "r"(value | 8) : "memory");
    check_eq("  mov to cr0 with TS", (long)fault.vector, NO_FAULT);
    TRY("fninit", : : : "memory");
    check_eq("  TS is in force: #NM", (long)fault.vector, VECTOR_NM);
    TRY("mov %0, %%cr0\n clts\n fninit", : : "r"(value | 8) : "memory");
    check_eq("  clts clears it", (long)fault.vector, NO_FAULT);
    TRY("mov %0, %%cr0", : : "r"(value & ~0x10000ul) : "memory");
    check_eq("  mov to cr0 without WP", (long)fault.vector, VECTOR_GP);
    TRY("mov %0, %%cr2", : : "r"(0x1234ul) : "memory");
    check_eq("  mov to cr2", (long)fault.vector, NO_FAULT);
    check_eq("  it is in vcpu_info", (long)shared_info->vcpu[0].cr2, 0x1234);
    TRY("mov %%cr2, %0", : "=r"(value) : : "memory");
    check_eq("  mov from cr2", (long)value, 0x1234);
    TRY("mov %%cr3, %0", : "=r"(value) : : "memory");
    check_eq("  mov from cr3", (long)value, (long)(va_to_mfn((void *)start_info->pt_base) << PAGE_SHIFT));
    TRY("mov %0, %%cr3", : : "r"(value) : "memory");
    check_eq("  mov to cr3 of the same value", (long)fault.vector, NO_FAULT);
    TRY("mov %%cr4, %0", : "=r"(value) : : "memory");
    check_eq("  mov from cr4", (long)fault.vector, NO_FAULT);
    check_eq("  PAE, OSFXSR and OSXMMEXCPT", (long)(value & 0x620), 0x620);
    check_eq("  no PCID, SMEP, SMAP, LA57 nor VMXE", (long)(value & 0x323000), 0);
    TRY("mov %0, %%cr4", : : "r"(value) : "memory");
    check_eq("  mov to cr4 of the same value", (long)fault.vector, NO_FAULT);
    TRY("mov %%cr8, %0", : "=r"(value) : : "memory");
    check_eq("  mov from cr8", (long)fault.vector, VECTOR_GP);
    TRY("smsw %0", : "=r"(value) : : "memory");
    check_eq("  smsw shows PE", (long)(value & 1), 1);
    FAULTS("  lmsw", "xor %%eax, %%eax\n lmsw %%ax");
    RUNS("  wbinvd", "wbinvd");
    FAULTS("  invd", "invd");
    FAULTS("  invlpg, for which there is a hypercall", "invlpg (%%rsp)");
    FAULTS("  swapgs", "swapgs");
    FAULTS("  lidt", "lidt (%%rsp)");
    FAULTS("  lldt", "xor %%eax, %%eax\n lldt %%ax");
    FAULTS("  sysret", "sysretq");
}

static void debug_registers(void)
{
    u64 value;
    print("# debug registers\n");
    TRY("mov %%dr7, %0", : "=r"(value) : : "memory");
    check_eq("  dr7 at first", (long)value, 0x400);
    TRY("mov %%dr6, %0", : "=r"(value) : : "memory");
    check_eq("  dr6 at first", (long)value, 0xffff0ff0);
    TRY("mov %0, %%dr0", : : "r"(0x123456ul) : "memory");
    check_eq("  mov to dr0", (long)fault.vector, NO_FAULT);
    TRY("mov %%dr0, %0", : "=r"(value) : : "memory");
    check_eq("  mov from dr0", (long)value, 0x123456);
    TRY("mov %0, %%dr0", : : "r"(0xffff830000000000) : "memory");
    check_eq("  dr0 to Xen's memory", (long)fault.vector, VECTOR_GP);
    TRY("mov %0, %%dr0", : : "r"(1ul << 63) : "memory");
    check_eq("  dr0 to a non-canonical address", (long)fault.vector, VECTOR_GP);
    check_eq("set_debugreg 1", HYPERCALL(HC_set_debugreg, 1, 0x654321), 0);
    check_eq("get_debugreg 1", HYPERCALL(HC_get_debugreg, 1), 0x654321);
    check_eq("set_debugreg 1 to Xen's memory", HYPERCALL(HC_set_debugreg, 1, 0xffff830000000000), -EPERM);
    check_eq("set_debugreg 4, another name of 6", HYPERCALL(HC_set_debugreg, 4, 0xffff0ff0), 0);
    check_eq("get_debugreg 5, another name of 7", HYPERCALL(HC_get_debugreg, 5), 0x400);
    check_eq("set_debugreg 8", HYPERCALL(HC_set_debugreg, 8, 0), -ENODEV);
    check_eq("get_debugreg 8", HYPERCALL(HC_get_debugreg, 8), -ENODEV);
    check_eq("set_debugreg 0 to 0", HYPERCALL(HC_set_debugreg, 0, 0), 0);
    check_eq("set_debugreg 1 to 0", HYPERCALL(HC_set_debugreg, 1, 0), 0);
}

static void ports(void)
{
    u32 value = 0;
    print("# ports: none is the guest's\n");
    FAULTS("  in at IOPL 0", "in $0x61, %%al");
    FAULTS("  out at IOPL 0", "out %%al, $0x61");
    check_eq("physdev_op set_iopl 1", set_iopl(1), 0);
    TRY("in $0x61, %%al", : "+a"(value) : : "memory");
    check_eq("  in of a byte", (long)fault.vector, NO_FAULT);
    check_eq("  all ones", value, 0xff);
    value = 0;
    TRY("in $0x60, %%ax", : "+a"(value) : : "memory");
    check_eq("  in of a word", value, 0xffff);
    TRY("in (%%dx), %%eax", : "+a"(value) : "d"(0xcf8) : "memory");
    check_eq("  in of a doubleword runs", (long)fault.vector, NO_FAULT);
    TRY("out %%al, $0x61", : : "a"(0) : "memory");
    check_eq("  out", (long)fault.vector, NO_FAULT);
    u8 bytes[4] = {1, 2, 3, 4};
    void *to = bytes;
    u64 count = 3;
    TRY("cld\n rep insb", : "+D"(to), "+c"(count) : "d"(0x61) : "memory");
    check_eq("  rep insb", (long)fault.vector, NO_FAULT);
    check_eq("  its count is used up", (long)count, 0);
    check_eq("  it stored three bytes of ones", bytes[0] == 0xff && bytes[2] == 0xff && bytes[3] == 4, 1);
    const void *from = bytes;
    count = 4;
    TRY("cld\n rep outsb", : "+S"(from), "+c"(count) : "d"(0x61) : "memory");
    check_eq("  rep outsb", (long)fault.vector, NO_FAULT);
    check_eq("  it has gone over four bytes", (long)from, (long)(bytes + 4));
}

static void model_specific_registers(void)
{
    u64 value;
    print("# model-specific registers\n");
    check_eq("  rdmsr EFER", rdmsr(MSR_EFER, &value), 1);
    check_eq("  SCE, LME, LMA and NX", (long)(value & 0xd01), 0xd01);
    check_eq("  wrmsr EFER of the same", wrmsr(MSR_EFER, value), 1);
    check_eq("  rdmsr PAT", rdmsr(MSR_PAT, &value), 1);
    check_eq("  Xen's PAT", (long)value, 0x050100070406);
    check_eq("  wrmsr FS_BASE", wrmsr(MSR_FS_BASE, 0x123456789000), 1);
    check_eq("  rdmsr FS_BASE", rdmsr(MSR_FS_BASE, &value) ? (long)value : -1, 0x123456789000);
    check_eq("  wrmsr FS_BASE, non-canonical", wrmsr(MSR_FS_BASE, 1ul << 63), 0);
    check_eq("  wrmsr PAT", wrmsr(MSR_PAT, 0x050100070406), 0);
    check_eq("  rdmsr TSC", rdmsr(MSR_TSC, &value), 1);
    check_eq("  wrmsr TSC", wrmsr(MSR_TSC, 0), 0);
    check_eq("  rdmsr APIC_BASE", rdmsr(MSR_APIC_BASE, &value), 1);
    check_eq("  wrmsr APIC_BASE", wrmsr(MSR_APIC_BASE, value), 0);
    check_eq("  rdmsr MISC_ENABLE", rdmsr(MSR_MISC_ENABLE, &value), 1);
    check_eq("  rdmsr LSTAR", rdmsr(MSR_LSTAR, &value), 0);
    check_eq("  wrmsr LSTAR", wrmsr(MSR_LSTAR, 0x1234), 0);
    check_eq("  wrmsr STAR", wrmsr(MSR_STAR, 0), 0);
    check_eq("  wrmsr SYSENTER_CS", wrmsr(MSR_SYSENTER_CS, 0), 0);
    check_eq("  wrmsr DEBUGCTL", wrmsr(MSR_DEBUGCTL, 0), 0);
}

static void cpuid(u32 leaf, u32 sub, u32 out[4])
{
    __asm__ volatile("ud2; .ascii \"xen\"; cpuid" : "=a"(out[0]), "=b"(out[1]), "=c"(out[2]), "=d"(out[3]) : "a"(leaf), "c"(sub));
}

static void processor_identification(void)
{
    u32 r[4], base = 0x40000000;
    print("# CPUID with the forced-emulation prefix\n");
    cpuid(base, 0, r);
    check_eq("  leaf 0x40000000: the greatest leaf is 0x40000002 or more", r[0] >= base + 2, 1);
    check_eq("  XenVMMXenVMM", memcmp(&r[1], "XenVMMXenVMM", 12), 0);
    u64 version = (u64)HYPERCALL(HC_xen_version, 0, 0);
    cpuid(base + 1, 0, r);
    check_eq("  leaf 0x40000001: the version, as xen_version says", r[0], (long)version);
    cpuid(1, 0, r);
    check_eq("  leaf 1: FPU, TSC, MSR, PAE, CX8, CMOV, FXSR, SSE and SSE2", r[3] & 0x07008171, 0x07008171);
    check_eq("  PSE36, MTRR, PGE, MCA and VME are hidden", r[3] & 0x00023002, 0);
    check_eq("  the HYPERVISOR bit", (long)(r[2] >> 31), 1);
    check_eq("  VMX, x2APIC and PCID are hidden", r[2] & 0x00220020, 0);
    cpuid(7, 0, r);
    check_eq("  leaf 7: SMEP, SMAP and INVPCID are hidden", r[1] & 0x00100480, 0);
    cpuid(0x80000001, 0, r);
    check_eq("  leaf 0x80000001: NX, LM and SYSCALL", r[3] & 0x20100800, 0x20100800);
    check_eq("  SVM and 1 GiB pages are hidden", (r[2] & 4) | (r[3] & 0x04000000), 0);
    cpuid(0x80000008, 0, r);
    check_eq("  leaf 0x80000008: 48 bits of virtual address", r[0] >> 8 & 0xff, 48);
    TRY("ud2\n .ascii \"xeN\"", : : : "memory");
    check_eq("  another prefix is an invalid instruction", (long)fault.vector, VECTOR_UD);
    TRY("ud2\n .ascii \"xen\"\n nop", : : : "memory");
    check_eq("  so is the prefix before another instruction", (long)fault.vector, VECTOR_UD);
}

static void others(void)
{
    u32 low, high;
    u64 a, b;
    print("# others\n");
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    a = (u64)high << 32 | low;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    b = (u64)high << 32 | low;
    check_eq("  rdtsc counts up", b >= a, 1);
    FAULTS("  rdpmc of a bad counter", "mov $0x3fffffff, %%ecx\n rdpmc");
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    check_eq("  xgetbv shows x87 and SSE", low & 3, 3);
    u64 cr4;
    TRY("mov %%cr4, %0", : "=r"(cr4) : : "memory");
    TRY("mov %0, %%cr4", : : "r"(cr4 | 0x40000) : "memory");
    check_eq("  mov to cr4 with OSXSAVE", (long)fault.vector, NO_FAULT);
    TRY("xsetbv", : : "a"(low), "d"(high), "c"(0) : "memory");
    check_eq("  xsetbv of the same", (long)fault.vector, NO_FAULT);
    TRY("xsetbv", : : "a"(0), "d"(0), "c"(0) : "memory");
    check_eq("  xsetbv of 0", (long)fault.vector, VECTOR_GP);
    TRY("xsetbv", : : "a"(low), "d"(high), "c"(1) : "memory");
    check_eq("  xsetbv of another register", (long)fault.vector, VECTOR_GP);
    FAULTS("  hlt, for which there is a hypercall", "hlt");
}

int main(void)
{
    traps_install();
    interrupt_flag();
    control_registers();
    debug_registers();
    model_specific_registers();
    processor_identification();
    ports();
    upcalls_install();
    evtchn_send((u32)evtchn_bind_ipi(0));
    others();
    return 0;
}
