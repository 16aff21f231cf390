/*
 * A block-device front-end that keeps to the protocol, on xvda, of which sector n holds the bytes n * 7 + i
 * (public io/blkif.h). What it leaves there: sectors 16-23 hold 0xa5, 24-31 nothing.
 */
#include "blkif.h"
#include "events.h"
#include "paging.h"

#define DATA_REF 16
#define INDIRECT_REF 15
#define RING_REF 14
#define FRAMES 40

static struct blkif_ring ring PAGE_ALIGNED;
static u8 data[FRAMES][PAGE_SIZE] PAGE_ALIGNED;
static struct blkif_segment indirect[PAGE_SIZE / 8] PAGE_ALIGNED;
static struct blkfront disk;

static bool holds_pattern(const u8 *bytes, u64 sector, u64 sectors)
{
    for (u64 i = 0; i < sectors * SECTOR; i++)
        if (bytes[i] != (u8)((sector + i / SECTOR) * 7 + i % SECTOR))
            return false;
    return true;
}

static bool holds(const u8 *bytes, u8 value, u64 length)
{
    for (u64 i = 0; i < length; i++)
        if (bytes[i] != value)
            return false;
    return true;
}

static long transfer(u8 operation, u64 sector, u32 segments, u8 first, u8 last)
{
    struct blkif_request *r = &blkfront_next(&disk)->request;
    r->operation = operation;
    r->segments = (u8)segments;
    r->id = 0x1234;
    r->sector = sector;
    for (u32 i = 0; i < segments; i++)
        r->segment[i] = (struct blkif_segment){DATA_REF + i, first, last, 0};
    return blkfront_finish(&disk);
}

static long many(u8 operation, u64 sector, u32 segments)
{
    struct blkif_indirect *r = &blkfront_next(&disk)->indirect;
    for (u32 i = 0; i < segments; i++)
        indirect[i] = (struct blkif_segment){DATA_REF + i, 0, 7, 0};
    r->operation = BLKIF_OP_INDIRECT;
    r->real_operation = operation;
    r->segments = (u16)segments;
    r->sector = sector;
    r->gref[0] = INDIRECT_REF;
    return blkfront_finish(&disk);
}

static long discard(u64 sector, u64 sectors)
{
    struct blkif_discard *r = &blkfront_next(&disk)->discard;
    r->operation = BLKIF_OP_DISCARD;
    r->sector = sector;
    r->sectors = sectors;
    return blkfront_finish(&disk);
}

static void reading_and_writing(void)
{
    check_eq("  read one frame", transfer(BLKIF_OP_READ, 8, 1, 0, 7), 0);
    check(holds_pattern(data[0], 8, 8), "  it is the disk's");
    memset(data[1], 0x11, PAGE_SIZE);
    check_eq("  read parts of two frames", transfer(BLKIF_OP_READ, 40, 2, 3, 4), 0);
    check(holds_pattern(data[0] + 3 * SECTOR, 40, 2) && holds_pattern(data[1] + 3 * SECTOR, 42, 2),
          "  the parts are the disk's");
    check(holds(data[1], 0x11, 3 * SECTOR) && holds(data[1] + 5 * SECTOR, 0x11, 3 * SECTOR),
          "  and the rest is as it was");
    check_eq("  read 11 frames", transfer(BLKIF_OP_READ, 64, 11, 0, 7), 0);
    check(holds_pattern(data[0], 64, 88), "  they are the disk's");
    check_eq("  read 40 frames", many(BLKIF_OP_READ, 32, FRAMES), 0);
    check(holds_pattern(data[0], 32, FRAMES * 8), "  they are the disk's");
    memset(data[0], 0xa5, PAGE_SIZE);
    check_eq("  write a frame", transfer(BLKIF_OP_WRITE, 16, 1, 0, 7), 0);
    check_eq("  flush", transfer(BLKIF_OP_FLUSH_DISKCACHE, 0, 0, 0, 0), 0);
    memset(data[0], 0, PAGE_SIZE);
    check_eq("  read it back", transfer(BLKIF_OP_READ, 16, 1, 0, 7), 0);
    check(holds(data[0], 0xa5, PAGE_SIZE), "  it is what was written");
    check_eq("  read and write 40 frames", many(BLKIF_OP_READ, 512, FRAMES) | many(BLKIF_OP_WRITE, 512, FRAMES), 0);
    check_eq("  discard", discard(24, 8), 0);
    check_eq("  read what was discarded", transfer(BLKIF_OP_READ, 24, 1, 0, 7), 0);
    check(holds(data[0], 0, PAGE_SIZE), "  it is empty");
}

/* 1,000 requests, as many at once as the ring takes; events only where they were asked for. */
static void a_full_ring(void)
{
    struct blkif_response got[RING_ENTRIES];
    bool in_order = true, right = true;
    for (u64 round = 0; round < 1000 / RING_ENTRIES; round++) {
        for (u64 i = 0; i < RING_ENTRIES; i++) {
            struct blkif_request *r = &blkfront_next(&disk)->request;
            r->segments = 1;
            r->id = round << 32 | i;
            r->sector = 64 + i * 8;
            r->segment[0] = (struct blkif_segment){DATA_REF + (u32)i, 0, 7, 0};
            memset(data[i], 0, 16);
        }
        blkfront_push(&disk);
        if (!blkfront_collect(&disk, RING_ENTRIES, got)) {
            check(false, "  every request is answered");
            return;
        }
        for (u64 i = 0; i < RING_ENTRIES; i++) {
            in_order = in_order && got[i].id == (round << 32 | i) && got[i].status == BLKIF_RSP_OKAY;
            right = right && holds_pattern(data[i], 64 + i * 8, 1);
        }
    }
    check(in_order, "  every request is answered");
    check(right, "  with the data it asked for");
}

static bool any_in_use(void)
{
    for (u32 ref = RING_REF; ref < DATA_REF + FRAMES; ref++)
        if (grant_in_use(ref))
            return true;
    return false;
}

static u64 offers_persistent; /* a back-end in native code does without */

static void a_life(bool persistent)
{
    print("# %s\n", persistent ? "persistent grants" : "grants that are mapped anew");
    check(blkfront_connect(&disk, &ring, RING_REF, persistent), "  connect");
    check_eq("  sectors", blkfront_read(&disk, "sectors", true), 4096);
    check_eq("  sector size", blkfront_read(&disk, "sector-size", true), SECTOR);
    check_eq("  info", blkfront_read(&disk, "info", true), 0);
    reading_and_writing();
    check_eq("  a data frame is still mapped", grant_in_use(DATA_REF), persistent && offers_persistent);
    print("# a full ring\n");
    a_full_ring();
    print("# going away\n");
    blkfront_write_number(&disk, "state", CLOSING);
    check(blkfront_await(&disk, CLOSING), "  the back-end follows to Closing");
    check_eq("  and still answers", transfer(BLKIF_OP_READ, 8, 1, 0, 7), 0);
    blkfront_write_number(&disk, "state", CLOSED);
    check(blkfront_await(&disk, CLOSED), "  and to Closed");
    check_eq("  a grant is still in use", any_in_use(), 0);
    evtchn_close(disk.port);
    blkfront_write_number(&disk, "state", INITIALISING);
}

int main(void)
{
    events_quiet();
    grants_open();
    for (u32 i = 0; i < FRAMES; i++)
        grant_to(DATA_REF + i, 0, va_to_mfn(data[i]), 0);
    grant_to(INDIRECT_REF, 0, va_to_mfn(indirect), 0);
    blkfront_find(&disk, XVDA);
    print("# what the back-end offers\n");
    check(blkfront_await(&disk, INIT_WAIT), "  it waits for us");
    check_eq("  flush", blkfront_read(&disk, "feature-flush-cache", true), 1);
    check_eq("  discard", blkfront_read(&disk, "feature-discard", true), 1);
    offers_persistent = blkfront_read(&disk, "feature-persistent", true);
    check(offers_persistent <= 1, "  persistent grants, or not");
    check_eq("  indirect segments", blkfront_read(&disk, "feature-max-indirect-segments", true), 256);
    a_life(false);
    a_life(true);
    a_life(false);
    return 0;
}
