#include "blkif.h"

#include "events.h"
#include "timing.h"

#define PATIENCE 20000 * MS

void frontend_find(struct blkfront *f, const char *directory, u32 number)
{
    char path[96] = "";
    memset(f, 0, sizeof *f);
    f->number = number;
    text_append(f->front, directory);
    text_append_number(f->front, number);
    text_append(path, f->front);
    text_append(path, "/backend");
    xs_read(path, f->back, sizeof f->back);
}

long blkfront_read(struct blkfront *f, const char *node, bool back)
{
    char path[256] = "", value[32];
    text_append(path, back ? f->back : f->front);
    text_append(path, "/");
    text_append(path, node);
    return xs_read(path, value, sizeof value) < 0 ? -1 : (long)text_number(value);
}

void blkfront_write(struct blkfront *f, const char *node, const char *value)
{
    char path[128] = "";
    text_append(path, f->front);
    text_append(path, "/");
    text_append(path, node);
    xs_write(path, value, strlen(value));
}

void blkfront_write_number(struct blkfront *f, const char *node, u64 value)
{
    char text[24] = "";
    text_append_number(text, value);
    blkfront_write(f, node, text);
}

bool blkfront_await(struct blkfront *f, u32 state)
{
    u64 start = now_ns();
    while (blkfront_read(f, "state", true) != state)
        if (now_ns() - start > PATIENCE)
            return false;
    return true;
}

bool blkfront_connect(struct blkfront *f, struct blkif_ring *ring, u32 ring_ref, bool persistent)
{
    if (!blkfront_await(f, INIT_WAIT))
        return false;
    f->ring = ring;
    f->ring_ref = ring_ref;
    f->produced = f->consumed = 0;
    memset(ring, 0, sizeof *ring);
    ring->req_event = ring->rsp_event = 1;
    f->port = (u32)evtchn_alloc_unbound(DOMID_SELF, 0);
    grant_to(ring_ref, 0, va_to_mfn(ring), 0);
    blkfront_write_number(f, "ring-ref", ring_ref);
    blkfront_write_number(f, "event-channel", f->port);
    blkfront_write(f, "protocol", "x86_64-abi");
    blkfront_write_number(f, "feature-persistent", persistent);
    blkfront_write_number(f, "state", INITIALISED);
    if (!blkfront_await(f, CONNECTED))
        return false;
    blkfront_write_number(f, "state", CONNECTED);
    return true;
}

union blkif_entry *blkfront_next(struct blkfront *f)
{
    union blkif_entry *entry = &f->ring->entry[f->produced++ % RING_ENTRIES];
    memset(entry, 0, sizeof *entry);
    return entry;
}

void blkfront_push(struct blkfront *f)
{
    u32 before = f->ring->req_prod;
    barrier();
    f->ring->req_prod = f->produced;
    fence();
    if (f->produced - f->ring->req_event < f->produced - before)
        evtchn_send(f->port);
}

bool blkfront_collect(struct blkfront *f, u32 wanted, struct blkif_response *last)
{
    u64 start = now_ns();
    u32 end = f->consumed + wanted;
    f->ring->rsp_event = end;
    fence();
    while ((s32)(f->ring->rsp_prod - end) < 0) {
        if (now_ns() - start > PATIENCE)
            return false;
        evtchn_wait(f->port, now_ns() + PATIENCE);
    }
    for (; f->consumed != end; f->consumed++)
        if (last)
            *last++ = f->ring->entry[f->consumed % RING_ENTRIES].response;
    return true;
}

long blkfront_finish(struct blkfront *f)
{
    struct blkif_response response = {.status = 99};
    blkfront_push(f);
    return blkfront_collect(f, 1, &response) ? response.status : 98;
}
