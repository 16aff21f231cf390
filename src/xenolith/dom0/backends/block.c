/* Reads and writes of a block device's ring: block.py, whose `_Queue` calls `serve`, without Python's lock.

   Requests are taken in batches: copied and checked, the frames pinned, data moved, the frames given back, responses put.
   What is not done here - other requests, grants that take more than a count - is Python's: `serve` answers what it is,
   and goes on from there when it is called again. */

struct iovec {
    void *base;
    size_t length;
};

ssize_t preadv(int descriptor, const struct iovec *parts, int count, i64 offset);
ssize_t pwritev(int descriptor, const struct iovec *parts, int count, i64 offset);
int *__errno_location(void);

/* The next batch. False: the ring lies. */
static bool take(struct batch *b)
{
    struct ring *r = b->ring;
    i64 waiting = requests_waiting(r);
    u32 room = MAX_PINS;
    b->count = b->pins->begin = b->pins->count = 0;
    b->at = b->failures = 0;
    if (waiting < 0)
        return false;
    while (b->count < (u32)waiting && b->count < BATCH && room >= LARGEST && MAX_PINS - room < ENOUGH) {
        struct request *q = &b->requests[b->count++];
        fetch(q->raw, ring_entry(r, r->consumed++), sizeof q->raw);
        q->operation = q->raw[0];
        q->segment_count = q->raw[1];
        __builtin_memcpy(&q->id, q->raw + 8, 8);
        __builtin_memcpy(&q->sector, q->raw + 16, 8);
        q->status = BLKIF_RSP_OKAY;
        q->error = 0;
        q->cut_off = false;
        q->indirect = q->operation == BLKIF_OP_INDIRECT;
        q->is_pythons = false;
        if (q->indirect) {
            u16 count;
            q->operation = q->raw[1];
            __builtin_memcpy(&count, q->raw + 2, 2);
            q->segment_count = count;
        } else if (q->operation != BLKIF_OP_READ && q->operation != BLKIF_OP_WRITE) {
            q->is_pythons = true;
            continue;
        }
        bool moves = q->operation == BLKIF_OP_READ || q->operation == BLKIF_OP_WRITE;
        u32 most = q->indirect ? MAX_INDIRECT_SEGMENTS : BLKIF_MAX_SEGMENTS_PER_REQUEST;
        if (!moves || !q->segment_count || q->segment_count > most || (q->operation == BLKIF_OP_WRITE && !b->writable)) {
            q->status = BLKIF_RSP_ERROR;
            continue;
        }
        room -= q->segment_count;
        if (q->indirect) {
            u32 pin = b->pins->count++;
            q->first_pin = pin;
            __builtin_memcpy(&b->pins->refs[pin], q->raw + INDIRECT_REFS, 4);
            b->pins->writable[pin] = false;
            room--;
        }
    }
    return true;
}

/* Name the frames of a request's data. False where its segments make no sense. */
static bool gather_one(struct batch *b, struct request *q, const u8 *segments)
{
    struct pins *p = b->pins;
    u64 sectors = 0;
    q->first_pin = p->count;
    for (u32 i = 0; i < q->segment_count; i++, segments += SEGMENT_SIZE) {
        u8 first = segments[4], last = segments[5];
        if (first > last || last >= SECTORS_PER_PAGE)
            return false;
        u32 pin = p->count++;
        __builtin_memcpy(&p->refs[pin], segments, 4);
        p->writable[pin] = q->operation == BLKIF_OP_READ;
        b->first[pin] = first;
        b->length[pin] = (u8)(last - first + 1);
        sectors += b->length[pin];
    }
    q->sectors = sectors;
    return sectors <= b->sectors && q->sector <= b->sectors - sectors;
}

/* Name the frames of all data. */
static void gather(struct batch *b)
{
    struct pins *p = b->pins;
    p->begin = p->count;
    for (u32 i = 0; i < b->count; i++) {
        struct request *q = &b->requests[i];
        if (q->is_pythons || q->status)
            continue;
        u8 copy[MAX_INDIRECT_SEGMENTS * SEGMENT_SIZE];
        const u8 *segments = q->raw + SEGMENTS;
        if (q->indirect) {
            if (p->states[q->first_pin] != IS_PINNED) {
                q->status = BLKIF_RSP_ERROR;
                continue;
            }
            fetch(copy, (u8 *)p->addresses[q->first_pin], q->segment_count * SEGMENT_SIZE);
            segments = copy;
        }
        u32 before = p->count;
        if (!gather_one(b, q, segments)) {
            p->count = before;
            q->status = BLKIF_RSP_ERROR;
        }
    }
}

/* Add a request's memory to `parts`; how many there are then. Neighbours in memory are one. */
static u32 add_parts(struct batch *b, struct request *q, struct iovec *parts, u32 count)
{
    for (u32 pin = q->first_pin; pin < q->first_pin + q->segment_count; pin++) {
        u8 *base = (u8 *)b->pins->addresses[pin] + b->first[pin] * SECTOR_SIZE;
        size_t length = (size_t)b->length[pin] * SECTOR_SIZE;
        if (count && (u8 *)parts[count - 1].base + parts[count - 1].length == base)
            parts[count - 1].length += length;
        else
            parts[count++] = (struct iovec){base, length};
    }
    return count;
}

/* All of it: 0, an errno, or -1 where the file ends before. */
static int transfer(int descriptor, bool reading, struct iovec *part, u32 count, i64 position)
{
    while (count) {
        ssize_t done = (reading ? preadv : pwritev)(descriptor, part, (int)count, position);
        if (done < 0)
            return *__errno_location();
        if (!done)
            return -1;
        position += done;
        for (; count && (size_t)done >= part->length; part++, count--)
            done -= (ssize_t)part->length;
        if (count) {
            part->base = (u8 *)part->base + done;
            part->length -= (size_t)done;
        }
    }
    return 0;
}

static bool ready(struct batch *b, struct request *q)
{
    if (q->is_pythons || q->status)
        return false;
    for (u32 pin = q->first_pin; pin < q->first_pin + q->segment_count; pin++)
        if (b->pins->states[pin] != IS_PINNED) {
            q->status = BLKIF_RSP_ERROR;
            return false;
        }
    return true;
}

/* Requests `first` to `end`, neighbours on the disk, at once. */
static int transfer_run(struct batch *b, u32 first, u32 end)
{
    struct iovec parts[MAX_PINS];
    struct request *q = &b->requests[first];
    u32 count = 0;
    for (u32 i = first; i < end; i++)
        count = add_parts(b, &b->requests[i], parts, count);
    return transfer(b->descriptor, q->operation == BLKIF_OP_READ, parts, count, (i64)(q->sector * SECTOR_SIZE));
}

static void conclude(struct batch *b, struct request *q, int error)
{
    if (error) {
        q->status = BLKIF_RSP_ERROR;
        q->error = error < 0 ? EIO : error;
        q->cut_off = error < 0;
        b->failures++;
    } else if (q->operation == BLKIF_OP_READ) {
        b->statistics->reads++;
        b->statistics->read_bytes += q->sectors * SECTOR_SIZE;
    } else {
        b->statistics->writes++;
        b->statistics->written_bytes += q->sectors * SECTOR_SIZE;
    }
}

/* False: request `at` is Python's. */
static bool move(struct batch *b)
{
    for (u32 end; b->at < b->count; b->at = end) {
        struct request *q = &b->requests[b->at];
        if (q->is_pythons)
            return false;
        end = b->at + 1;
        if (!ready(b, q))
            continue;
        u64 next = q->sector + q->sectors;
        while (end < b->count && b->requests[end].operation == q->operation && b->requests[end].sector == next
               && ready(b, &b->requests[end]))
            next += b->requests[end++].sectors;
        int error = transfer_run(b, b->at, end);
        for (u32 i = b->at; i < end; i++)
            conclude(b, &b->requests[i], error && end > b->at + 1 ? transfer_run(b, i, i + 1) : error);
    }
    return true;
}

static void respond(struct batch *b)
{
    for (u32 i = 0; i < b->count; i++) {
        struct request *q = &b->requests[i];
        u8 response[RESPONSE_SIZE] = {0};
        b->statistics->errors += q->status != BLKIF_RSP_OKAY;
        __builtin_memcpy(response, &q->id, 8);
        response[8] = q->operation;
        __builtin_memcpy(response + 10, &q->status, 2);
        put_response(b->ring, response, sizeof response);
    }
}

/* Serve the ring until it is empty, or until there is something for Python to do. */
int serve(struct batch *b)
{
    for (;;)
        switch (b->stage) {
        case TAKE:
            if (!b->batches_left)
                return MORE;
            b->batches_left--;
            if (!take(b))
                return LIES;
            if (!b->count)
                return rearm(b->ring) ? MORE : IDLE;
            b->stage = GATHER;
            if (b->pin(b->granter, b->pins))
                return PIN;
            break;
        case GATHER:
            gather(b);
            b->stage = MOVE;
            if (b->pin(b->granter, b->pins))
                return PIN;
            break;
        case MOVE:
            if (!move(b))
                return CARRY_OUT;
            b->stage = RESPOND;
            if (b->unpin(b->granter, b->pins))
                return UNPIN;
            break;
        case RESPOND:
            b->stage = PUSH;
            respond(b);
            if (b->failures)
                return FAILED;
            break;
        case PUSH:
            b->stage = TAKE;
            if (push_responses(b->ring))
                return NOTIFY;
            break;
        default:
            __builtin_unreachable();
        }
}
