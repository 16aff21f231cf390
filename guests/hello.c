/*
 * The smallest guest: it maps its shared-info page, prints on the console ring, tries console_io, and
 * powers off. It registers no trap table and needs no event; what it needs of the domain builder is
 * start_info, the p2m and the console ring.
 *
 * On a release build of Xen a domU's console_io is refused with -EPERM (as observed on Xen 4.17), and here it
 * is allowed; the word "console_io" on the command line says that it must be.
 */
#include "guest.h"

static const char greeting[] = "hello through console_io\n";

int main(void)
{
    print("hello from a PV guest\n");
    check(memcmp(start_info->magic, "xen-3.0-x86_64", 14) == 0, "start_info carries the magic xen-3.0-x86_64");
    check(start_info->nr_pages > 0, "start_info says how many pages the domain has");
    check_eq("start_info has no flags for a plain domU", start_info->flags, 0);
    check_eq("the shared-info page has vCPU 0's upcall mask set", shared_info->vcpu[0].upcall_mask, 1);
    check_eq("the builder's stack pointer is inside the initial mapping", builder_stack >= (u64)image_end, 1);

    /* 0, not the count of bytes, means written. */
    long status = HYPERCALL(HC_console_io, CONSOLEIO_write, sizeof greeting - 1, greeting);
    check(status == 0 || (status == -EPERM && !option("console_io")), "console_io writes, or is not permitted");

    check_eq("an unknown hypercall", HYPERCALL(63), -ENOSYS);
    print("command line: %s\n", start_info->cmd_line);
    return 0;
}
