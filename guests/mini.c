/*
 * A kernel of the Mini-OS kind: see lib/mini.lds.  It makes hypercalls by the page alone, registers its callbacks in
 * the old way, reads the machine-to-physical table at the ABI's fixed address, and returns from upcalls by IRETQ.
 */
#include "timing.h"

#include "events.h"
#include "traps.h"

#define M2P ((const u64 *)0xffff800000000000ul)
#define TICKS 50
#define XENS_DATA 0xe02b

/*
 * The upcall, with the frame that Xen builds: rcx, r11, rip, cs, rflags, rsp, ss.  cs and ss are shown with RPL 0, which
 * no processor takes at CPL 3.
 */
void upcall_entry(void), upcall(void);
__asm__(".text\nupcall_entry:\n"
        " pop %rcx\n pop %r11\n cld\n"
        " push %rax\n push %rcx\n push %rdx\n push %rbx\n push %rbp\n push %rsi\n push %rdi\n push %r8\n push %r9\n"
        " push %r10\n push %r11\n push %r12\n push %r13\n push %r14\n push %r15\n"
        " mov %rsp, %rbx\n and $~15, %rsp\n call upcall\n mov %rbx, %rsp\n"
        " pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %r11\n pop %r10\n pop %r9\n pop %r8\n pop %rdi\n pop %rsi\n"
        " pop %rbp\n pop %rbx\n pop %rdx\n pop %rcx\n pop %rax\n"
        " orb $3, 8(%rsp)\n orb $3, 32(%rsp)\n"
        /* Upcalls are on: the next may nest.  One that came before is delivered on the way out of a hypercall. */
        " push %rax\n mov shared_info(%rip), %rax\n movb $0, 1(%rax)\n testb $0xff, (%rax)\n jz 1f\n"
        " push %rcx\n push %r11\n push %rdi\n push %rsi\n mov $0, %edi\n mov $0, %esi\n"
        " call hypercall_page + 17 * 32\n pop %rsi\n pop %rdi\n pop %r11\n pop %rcx\n"
        "1: pop %rax\n iretq\n");

static u32 timer;
static volatile u64 ticks, strange;

void upcall(void)
{
    volatile struct vcpu_info *vcpu = &shared_info->vcpu[0];
    vcpu->upcall_pending = 0;
    __atomic_exchange_n(&vcpu->pending_selector, 0, __ATOMIC_SEQ_CST);
    if (!evtchn_pending(timer)) {
        strange++;
        return;
    }
    evtchn_clear(timer);
    if (++ticks < TICKS)
        HYPERCALL(HC_set_timer_op, now_ns() + MS / 4);
}

int main(void)
{
    u64 cs = 0, ss = 0, wrong = 0;
    traps_install();
    events_quiet();
    for (u64 pfn = 0; pfn < start_info->nr_pages; pfn++)
        wrong += M2P[pfn_to_mfn(pfn)] != pfn;
    check_eq("the machine-to-physical table has every frame of ours", (long)wrong, 0);
    check_eq("set_callbacks", HYPERCALL(HC_set_callbacks, upcall_entry, 0, 0), 0);
    timer = (u32)evtchn_bind_virq(VIRQ_TIMER, 0);
    check_eq("VIRQ_TIMER", timer > 0, 1);
    check_eq("unmask", evtchn_unmask_op(timer), 0);
    check_eq("set_timer_op", HYPERCALL(HC_set_timer_op, now_ns() + MS / 4), 0);
    shared_info->vcpu[0].upcall_mask = 0;
    /* Registers and flags that an upcall which comes anywhere must bring back. */
    u64 loops = 0, changed = 0;
    while (ticks < TICKS) {
        u64 a = loops, b = ~loops, flags = 0;
        __asm__ volatile("cmp %3, %3\n mov %0, %%r12\n mov %1, %%r13\n nop\n nop\n nop\n pushf\n pop %2\n cmp %%r12, %0\n"
                         " jne 1f\n cmp %%r13, %1\n je 2f\n1: movq $0, %2\n2:"
                         : "+r"(a), "+r"(b), "=&r"(flags) : "r"(loops) : "r12", "r13", "cc");
        changed += !(flags & 0x40) || a != loops || b != ~loops;
        loops++;
    }
    __asm__ volatile("mov %%cs, %0\n mov %%ss, %1" : "=r"(cs), "=r"(ss));
    upcalls_disable();
    check_eq("upcalls that were returned from by iretq", ticks >= TICKS, 1);
    check_eq("  what they interrupted went on as it was", (long)changed, 0);
    check_eq("  none without an event", (long)strange, 0);
    check_eq("cs", (long)cs, FLAT_RING3_CS64);
    check_eq("ss", (long)ss, XENS_DATA);
    return 0;
}
