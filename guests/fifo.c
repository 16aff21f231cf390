/*
 * Event channels, the FIFO ABI: event words, queues by priority, the control block, what becomes of pending events when
 * the ABI changes; and a guest that writes nonsense into all of it (public event_channel.h), with `others=N` on so many
 * vCPUs more at once.
 */
#include "events.h"

#include "paging.h"
#include "traps.h"
#include "vcpus.h"

#define EVTCHNOP_init_control 11
#define EVTCHNOP_expand_array 12
#define EVTCHNOP_set_priority 13

#define PENDING 0x80000000u
#define MASKED 0x40000000u
#define LINKED 0x20000000u
#define BUSY 0x10000000u
#define LINK_MASK 0x1ffffu
#define QUEUES 16
#define DEFAULT_PRIORITY 7

static volatile u32 words[1024] PAGE_ALIGNED;
static volatile u32 more_words[1024] PAGE_ALIGNED;
static volatile struct {
    u32 ready, reserved, head[QUEUES];
} control PAGE_ALIGNED;
static u32 random_state;

static long init_control(u64 mfn, u32 offset, u32 vcpu, u8 *link_bits)
{
    struct {
        u64 mfn;
        u32 offset, vcpu;
        u8 link_bits, pad[7];
    } op = {mfn, offset, vcpu, 0, {0}};
    long status = HYPERCALL(HC_event_channel_op, EVTCHNOP_init_control, &op);
    *link_bits = op.link_bits;
    return status;
}

static long expand_array(u64 mfn)
{
    return HYPERCALL(HC_event_channel_op, EVTCHNOP_expand_array, &mfn);
}

static long set_priority(u32 port, u32 priority)
{
    u32 op[2] = {port, priority};
    return HYPERCALL(HC_event_channel_op, EVTCHNOP_set_priority, op);
}

/* Take the first port from a queue, as the ABI asks guests to: 0 where it is empty. */
static u32 take(u32 queue)
{
    u32 port = control.head[queue];
    if (!(control.ready >> queue & 1))
        return 0;
    if (!port) {
        __atomic_fetch_and(&control.ready, ~(1u << queue), __ATOMIC_SEQ_CST);
        return 0;
    }
    u32 link = __atomic_fetch_and(&words[port], ~(LINKED | LINK_MASK), __ATOMIC_SEQ_CST) & LINK_MASK;
    control.head[queue] = link;
    if (!link) {
        __atomic_fetch_and(&control.ready, ~(1u << queue), __ATOMIC_SEQ_CST);
        control.head[queue] = 0;
    }
    __atomic_fetch_and(&words[port], ~PENDING, __ATOMIC_SEQ_CST);
    return port;
}

static bool flag(u32 port, u32 bit)
{
    return words[port] & bit;
}

static void unmask(u32 port)
{
    __atomic_fetch_and(&words[port], ~MASKED, __ATOMIC_SEQ_CST);
}

static void changing_over(u32 early, u32 quiet)
{
    u8 link_bits;
    u64 mfn = va_to_mfn((void *)&control);
    print("# the ABI changes\n");
    check_eq("  set_priority before", set_priority(early, 3), -ENOSYS);
    check_eq("  expand_array before", expand_array(va_to_mfn((void *)words)), -EOPNOTSUPP);
    check_eq("  init_control at a vCPU that does not exist", init_control(mfn, 0, 31, &link_bits), -ENOENT);
    check_eq("  at an odd offset", init_control(mfn, 4, 0, &link_bits), -EINVAL);
    check_eq("  over the end of the page", init_control(mfn, 4096 - 64, 0, &link_bits), -EINVAL);
    check_eq("  in a frame that does not exist", init_control(0x7fffffff, 0, 0, &link_bits), -EINVAL);
    check_eq("  in a page table", init_control(va_to_mfn((void *)start_info->pt_base), 0, 0, &link_bits), -EINVAL);
    check_eq("  which leaves link_bits alone", link_bits, 0);
    evtchn_send(early);
    check_eq("  an event is pending in the old place", evtchn_pending(early), 1);
    check_eq("  init_control", init_control(mfn, 0, 0, &link_bits), 0);
    check_eq("  says how long links are", link_bits, 17);
    check_eq("  a second time", init_control(mfn, 128, 0, &link_bits), -EINVAL);
    check_eq("  nothing is ready", control.ready, 0);
    check_eq("  send to a port without a word", evtchn_send(quiet), 0);
    check_eq("  unmask of one", evtchn_unmask_op(quiet), 0);
    check_eq("  expand_array by a frame that does not exist", expand_array(0x7fffffff), -EINVAL);
    check_eq("  expand_array", expand_array(va_to_mfn((void *)words)), 0);
    check_eq("  what was pending before is", flag(early, PENDING), 1);
    check_eq("  and what came in between", flag(quiet, PENDING), 1);
    check_eq("  both are in the queue of the usual priority", control.ready, 1u << DEFAULT_PRIORITY);
    check_eq("  the upcall is due", shared_info->vcpu[0].upcall_pending, 1);
    check_eq("  the selector is not used", (long)shared_info->vcpu[0].pending_selector, 0);
    check_eq("  the page cannot become a page table", mmuext(MMUEXT_PIN_L1_TABLE, va_to_mfn((void *)words), 0), -EINVAL);
    u32 first = take(DEFAULT_PRIORITY), second = take(DEFAULT_PRIORITY);
    check_eq("  they are taken one after the other", first == early && second == quiet, 1);
    check_eq("  and no more", take(DEFAULT_PRIORITY), 0);
    check_eq("  expand_array again", expand_array(va_to_mfn((void *)more_words)), 0);
}

static void queues(u32 a, u32 b, u32 c)
{
    print("# queues\n");
    shared_info->vcpu[0].upcall_pending = 0;
    evtchn_send(a);
    check_eq("  the queue was empty: its head is the port", control.head[DEFAULT_PRIORITY], a);
    check_eq("  and the upcall is due", shared_info->vcpu[0].upcall_pending, 1);
    shared_info->vcpu[0].upcall_pending = 0;
    evtchn_send(b);
    evtchn_send(c);
    evtchn_send(a);
    check_eq("  more to come does not ask again", shared_info->vcpu[0].upcall_pending, 0);
    check_eq("  each links to the next", (words[a] & LINK_MASK) == b && (words[b] & LINK_MASK) == c, 1);
    check_eq("  in order", take(7) == a && take(7) == b && take(7) == c, 1);
    check_eq("  each once", take(7), 0);

    print("# masks\n");
    words[a] = MASKED;
    evtchn_send(a);
    check_eq("  a masked port is pending", flag(a, PENDING), 1);
    check_eq("  in no queue", flag(a, LINKED) || control.ready, 0);
    check_eq("  unmask by hypercall", evtchn_unmask_op(a), 0);
    check_eq("  clears the mask", flag(a, MASKED), 0);
    check_eq("  and puts it in its queue", take(7), a);
    check_eq("  unmask of what is not pending", evtchn_unmask_op(a), 0);
    check_eq("  does nothing", control.ready, 0);

    print("# priorities\n");
    check_eq("  set_priority beyond all", set_priority(a, 16), -EINVAL);
    check_eq("  of a port beyond all", set_priority(100000, 1), -EINVAL);
    check_eq("  of a closed port", set_priority(1000, 1), -EINVAL);
    evtchn_send(a);
    check_eq("  set_priority", set_priority(a, 2), 0);
    check_eq("  what is in a queue stays there", control.ready, 1u << 7);
    check_eq("  until it is taken", take(7), a);
    evtchn_send(b);
    evtchn_send(a);
    check_eq("  then it goes to the other", control.ready, 1u << 7 | 1u << 2);
    check_eq("  both are served", take(2) == a && take(7) == b, 1);
    evtchn_send(a);
    take(2);
    set_priority(a, 7);
    evtchn_send(a);
    evtchn_send(b);
    set_priority(b, 2);
    check_eq("  a tail that moves takes nobody along", take(7) == a && take(7) == b && !take(7), 1);
    evtchn_send(b);
    evtchn_send(c);
    check_eq("  and is found in its new queue", take(2) == b && take(7) == c, 1);
    set_priority(b, 7);

    print("# a port that is closed in a queue\n");
    evtchn_send(b);
    evtchn_close(b);
    check_eq("  is not pending any more", flag(b, PENDING), 0);
    check_eq("  but still in the queue", flag(b, LINKED), 1);
    u32 d = (u32)evtchn_bind_ipi(0);
    check_eq("  so the number is not given again", d != b, 1);
    check_eq("  until it is taken", take(7), b);
    check_eq("  then it is", evtchn_bind_ipi(0), b);
    evtchn_close(d);
}

static void upcall(u32 port)
{
    print("# upcalls and polling\n");
    u32 ports[1] = {port};
    struct {
        u32 *ports;
        u32 nr_ports;
        u64 timeout;
    } poll = {ports, 1, 0};
    shared_info->vcpu[0].upcall_pending = 0;
    evtchn_send(port);
    check_eq("  a pending port ends the wait", HYPERCALL(HC_sched_op, SCHEDOP_poll, &poll), 0);
    check_eq("  take it", take(7), port);
    upcalls_install();
    shared_info->vcpu[0].upcall_pending = 0;
    upcall_count = 0;
    upcalls_enable();
    evtchn_send(port);
    check_eq("  one upcall", (long)upcall_count, 1);
    check_eq("  the port is in its queue", take(7), port);
    long timer = evtchn_bind_virq(VIRQ_TIMER, 0);
    unmask((u32)timer);
    HYPERCALL(HC_set_timer_op, 1);
    for (u32 i = 0; i < 5000000 && upcall_count == 1; i++)
        HYPERCALL(HC_sched_op, SCHEDOP_yield, 0);
    check_eq("  the timer's event", (long)upcall_count, 2);
    check_eq("  is in its queue", take(7), timer);
    upcalls_disable();
    evtchn_close((u32)timer);
}

static u32 random_word(void)
{
    random_state = random_state * 1664525 + 1013904223;
    return random_state >> 3 ^ random_state << 13;
}

static u32 event_ports[3];
static volatile u64 enough, ended;
static struct vcpu_context context;
static u8 stacks[3][4096] __attribute__((aligned(16)));

/* What the other vCPUs do: words change while ring 0 links ports behind them. */
void storm(u64 vcpu);
__asm__(".text\nstorm_entry: cld\n call storm\n ud2\n");
extern u8 storm_entry[];

void storm(u64 vcpu)
{
    u64 state = vcpu * 0x9e3779b97f4a7c15ul;
    while (!enough) {
        state = state * 6364136223846793005ul + 1442695040888963407ul;
        u32 port = event_ports[(state >> 33) % 3], word = (u32)(state >> 32);
        switch (state >> 61) {
        case 0: words[port] = word; break;
        case 1: __atomic_fetch_xor(&words[port], LINKED, __ATOMIC_SEQ_CST); break;
        case 2: __atomic_fetch_xor(&words[port], MASKED, __ATOMIC_SEQ_CST); break;
        case 3: __atomic_fetch_xor(&words[port], BUSY, __ATOMIC_SEQ_CST); break;
        case 4: control.ready = word; break;
        case 5: evtchn_unmask_op(port); break;
        case 6: evtchn_send(port); break;
        default: set_priority(port, word % QUEUES); break;
        }
    }
    __atomic_fetch_add(&ended, 1, __ATOMIC_SEQ_CST);
    vcpu_op(VCPUOP_down, (long)vcpu, NULL);
}

static void start_others(u64 others)
{
    for (u64 vcpu = 1; vcpu <= others; vcpu++) {
        vcpu_context_fill(&context, (u64)storm_entry, stacks[vcpu - 1] + sizeof *stacks);
        context.regs.rdi = vcpu;
        check_eq("  initialise a vCPU", vcpu_op(VCPUOP_initialise, (long)vcpu, &context), 0);
        check_eq("  up", vcpu_op(VCPUOP_up, (long)vcpu, NULL), 0);
    }
}

/* Words, heads and flags that no sane guest writes, while events are raised: only our own events may suffer. */
static void nonsense(u32 a, u32 b, u32 c, u64 rounds)
{
    u32 ports[3] = {a, b, c};
    u64 others = option_value("others", 0);
    long refused = 0;
    print("# nonsense\n");
    memcpy(event_ports, ports, sizeof ports);
    start_others(others);
    for (u64 round = 0; round < rounds; round++) {
        u32 port = ports[random_word() % 3], word = random_word();
        switch (random_word() % 6) {
        case 0:
            words[port] = word;
            break;
        case 1:
            words[port] = LINKED | BUSY | port; /* a queue that bites its tail */
            break;
        case 2:
            words[random_word() % 1024] = word;
            break;
        case 3:
            control.head[word % QUEUES] = random_word();
            control.ready = random_word();
            break;
        case 4:
            refused |= set_priority(port, word % QUEUES);
            break;
        case 5:
            refused |= evtchn_unmask_op(port);
        }
        refused |= evtchn_send(port);
    }
    enough = 1;
    if (others)
        check(wait_until(&ended, others), "  the other vCPUs come to an end");
    check_eq("  every call was answered", refused, 0);
    for (u32 i = 0; i < 1024; i++)
        words[i] = i == a || i == b || i == c ? 0 : MASKED;
    for (u32 i = 0; i < QUEUES; i++)
        control.head[i] = 0;
    control.ready = 0;
    for (u32 i = 0; i < 3; i++)
        set_priority(ports[i], 7);
    for (u32 i = 0; i < 3; i++)
        evtchn_send(ports[i]);
    check_eq("  cleared, it works as before", take(7) == a && take(7) == b && take(7) == c && !take(7), 1);
}

/* The other end of an interdomain port. */
static u32 other_end(u32 port)
{
    struct {
        u16 dom;
        u32 port, status, vcpu;
        u16 remote_dom;
        u32 remote_port;
    } op = {.dom = DOMID_SELF, .port = port};
    return HYPERCALL(HC_event_channel_op, EVTCHNOP_status, &op) ? 0 : op.remote_port;
}

static void changing_back(u32 ipi)
{
    u16 self = DOMID_SELF;
    u8 link_bits;
    print("# reset\n");
    evtchn_send(ipi);
    check_eq("  with FIFO, nothing is set in the old place", !evtchn_pending(ipi) && take(7) == ipi, 1);
    console_drain();
    u32 console = other_end(start_info->console_evtchn);
    long status = HYPERCALL(HC_event_channel_op, EVTCHNOP_reset, &self);
    start_info->console_evtchn = (u32)evtchn_bind_interdomain(0, console);
    events_quiet();
    check_eq("  reset", status, 0);
    ipi = (u32)evtchn_bind_ipi(0);
    evtchn_send(ipi);
    check_eq("  the old ABI is back", evtchn_pending(ipi), 1);
    set_read_only((void *)words);
    check_eq("  its frames are free of it", mmuext(MMUEXT_PIN_L1_TABLE, va_to_mfn((void *)words), 0), 0);
    mmuext(MMUEXT_UNPIN_TABLE, va_to_mfn((void *)words), 0);
    check_eq("  and it can be chosen again", init_control(va_to_mfn((void *)&control), 64, 0, &link_bits), 0);
    check_eq("  with an empty array", expand_array(va_to_mfn((void *)more_words)), 0);
}

int main(void)
{
    traps_install();
    events_quiet();
    random_state = (u32)option_value("seed", 1);
    u32 a = (u32)evtchn_bind_ipi(0), b = (u32)evtchn_bind_ipi(0), c = (u32)evtchn_bind_ipi(0);
    for (u32 i = 0; i < 1024; i++)
        words[i] = MASKED;
    unmask(a), unmask(b), unmask(c);
    memset((void *)more_words, 0, PAGE_SIZE);
    changing_over(a, b);
    queues(a, b, c);
    upcall(c);
    nonsense(a, b, c, option_value("rounds", 3000));
    changing_back(b);
    return 0;
}
