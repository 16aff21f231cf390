/*
 * A guest that floods dom0: random packets for xenstored (`packets=N seed=S`), well-formed in their length alone, answers
 * thrown away; between them events without a reason, bursts on the console, and with `last` a ring whose indices lie.
 * xenstored must still know the guest afterwards.
 */
#include "events.h"
#include "random.h"
#include "xenstore.h"

static volatile struct xenstore_ring *ring;

static void throw_away(void)
{
    ring->rsp_cons = ring->rsp_prod;
}

static void wait_for_store(void)
{
    throw_away();
    xenstore_wait();
}

static void put(const char *bytes, u64 length)
{
    for (u64 i = 0; i < length; i++) {
        while (ring->req_prod - ring->req_cons == sizeof ring->req)
            wait_for_store();
        ring->req[ring->req_prod % sizeof ring->req] = bytes[i];
        barrier();
        ring->req_prod = ring->req_prod + 1;
    }
}

/* A path, a number, permissions, a token: pieces with and without the NUL that ends them. */
static u64 random_text(char *to, u64 size)
{
    static const char *const words[] = {
        "data", "device", "vbd", "51712", "/", "//", "", "local/domain/0", "/local/domain/1/data", "@releaseDomain", "@introduceDomain",
        "control/shutdown", "..", "a/b/c", "/tool", "memory/target", "n0", "r1", "b2", "w999", "0", "1", "4294967295", "token", "state",
        "/vm", "-1", "error", "console/ring-ref", "feature", "\xff\xfe", "x y", "~",
    };
    u64 length = 0;
    for (u64 pieces = below(5); pieces; pieces--) {
        const char *word = words[below(LENGTH(words))];
        u64 n = strlen(word);
        if (length + n + 2 > size)
            break;
        memcpy(to + length, word, n);
        length += n;
        to[length++] = below(3) ? 0 : below(2) ? '/' : (char)next();
    }
    return length;
}

static void packet(void)
{
    static char body[4096];
    struct xenstore_message head = {below(16) ? (u32)below(22) : (u32)next(), (u32)next(), below(2) ? 0 : (u32)below(6), 0};
    u64 length = random_text(body, 256);
    if (!below(64)) {
        length = below(sizeof body + 1);
        for (u64 i = 0; i < length; i++)
            body[i] = (char)next();
    }
    head.length = (u32)length;
    put((const char *)&head, sizeof head);
    put(body, length);
}

int main(void)
{
    u64 packets = option_value("packets", 1000);
    random_seed(option_value("seed", 1));
    events_quiet();
    ring = xenstore_ring();
    for (u64 done = 0; done < packets; done++) {
        u64 kind = below(16);
        if (kind < 12)
            packet();
        else if (kind < 15)
            for (u64 i = below(8); i; i--)
                evtchn_send(below(4) ? below(2) ? start_info->store_evtchn : start_info->console_evtchn : (u32)below(64));
        else if (!below(8))
            for (u64 i = below(40); i; i--)
                print("# %lx\n", next());
    }
    while (ring->req_cons != ring->req_prod)
        wait_for_store();
    for (u32 i = 0; i < 1000; i++) { /* what is left of the answers, whatever it is */
        throw_away();
        HYPERCALL(HC_sched_op, SCHEDOP_yield, 0);
    }
    print("\n");
    check_eq("xenstored takes all that comes", ring->req_cons == ring->req_prod, 1);
    report();
    console_drain();
    if (option("last")) {
        volatile u32 *indices = &ring->req_cons;
        for (u64 i = 0; i < 6; i++)
            indices[below(4)] = (u32)next();
        evtchn_send(start_info->store_evtchn);
        HYPERCALL(HC_sched_op, SCHEDOP_yield, 0);
    }
    shut_down(SHUTDOWN_poweroff);
}
