/*
 * A block-device front-end that breaks the protocol in every way it can think of (public io/blkif.h). Nonsense in a
 * request must be answered with an error, a ring that lies must close its device; xvda takes the former, each
 * further disk one of the latter. `fuzz=N seed=S`: N random requests to xvda instead.
 */
#include "blkif.h"
#include "events.h"
#include "paging.h"

#define RING_REF 14
#define INDIRECT_REF 15
#define DATA_REF 16
#define READ_ONLY_REF 17
#define TABLE_REF 18
#define FOREIGN_REF 19
#define STALE_REF 20
#define NOWHERE_REF 21
#define OTHERS_REF 22
#define FUZZ_REFS 24

static struct blkif_ring rings[8] PAGE_ALIGNED;
static u8 data[PAGE_SIZE] PAGE_ALIGNED, page[PAGE_SIZE] PAGE_ALIGNED, given_away[PAGE_SIZE] PAGE_ALIGNED;
static struct blkif_segment indirect[PAGE_SIZE / 8] PAGE_ALIGNED;
static struct blkfront disk;

static struct blkif_request *request(u8 operation, u64 sector, u32 gref)
{
    struct blkif_request *r = &blkfront_next(&disk)->request;
    r->operation = operation;
    r->segments = 1;
    r->sector = sector;
    r->segment[0] = (struct blkif_segment){gref, 0, 7, 0};
    return r;
}

static long ask(u8 operation, u64 sector, u32 gref)
{
    request(operation, sector, gref);
    return blkfront_finish(&disk);
}

static void requests(void)
{
    struct blkif_request *r;
    print("# nonsense in requests\n");
    check(blkfront_connect(&disk, &rings[0], RING_REF, false), "  connect");
    r = request(BLKIF_OP_READ, 0, DATA_REF), r->segments = 0;
    check_eq("  no segments", blkfront_finish(&disk), BLKIF_RSP_ERROR);
    r = request(BLKIF_OP_READ, 0, DATA_REF), r->segments = 255;
    check_eq("  255 segments", blkfront_finish(&disk), BLKIF_RSP_ERROR);
    r = request(BLKIF_OP_READ, 0, DATA_REF), r->segment[0].last = 8;
    check_eq("  beyond the frame", blkfront_finish(&disk), BLKIF_RSP_ERROR);
    r = request(BLKIF_OP_READ, 0, DATA_REF), r->segment[0].first = 7, r->segment[0].last = 6;
    check_eq("  backwards", blkfront_finish(&disk), BLKIF_RSP_ERROR);
    check_eq("  beyond the disk", ask(BLKIF_OP_READ, 4096, DATA_REF), BLKIF_RSP_ERROR);
    check_eq("  far beyond the disk", ask(BLKIF_OP_WRITE, ~0ul - 3, DATA_REF), BLKIF_RSP_ERROR);
    check_eq("  an operation that there is not", ask(77, 0, DATA_REF), BLKIF_RSP_EOPNOTSUPP);

    print("# frames that are not to be had\n");
    check_eq("  a grant that there is not", ask(BLKIF_OP_READ, 0, 300), BLKIF_RSP_ERROR);
    check_eq("  a reference beyond the table", ask(BLKIF_OP_READ, 0, ~0u), BLKIF_RSP_ERROR);
    check_eq("  a grant to somebody else", ask(BLKIF_OP_READ, 0, OTHERS_REF), BLKIF_RSP_ERROR);
    check_eq("  a read into a read-only grant", ask(BLKIF_OP_READ, 0, READ_ONLY_REF), BLKIF_RSP_ERROR);
    check_eq("  a write from it", ask(BLKIF_OP_WRITE, 8, READ_ONLY_REF), BLKIF_RSP_OKAY);
    check_eq("  a read into our page table", ask(BLKIF_OP_READ, 0, TABLE_REF), BLKIF_RSP_ERROR);
    check_eq("  a read into a frame that is not ours", ask(BLKIF_OP_READ, 0, FOREIGN_REF), BLKIF_RSP_ERROR);
    check_eq("  a read into frame 0xffffffff", ask(BLKIF_OP_READ, 0, NOWHERE_REF), BLKIF_RSP_ERROR);
    check_eq("  a read into one that we gave back", ask(BLKIF_OP_READ, 0, STALE_REF), BLKIF_RSP_ERROR);
    check_eq("  a write from there", ask(BLKIF_OP_WRITE, 0, STALE_REF), BLKIF_RSP_ERROR);
    check_eq("  our tables are as they were", *pte_of(data, 1) >> PAGE_SHIFT & 0xffffff, (long)va_to_mfn(data));

    print("# grants that go while they are used\n");
    for (int i = 0; i < 200; i++) {
        grant_to(DATA_REF, 0, va_to_mfn(data), 0);
        request(BLKIF_OP_READ, 0, DATA_REF);
        blkfront_push(&disk);
        grant_end(DATA_REF);
        struct blkif_response response = {.status = 99};
        if (!blkfront_collect(&disk, 1, &response) ||
            (response.status != BLKIF_RSP_OKAY && response.status != BLKIF_RSP_ERROR)) {
            check(false, "  a grant that is withdrawn");
            break;
        }
    }
    check_eq("  nothing of it is still in use", grant_in_use(DATA_REF), 0);
    grant_to(DATA_REF, 0, va_to_mfn(data), 0);
    check_eq("  and the device goes on", ask(BLKIF_OP_READ, 0, DATA_REF), BLKIF_RSP_OKAY);
}

static void connect(u32 index)
{
    blkfront_find(&disk, XVDA + 16 * index);
    check(blkfront_connect(&disk, &rings[index], 100 + index, true), "  connect");
    check_eq("  it works", ask(BLKIF_OP_READ, 0, DATA_REF), BLKIF_RSP_OKAY);
}

static void closes(void)
{
    check(blkfront_await(&disk, CLOSING), "  the back-end closes the device");
    check_eq("  the ring is still in use", grant_in_use(disk.ring_ref), 0);
    blkfront_write_number(&disk, "state", CLOSED);
    check(blkfront_await(&disk, CLOSED), "  and says goodbye");
}

static void rings_that_lie(void)
{
    print("# a producer that is 33 ahead\n");
    connect(1);
    disk.ring->req_prod = disk.produced + 33;
    evtchn_send(disk.port);
    closes();

    print("# a producer that goes back\n");
    connect(2);
    disk.ring->req_prod = disk.produced - 1;
    evtchn_send(disk.port);
    closes();

    print("# a disk that is read over its own ring\n");
    connect(3);
    request(BLKIF_OP_READ, 0, disk.ring_ref); /* the disk's pattern is no ring */
    blkfront_push(&disk);
    evtchn_send(disk.port);
    closes();

    print("# a ring in a page table\n");
    blkfront_find(&disk, XVDA + 16 * 4);
    blkfront_write_number(&disk, "ring-ref", TABLE_REF);
    blkfront_write_number(&disk, "event-channel", (u64)evtchn_alloc_unbound(DOMID_SELF, 0));
    blkfront_write_number(&disk, "state", INITIALISED);
    closes();

    print("# the console's event channel\n");
    blkfront_find(&disk, XVDA + 16 * 5);
    grant_to(105, 0, va_to_mfn(&rings[5]), 0);
    blkfront_write_number(&disk, "ring-ref", 105);
    blkfront_write_number(&disk, "event-channel", start_info->console_evtchn);
    blkfront_write_number(&disk, "state", INITIALISED);
    disk.ring_ref = 105;
    closes();

    print("# a device that is removed under its back-end\n");
    connect(6);
    for (int i = 0; i < RING_ENTRIES; i++)
        request(BLKIF_OP_READ, 0, DATA_REF);
    blkfront_push(&disk);
    check_eq("  remove its directory", xs_rm(disk.front), 0);
    check(blkfront_await(&disk, CLOSED), "  the back-end has closed");
    check_eq("  the ring is still in use", grant_in_use(disk.ring_ref), 0);
}

static u64 random(void)
{
    static u64 state;
    if (!state)
        state = option_value("seed", 1) * 0x9e3779b97f4a7c15ul | 1;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

/* Entries from almost right to noise; grants that come and go; the disk, and we, must be there afterwards. */
static void fuzz(u64 count)
{
    print("# %lu random requests\n", count);
    check(blkfront_connect(&disk, &rings[0], RING_REF, random() & 1), "  connect");
    for (u64 done = 0; done < count;) {
        u32 now = 1 + random() % RING_ENTRIES;
        for (u32 i = 0; i < now; i++) {
            union blkif_entry *e = blkfront_next(&disk);
            u64 kind = random();
            if (kind % 8 == 0) {
                for (u32 at = 0; at + 8 <= sizeof e->bytes; at += 8)
                    *(u64 *)(e->bytes + at) = random();
                continue;
            }
            e->request.operation = (u8)(kind >> 8) % 8;
            e->request.segments = (u8)(random() % 13);
            e->request.sector = random() % 4 ? random() % 4100 : random();
            for (u32 s = 0; s < LENGTH(e->request.segment); s++) {
                u64 r = random();
                e->request.segment[s].gref = INDIRECT_REF + r % FUZZ_REFS;
                e->request.segment[s].first = (u8)(r >> 8) % 9;
                e->request.segment[s].last = (u8)(r >> 16) % 9;
            }
            if (e->request.operation == BLKIF_OP_INDIRECT) {
                e->indirect.real_operation = (u8)random() % 8;
                e->indirect.segments = (u16)(random() % 300);
                e->indirect.gref[0] = INDIRECT_REF;
                for (u32 s = 0; s < LENGTH(indirect); s++)
                    indirect[s] = (struct blkif_segment){DATA_REF, 0, 7, 0};
            }
        }
        blkfront_push(&disk);
        u32 ref = INDIRECT_REF + (u32)(random() % FUZZ_REFS);
        if (ref != TABLE_REF && random() % 4 == 0)
            grant_table[ref].flags = (u16)random();
        for (u32 at = 0; at < 16; at++)
            disk.ring->entry[random() % RING_ENTRIES].bytes[random() % 112] = (u8)random();
        if (!blkfront_collect(&disk, now, NULL)) {
            check(false, "  every request is answered");
            return;
        }
        done += now;
    }
    check(true, "  every request is answered");
    for (u32 ref = RING_REF + 1; ref < INDIRECT_REF + FUZZ_REFS; ref++)
        grant_table[ref].flags &= GTF_reading | GTF_writing;
    blkfront_write_number(&disk, "state", CLOSED);
    check(blkfront_await(&disk, CLOSED), "  the back-end closes when we do");
    check_eq("  our tables are as they were", *pte_of(data, 1) >> PAGE_SHIFT & 0xffffff, (long)va_to_mfn(data));
}

int main(void)
{
    events_quiet();
    grants_open();
    grant_to(INDIRECT_REF, 0, va_to_mfn(indirect), 0);
    grant_to(DATA_REF, 0, va_to_mfn(data), 0);
    grant_to(READ_ONLY_REF, 0, va_to_mfn(page), GTF_readonly);
    grant_to(TABLE_REF, 0, va_to_mfn((void *)start_info->pt_base), 0);
    grant_to(FOREIGN_REF, 0, foreign_mfn(), 0);
    grant_to(NOWHERE_REF, 0, 0xffffffff, 0);
    grant_to(OTHERS_REF, 77, va_to_mfn(page), 0);
    u64 mfn = va_to_mfn(given_away);
    struct {
        u64 *extents;
        u64 count;
        u32 order, flags;
        u16 domid;
    } reservation = {&mfn, 1, 0, 0, DOMID_SELF};
    update_va(given_away, 0, UVMF_INVLPG);
    check_eq("give a frame back", HYPERCALL(HC_memory_op, 1, &reservation), 1);
    grant_to(STALE_REF, 0, mfn, 0);
    blkfront_find(&disk, XVDA);
    u64 count = option_value("fuzz", 0);
    if (count) {
        fuzz(count);
        return 0;
    }
    requests();
    rings_that_lie();
    print("# after all that\n");
    blkfront_find(&disk, XVDA + 16 * 7);
    check(blkfront_connect(&disk, &rings[7], 107, true), "another disk connects");
    check_eq("  and works", ask(BLKIF_OP_READ, 0, DATA_REF), BLKIF_RSP_OKAY);
    return 0;
}
