/*
 * What a guest can ask about its hypervisor and itself: xen_version, vm_assist, physdev_op as a domU
 * has it, and hypercalls that are domain 0's alone (public version.h, xen.h, physdev.h).
 */
#include "events.h"
#include "paging.h"
#include "traps.h"

#define WILD 0x700000000000ul

static void version(void)
{
    static char text[1024];
    static u64 words[130];
    struct {
        u32 index, bits;
    } feature = {0, 0};
    print("# xen_version\n");
    long version = HYPERCALL(HC_xen_version, 0, 0);
    print("# version %ld.%ld\n", version >> 16, version & 0xffff);
    check_eq("  0 version: at least 4", version >> 16 >= 4, 1);
    check_eq("  1 extraversion", HYPERCALL(HC_xen_version, 1, text), 0);
    print("# extraversion %s\n", text);
    check_eq("  it is a string of at most 15 characters", strlen(text) < 16, 1);
    check_eq("  2 compile_info", HYPERCALL(HC_xen_version, 2, text), 0);
    memset(text, 0, sizeof text);
    check_eq("  3 capabilities", HYPERCALL(HC_xen_version, 3, text), 0);
    print("# capabilities %s\n", text);
    check_eq("  xen-3.0-x86_64 is one", memcmp(text, "xen-3.0-x86_64", 14), 0);
    check_eq("  4 changeset", HYPERCALL(HC_xen_version, 4, text), 0);
    check_eq("  5 platform_parameters", HYPERCALL(HC_xen_version, 5, words), 0);
    check_eq("  where Xen's memory begins", (long)words[0], (long)0xffff800000000000);
    check_eq("  6 get_features, page 0", HYPERCALL(HC_xen_version, 6, &feature), 0);
    print("# features %x\n", feature.bits);
    check_eq("  mmu_pt_update_preserve_ad", feature.bits >> 5 & 1, 1);
    check_eq("  not auto-translated", feature.bits >> 2 & 1, 0);
    check_eq("  not writable_page_tables", feature.bits & 1, 0);
    feature.index = 1;
    check_eq("  6 get_features, page 1", HYPERCALL(HC_xen_version, 6, &feature), -EINVAL);
    check_eq("  7 pagesize", HYPERCALL(HC_xen_version, 7, 0), 4096);
    check_eq("  8 guest_handle", HYPERCALL(HC_xen_version, 8, text), 0);
    check_eq("  9 commandline", HYPERCALL(HC_xen_version, 9, text), 0);
    check_eq("  is not for a domU to know", memcmp(text, "<denied>", 9), 0);
    check_eq("  10 build_id neither", HYPERCALL(HC_xen_version, 10, 0), -EPERM);
    check_eq("  11, which does not exist", HYPERCALL(HC_xen_version, 11, text), -ENOSYS);
    check_eq("  a great number", HYPERCALL(HC_xen_version, 0x7fffffff, text), -ENOSYS);
    check_eq("  1 with a wild pointer", HYPERCALL(HC_xen_version, 1, WILD), -EFAULT);
    check_eq("  6 with a wild pointer", HYPERCALL(HC_xen_version, 6, WILD), -EFAULT);
    check_eq("  3 with a pointer to Xen's memory", HYPERCALL(HC_xen_version, 3, 0xffff830000000000), -EFAULT);
}

static void assists(void)
{
    print("# vm_assist\n");
    check_eq("  writable_pagetables", HYPERCALL(HC_vm_assist, 0, 2), 0);
    check_eq("  off again", HYPERCALL(HC_vm_assist, 1, 2), 0);
    check_eq("  pae_extended_cr3", HYPERCALL(HC_vm_assist, 0, 3), 0);
    check_eq("  an unknown type", HYPERCALL(HC_vm_assist, 0, 40), -EINVAL);
    check_eq("  a type beyond 64", HYPERCALL(HC_vm_assist, 0, 64), -EINVAL);
    check_eq("  an unknown command", HYPERCALL(HC_vm_assist, 2, 2), -ENOSYS);
}

static void physical_devices(void)
{
    u64 arg[4] = {0, 0, 0, 0};
    print("# physdev_op\n");
    check_eq("  set_iopl 1", (*(u32 *)arg = 1, HYPERCALL(HC_physdev_op, 6, arg)), 0);
    check_eq("  set_iopl 0", (*(u32 *)arg = 0, HYPERCALL(HC_physdev_op, 6, arg)), 0);
    check_eq("  set_iobitmap, none", HYPERCALL(HC_physdev_op, 7, arg), 0);
    check_eq("  apic_read", HYPERCALL(HC_physdev_op, 8, arg), -EPERM);
    check_eq("  apic_write", HYPERCALL(HC_physdev_op, 9, arg), -EPERM);
    check_eq("  map_pirq", HYPERCALL(HC_physdev_op, 13, arg), -EPERM);
    check_eq("  unmap_pirq", HYPERCALL(HC_physdev_op, 14, arg), -EPERM);
    check_eq("  manage_pci_add", HYPERCALL(HC_physdev_op, 15, arg), -EPERM);
    check_eq("  an unknown operation", HYPERCALL(HC_physdev_op, 99, arg), -ENOSYS);
    check_eq("  set_iopl with a wild pointer", HYPERCALL(HC_physdev_op, 6, WILD), -EFAULT);
}

static void not_for_us(void)
{
    static const struct {
        const char *name;
        long number;
    } domain_0s[] = {
        {"  platform_op", HC_platform_op}, {"  xsm_op", HC_xsm_op}, {"  xenoprof_op", HC_xenoprof_op}, {"  hvm_op", HC_hvm_op},
        {"  sysctl", HC_sysctl}, {"  domctl", HC_domctl}, {"  kexec_op", HC_kexec_op}, {"  tmem_op", HC_tmem_op},
        {"  argo_op", HC_argo_op}, {"  xenpmu_op", HC_xenpmu_op}, {"  dm_op", HC_dm_op}, {"  hypfs_op", HC_hypfs_op},
    };
    static u64 zeros[64];
    print("# hypercalls that are not for a domU, or do not exist\n");
    for (u64 i = 0; i < LENGTH(domain_0s); i++)
        check_eq(domain_0s[i].name, HYPERCALL(domain_0s[i].number, zeros, 0, 0) < 0, 1);
    check_eq("  11, once the old memory operation", HYPERCALL(11, zeros), -ENOSYS);
    for (long number = 50; number < 64; number++)
        check_eq("  a number above all", HYPERCALL(number, zeros), -ENOSYS);
    /* Numbers beyond the table: not through the hypercall page, which has 128 stubs. */
    check_eq("  64", HYPERCALL(64, zeros), -ENOSYS);
    check_eq("  a great number", HYPERCALL(0x7fffffff, zeros), -ENOSYS);
    check_eq("  a negative one", HYPERCALL(-1, zeros), -ENOSYS);
}

int main(void)
{
    traps_install();
    version();
    assists();
    physical_devices();
    not_for_us();
    return 0;
}
