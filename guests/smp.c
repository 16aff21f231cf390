/*
 * Several vCPUs: bringing them up with VCPUOP_initialise and VCPUOP_up, interrupts between them, their
 * own vcpu_info, and taking them down (public vcpu.h, arch-x86/xen.h: vcpu_guest_context). vCPU 2 begins
 * with a selector that cannot be loaded: that is what the failsafe callback is for.
 *
 * Needs three vCPUs.
 */
#include "events.h"
#include "paging.h"
#include "timing.h"
#include "traps.h"
#include "vcpus.h"

#define WILD 0x700000000000ul
#define INCREMENTS 20000

static struct vcpu_context context;
static u8 stacks[3][4096] __attribute__((aligned(16)));
static u8 info_page[PAGE_SIZE] PAGE_ALIGNED;
static volatile struct vcpu_info *const info1 = (struct vcpu_info *)(info_page + 1024);

static volatile u64 counter, arrived, seen_rdi, seen_gs, seen_mask, upcalls1, resumed;
static volatile bool stop_counting;
static u32 to_vcpu0, to_vcpu1;

void vcpu1_main(u64 rdi);
void vcpu1_upcall(void), vcpu1_entry(void), vcpu1_event(void), vcpu2_failsafe(void), vcpu2_entry(void);
extern u64 failsafe_raw[11];
__asm__(".text\n"
        "vcpu1_entry: cld\n call vcpu1_main\n ud2\n"
        /* An upcall on vCPU 1: save what C may change, and go back as the frame says. */
        "vcpu1_event: push %rax\n push %rdx\n push %rsi\n push %rdi\n push %r8\n push %r9\n push %r10\n push %rbp\n"
        " mov %rsp, %rbp\n and $-16, %rsp\n cld\n call vcpu1_upcall\n mov %rbp, %rsp\n"
        " pop %rbp\n pop %r10\n pop %r9\n pop %r8\n pop %rdi\n pop %rsi\n pop %rdx\n"
        /* rax, rcx, r11 | rip...  is on the stack; iret wants rax, r11, rcx, flags | rip... */
        " pop %rax\n pop %rcx\n pop %r11\n push $0\n push %rcx\n push %r11\n push %rax\n"
        " mov $23, %eax\n syscall\n"
        "vcpu2_entry: ud2\n"
        "vcpu2_failsafe: mov %rsp, %rsi\n lea failsafe_raw(%rip), %rdi\n mov $11, %ecx\n cld\n rep movsq\n"
        " movb $1, vcpu2_done(%rip)\n"
        /* VCPUOP_down of vCPU 2 */
        "1: mov $2, %edi\n mov $2, %esi\n xor %edx, %edx\n mov $24, %eax\n syscall\n jmp 1b\n"
        ".bss\n.balign 8\nfailsafe_raw: .fill 11, 8\nvcpu2_done: .byte 0\n.text\n");
extern volatile u8 vcpu2_done;

void vcpu1_main(u64 rdi)
{
    seen_rdi = rdi;
    __asm__ volatile("mov %%gs:0, %0" : "=r"(seen_gs));
    seen_mask = info1->upcall_mask;
    arrived = 1;
    info1->upcall_mask = 0;
    for (u64 i = 0; i < INCREMENTS; i++)
        __asm__ volatile("lock incq %0" : "+m"(counter));
    arrived = 2;
    evtchn_send(to_vcpu0);
    while (!stop_counting)
        HYPERCALL(HC_sched_op, SCHEDOP_yield, 0);
    arrived = 3;
    HYPERCALL(HC_vcpu_op, VCPUOP_down, 1, 0);
    resumed = 1; /* after a second VCPUOP_up it goes on here */
    HYPERCALL(HC_vcpu_op, VCPUOP_down, 1, 0);
    resumed = 2;
    for (;;)
        HYPERCALL(HC_sched_op, SCHEDOP_block, 0);
}

void vcpu1_upcall(void)
{
    info1->upcall_pending = 0;
    u64 selector = __atomic_exchange_n(&info1->pending_selector, 0, __ATOMIC_SEQ_CST);
    if (selector & 1 && evtchn_pending(to_vcpu1)) {
        evtchn_clear(to_vcpu1);
        upcalls1++;
    }
}

static void fill(u64 vcpu, u64 entry)
{
    vcpu_context_fill(&context, entry, stacks[vcpu] + sizeof stacks[vcpu]);
    context.regs.rdi = 0x1234567;
    context.event_callback = (u64)vcpu1_event;
    context.failsafe_callback = (u64)vcpu2_failsafe;
}

static void bringing_up(void)
{
    static u64 gs_word = 0x6773;
    struct {
        u64 mfn;
        u32 offset, reserved;
    } where = {va_to_mfn(info_page), 1024, 0};
    print("# before vCPU 1 is initialised\n");
    check_eq("  is_up", vcpu_op(VCPUOP_is_up, 1, NULL), 0);
    check_eq("  up", vcpu_op(VCPUOP_up, 1, NULL), -EINVAL);
    check_eq("  initialise, a wild pointer", vcpu_op(VCPUOP_initialise, 1, (void *)WILD), -EFAULT);
    fill(1, (u64)vcpu1_entry);
    context.ctrlreg[3] = foreign_mfn() << PAGE_SHIFT;
    check_eq("  initialise with a page-table base that is not ours", vcpu_op(VCPUOP_initialise, 1, &context), -EINVAL);
    check_eq("  initialise of a vCPU that does not exist", vcpu_op(VCPUOP_initialise, 3, &context), -ENOENT);
    where.offset = 4096 - 32;
    check_eq("  register_vcpu_info, an offset that does not fit", vcpu_op(VCPUOP_register_vcpu_info, 1, &where), -ENXIO);
    where.offset = 1024, where.mfn = foreign_mfn();
    check_eq("  register_vcpu_info, a frame that is not ours", vcpu_op(VCPUOP_register_vcpu_info, 1, &where), -EINVAL);
    where.mfn = va_to_mfn(info_page);
    check_eq("  register_vcpu_info", vcpu_op(VCPUOP_register_vcpu_info, 1, &where), 0);
    check_eq("  it has been filled in: masked, pending", info1->upcall_mask == 1 && info1->upcall_pending == 1, 1);
    check_eq("  every word selected", (long)info1->pending_selector, -1);
    check_eq("  twice", vcpu_op(VCPUOP_register_vcpu_info, 1, &where), -EINVAL);

    print("# bringing up vCPU 1\n");
    fill(1, (u64)vcpu1_entry);
    context.gs_base_kernel = (u64)&gs_word;
    check_eq("  initialise", vcpu_op(VCPUOP_initialise, 1, &context), 0);
    check_eq("  initialise twice", vcpu_op(VCPUOP_initialise, 1, &context), -EEXIST);
    check_eq("  it is not up yet", vcpu_op(VCPUOP_is_up, 1, NULL), 0);
    to_vcpu0 = (u32)evtchn_bind_ipi(0);
    to_vcpu1 = (u32)evtchn_bind_ipi(1);
    evtchn_unmask(to_vcpu0), evtchn_unmask(to_vcpu1);
    upcall_ports = 0;
    check_eq("  up", vcpu_op(VCPUOP_up, 1, NULL), 0);
    check_eq("  is_up", vcpu_op(VCPUOP_is_up, 1, NULL), 1);
    check_eq("  up again does no harm", vcpu_op(VCPUOP_up, 1, NULL), 0);
    upcalls_enable();
    for (u64 i = 0; i < INCREMENTS; i++)
        __asm__ volatile("lock incq %0" : "+m"(counter));
    check_eq("  it arrives", wait_until(&arrived, 2), 1);
    check_eq("  rdi is the context's", (long)seen_rdi, 0x1234567);
    check_eq("  the GS base too", (long)seen_gs, (long)gs_word);
    check_eq("  its upcalls were masked", (long)seen_mask, 1);
    check_eq("  both counted, with locked instructions: none was lost", (long)counter, 2 * INCREMENTS);
    u64 start = now_ns();
    while (!upcall_ports && now_ns() - start < 20000 * MS)
        HYPERCALL(HC_sched_op, SCHEDOP_yield, 0);
    upcalls_disable();
    check_eq("  its interrupt came to vCPU 0", (long)upcall_ports, 1l << to_vcpu0);
}

static void interrupts(void)
{
    struct {
        u32 port, vcpu;
    } bind;
    print("# interrupts to vCPU 1\n");
    upcalls1 = 0;
    for (u64 i = 1; i <= 10; i++) {
        evtchn_send(to_vcpu1);
        if (!wait_until(&upcalls1, i))
            break;
    }
    check_eq("  ten were sent and ten came", (long)upcalls1, 10);
    check_eq("  and none to vCPU 0", shared_info->vcpu[0].upcall_pending, 0);
    u32 lower = (u32)evtchn_alloc_unbound(DOMID_SELF, DOMID_SELF), upper = (u32)evtchn_bind_interdomain(DOMID_SELF, lower);
    evtchn_close(to_vcpu1);
    to_vcpu1 = lower;
    bind.port = lower, bind.vcpu = 1;
    check_eq("  bind_vcpu of a channel to ourselves", HYPERCALL(HC_event_channel_op, EVTCHNOP_bind_vcpu, &bind), 0);
    evtchn_clear(lower), evtchn_clear(upper);
    evtchn_unmask(lower);
    upcalls1 = 0;
    evtchn_send(upper);
    check_eq("  its event comes to vCPU 1", wait_until(&upcalls1, 1), 1);
    struct runstate state;
    check_eq("  get_runstate_info of vCPU 1", vcpu_op(VCPUOP_get_runstate_info, 1, &state), 0);
    check_eq("  it has run", state.time[0] > 0, 1);
}

static void taking_down(void)
{
    print("# taking vCPU 1 down\n");
    stop_counting = true;
    check_eq("  it gets the word", wait_until(&arrived, 3), 1);
    u64 start = now_ns();
    while (vcpu_op(VCPUOP_is_up, 1, NULL) == 1 && now_ns() - start < 20000 * MS)
        HYPERCALL(HC_sched_op, SCHEDOP_yield, 0);
    check_eq("  it takes itself down", vcpu_op(VCPUOP_is_up, 1, NULL), 0);
    check_eq("  initialise is still refused", vcpu_op(VCPUOP_initialise, 1, &context), -EEXIST);
    check_eq("  up", vcpu_op(VCPUOP_up, 1, NULL), 0);
    check_eq("  it goes on where it was", wait_until(&resumed, 1), 1);
    start = now_ns();
    while (vcpu_op(VCPUOP_is_up, 1, NULL) == 1 && now_ns() - start < 20000 * MS)
        HYPERCALL(HC_sched_op, SCHEDOP_yield, 0);
    check_eq("  and down again", vcpu_op(VCPUOP_is_up, 1, NULL), 0);
    check_eq("  up", vcpu_op(VCPUOP_up, 1, NULL), 0);
    check_eq("  it goes on", wait_until(&resumed, 2), 1);
    check_eq("  down by another vCPU", vcpu_op(VCPUOP_down, 1, NULL), 0);
    check_eq("  it is down", vcpu_op(VCPUOP_is_up, 1, NULL), 0);
}

static void failsafe(void)
{
    print("# the failsafe callback: vCPU 2 begins with a ds that cannot be loaded\n");
    fill(2, (u64)vcpu2_entry);
    context.regs.ds = 0x53;
    context.regs.es = FLAT_RING3_SS;
    context.regs.rcx = 0xc0c0;
    check_eq("  initialise", vcpu_op(VCPUOP_initialise, 2, &context), 0);
    check_eq("  up", vcpu_op(VCPUOP_up, 2, NULL), 0);
    u64 start = now_ns();
    while (!vcpu2_done && now_ns() - start < 20000 * MS)
        HYPERCALL(HC_sched_op, SCHEDOP_yield, 0);
    check_eq("  the callback runs", vcpu2_done, 1);
    check_eq("  the frame has rcx", (long)failsafe_raw[0], 0xc0c0);
    check_eq("  ds as it could not be loaded", (long)failsafe_raw[2] & 0xffff, 0x53);
    check_eq("  es", (long)failsafe_raw[3] & 0xffff, FLAT_RING3_SS);
    check_eq("  rip where it was to begin", (long)failsafe_raw[6], (long)vcpu2_entry);
    check_eq("  cs", (long)failsafe_raw[7] & 0xffff, 0xe030);
    check_eq("  rsp", (long)failsafe_raw[9], (long)context.regs.rsp);
    check_eq("  ss", (long)failsafe_raw[10], FLAT_RING3_SS);
    start = now_ns();
    while (vcpu_op(VCPUOP_is_up, 2, NULL) == 1 && now_ns() - start < 20000 * MS)
        HYPERCALL(HC_sched_op, SCHEDOP_yield, 0);
    check_eq("  it is down", vcpu_op(VCPUOP_is_up, 2, NULL), 0);
}

int main(void)
{
    traps_install();
    events_quiet();
    upcalls_install();
    bringing_up();
    interrupts();
    taking_down();
    failsafe();
    return 0;
}
