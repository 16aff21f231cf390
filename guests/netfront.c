/*
 * Network front-ends (public io/netif.h): one that keeps to the protocol, asks by ARP who the router is and reads the
 * answer, and beside it some that do not, each on a VIF of its own, which must lose it. `fuzz=N seed=S`: N random slots
 * to VIF 1 instead, for as long as it lives. VIF n has the address 10.213.7.n+1.
 */
#include "blkif.h"
#include "events.h"
#include "timing.h"

#define SLOTS 256
#define PATIENCE 20000 * MS
#define DATA_REF 16
#define BUFFER_REF 17
#define RING_REF(vif) (32 + 2 * (vif))
#define NETTXF_more_data 4
#define NETTXF_extra_info 8

struct netif_ring {
    volatile u32 req_prod, req_event, rsp_prod, rsp_event;
    u8 pad[48];
    union {
        struct {
            u32 gref;
            u16 offset, flags, id, size;
        } tx[SLOTS];
        struct {
            u16 id, status;
            u64 rest;
        } __attribute__((packed)) tx_response[SLOTS];
        struct {
            u16 id, pad;
            u32 gref;
        } rx[SLOTS];
        struct {
            u16 id, offset, flags;
            s16 status;
        } rx_response[SLOTS];
    };
    u8 end[PAGE_SIZE - 64 - SLOTS * 12];
};
_Static_assert(sizeof(struct netif_ring) == PAGE_SIZE, "a frame");

static struct netif_ring tx[8] PAGE_ALIGNED, rx[8] PAGE_ALIGNED;
static u8 data[PAGE_SIZE] PAGE_ALIGNED, buffer[PAGE_SIZE] PAGE_ALIGNED;

static bool connect(struct blkfront *f, u32 vif)
{
    frontend_find(f, "device/vif/", vif);
    if (!blkfront_await(f, INIT_WAIT))
        return false;
    memset(&tx[vif], 0, PAGE_SIZE);
    memset(&rx[vif], 0, PAGE_SIZE);
    tx[vif].req_event = tx[vif].rsp_event = rx[vif].req_event = rx[vif].rsp_event = 1;
    f->port = (u32)evtchn_alloc_unbound(DOMID_SELF, 0);
    grant_to(RING_REF(vif), 0, va_to_mfn(&tx[vif]), 0);
    grant_to(RING_REF(vif) + 1, 0, va_to_mfn(&rx[vif]), 0);
    blkfront_write_number(f, "tx-ring-ref", RING_REF(vif));
    blkfront_write_number(f, "rx-ring-ref", RING_REF(vif) + 1);
    blkfront_write_number(f, "event-channel", f->port);
    blkfront_write_number(f, "request-rx-copy", 1);
    blkfront_write_number(f, "state", CONNECTED);
    return blkfront_await(f, CONNECTED);
}

static void put(struct blkfront *f, u32 gref, u16 offset, u16 flags, u16 size)
{
    struct netif_ring *ring = &tx[f->number];
    u32 at = f->produced++ % SLOTS;
    ring->tx[at].gref = gref;
    ring->tx[at].offset = offset;
    ring->tx[at].flags = flags;
    ring->tx[at].id = (u16)at;
    ring->tx[at].size = size;
}

static void push(struct blkfront *f)
{
    barrier();
    tx[f->number].req_prod = f->produced;
    fence();
    evtchn_send(f->port);
}

static bool answered(struct netif_ring *ring, u32 count)
{
    u64 start = now_ns();
    while (ring->rsp_prod != count)
        if (now_ns() - start > PATIENCE)
            return false;
        else
            HYPERCALL(HC_sched_op, SCHEDOP_yield, 0);
    return true;
}

/* Who has 10.213.0.1? */
static void arp_request(u32 vif, const struct blkfront *f)
{
    static const u8 head[] = {0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1};
    char path[96] = "", text[32] = "";
    u8 mac[6] = {0};
    text_append(path, f->front);
    text_append(path, "/mac");
    xs_read(path, text, sizeof text);
    for (u32 i = 0; i < 17; i++)
        if (text[i] != ':')
            mac[i / 3] = (u8)(mac[i / 3] << 4 | (text[i] <= '9' ? text[i] - '0' : (text[i] | 32) - 'a' + 10));
    u8 addresses[] = {10, 213, 7, (u8)(vif + 1), 0, 0, 0, 0, 0, 0, 10, 213, 0, 1};
    memset(data, 0xff, 6);
    memcpy(data + 6, mac, 6);
    memcpy(data + 12, head, sizeof head);
    memcpy(data + 22, mac, 6);
    memcpy(data + 28, addresses, sizeof addresses);
}

static void ask_router(struct blkfront *f)
{
    struct netif_ring *in = &rx[f->number];
    u32 before = f->consumed++;
    memset(buffer, 0, sizeof buffer);
    in->rx[before % SLOTS].id = 7;
    in->rx[before % SLOTS].gref = BUFFER_REF;
    barrier();
    in->req_prod = before + 1;
    arp_request(f->number, f);
    put(f, DATA_REF, 0, 0, 42);
    push(f);
    check(answered(&tx[f->number], f->produced), "  the packet is taken");
    check_eq("  and was right", tx[f->number].tx_response[(f->produced - 1) % SLOTS].status, 0);
    check(answered(in, before + 1), "  an answer comes");
    check_eq("  of an ARP frame's length", in->rx_response[before % SLOTS].status, 42);
    check_eq("  which is a reply", buffer[21], 2);
    check_eq("  of the router's", buffer[31], 1);
}

static bool lost(struct blkfront *f)
{
    return blkfront_await(f, CLOSING);
}

static void abuse(void)
{
    struct blkfront f;
    print("# rings that lie\n");
    check(connect(&f, 1), "  connect");
    f.produced = SLOTS + 1, push(&f);
    check(lost(&f), "  more requests than there is room for close the device");
    check(connect(&f, 2), "  connect");
    put(&f, DATA_REF, 4090, 0, 60), push(&f);
    check(lost(&f), "  so does a packet beyond its frame");
    check(connect(&f, 3), "  connect");
    put(&f, DATA_REF, 0, NETTXF_more_data, 60), push(&f);
    check(lost(&f), "  and one whose rest is missing");
    check(connect(&f, 4), "  connect");
    put(&f, DATA_REF, 0, NETTXF_extra_info, 60), put(&f, 0xffffffff, 0xffff, 0xffff, 0xffff), push(&f);
    check(lost(&f), "  and one with extra information that nobody offered");
    check(connect(&f, 5), "  connect");
    for (u32 i = 0; i < 200; i++)
        put(&f, i % 2 ? 3000 : DATA_REF, 0, 0, 42);
    push(&f);
    blkfront_write_number(&f, "state", CLOSED);
    check(blkfront_await(&f, CLOSED), "  a disconnect midway is answered");
    check_eq("  the ring is given back", grant_in_use(RING_REF(5)) || grant_in_use(RING_REF(5) + 1), 0);
}

static u64 state;

static u64 random(void)
{
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state >> 11;
}

static void fuzz(u64 count)
{
    struct blkfront f;
    state = option_value("seed", 1) * 0x9e3779b97f4a7c15ull + 1;
    check(connect(&f, 1), "connect");
    arp_request(1, &f);
    for (u64 done = 0; done < count; done += 64) {
        for (u32 i = 0; i < 64; i++)
            put(&f, random() % 8 ? DATA_REF : (u32)random(), (u16)(random() % 8 ? 0 : random()),
                (u16)(random() % 512 ? random() % 4 : random()), (u16)(random() % 4 ? 42 : random() % 64));
        push(&f);
        for (u32 at = 0; at < 4; at++)
            ((u8 *)tx[1].tx)[random() % (SLOTS * 12)] = (u8)random();
        if (random() % 4 == 0)
            grant_table[DATA_REF].flags = (u16)random();
        grant_to(DATA_REF, 0, va_to_mfn(data), 0);
        u64 start = now_ns();
        while (tx[1].rsp_prod != f.produced && now_ns() - start < PATIENCE)
            if (blkfront_read(&f, "state", true) != CONNECTED) {
                check(true, "every slot is answered, or the device closes");
                return;
            }
    }
    check(tx[1].rsp_prod == f.produced, "every slot is answered, or the device closes");
}

int main(void)
{
    struct blkfront good;
    u64 count = option_value("fuzz", 0);
    events_quiet();
    grants_open();
    grant_to(DATA_REF, 0, va_to_mfn(data), 0);
    grant_to(BUFFER_REF, 0, va_to_mfn(buffer), 0);
    print("# a front-end that keeps to the protocol\n");
    check(connect(&good, 0), "  connect");
    ask_router(&good);
    if (count)
        fuzz(count);
    else
        abuse();
    print("# after all that\n");
    grant_to(DATA_REF, 0, va_to_mfn(data), 0);
    ask_router(&good);
    blkfront_write_number(&good, "state", CLOSED);
    check(blkfront_await(&good, CLOSED), "  the back-end closes when we do");
    check_eq("  the ring is given back", grant_in_use(RING_REF(0)) || grant_in_use(RING_REF(0) + 1), 0);
    return 0;
}
