/*
 * Writes record after record to xvda, from first=N on, and says of each when its flush has returned: what it said
 * must be on the disk whatever happens to the host. Record n is a block of 4 KiB full of the number n, at block
 * n * 17 % (blocks of the disk). It never ends.
 */
#include "blkif.h"
#include "events.h"

static struct blkif_ring ring PAGE_ALIGNED;
static u64 record[PAGE_SIZE / 8] PAGE_ALIGNED;
static struct blkfront disk;

static bool carried_out(void)
{
    struct blkif_response response = {.status = 99};
    blkfront_push(&disk);
    return blkfront_collect(&disk, 1, &response) && response.status == BLKIF_RSP_OKAY;
}

int main(void)
{
    events_quiet();
    grants_open();
    grant_to(16, 0, va_to_mfn(record), 0);
    blkfront_find(&disk, XVDA);
    check(blkfront_connect(&disk, &ring, 14, true), "connect");
    u64 blocks = (u64)blkfront_read(&disk, "sectors", true) / 8;
    for (u64 number = option_value("first", 1);; number++) {
        for (u64 i = 0; i < LENGTH(record); i++)
            record[i] = number;
        struct blkif_request *r = &blkfront_next(&disk)->request;
        r->operation = BLKIF_OP_WRITE;
        r->segments = 1;
        r->sector = number * 17 % blocks * 8;
        r->segment[0] = (struct blkif_segment){16, 0, 7, 0};
        if (!carried_out())
            break;
        blkfront_next(&disk)->request.operation = BLKIF_OP_FLUSH_DISKCACHE;
        if (!carried_out())
            break;
        print("flushed %lu\n", number);
    }
    check(false, "every request is carried out");
    return 1;
}
