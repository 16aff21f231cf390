/* A block-device front-end (public io/blkif.h, io/ring.h, io/xenbus.h). */
#ifndef GUEST_BLKIF_H
#define GUEST_BLKIF_H

#include "grants.h"
#include "xenstore.h"

#define XVDA 51712 /* xvdb is 16 further */
#define BLKIF_OP_READ 0
#define BLKIF_OP_WRITE 1
#define BLKIF_OP_FLUSH_DISKCACHE 3
#define BLKIF_OP_DISCARD 5
#define BLKIF_OP_INDIRECT 6
#define BLKIF_RSP_OKAY 0
#define BLKIF_RSP_ERROR -1
#define BLKIF_RSP_EOPNOTSUPP -2
#define RING_ENTRIES 32
#define SECTOR 512

enum { INITIALISING = 1, INIT_WAIT, INITIALISED, CONNECTED, CLOSING, CLOSED };

struct blkif_segment {
    u32 gref;
    u8 first, last;
    u16 pad;
};

struct blkif_request {
    u8 operation, segments;
    u16 handle;
    u64 id, sector;
    struct blkif_segment segment[11];
};
_Static_assert(sizeof(struct blkif_request) == 112, "public ABI");

struct blkif_discard {
    u8 operation, flag;
    u16 handle;
    u64 id, sector, sectors;
};

struct blkif_indirect {
    u8 operation, real_operation;
    u16 segments;
    u64 id, sector;
    u16 handle;
    u32 gref[8];
};
_Static_assert(__builtin_offsetof(struct blkif_indirect, gref) == 28, "public ABI");

struct blkif_response {
    u64 id;
    u8 operation;
    s16 status;
};

union blkif_entry {
    struct blkif_request request;
    struct blkif_discard discard;
    struct blkif_indirect indirect;
    struct blkif_response response;
    u8 bytes[112];
};

struct blkif_ring {
    volatile u32 req_prod, req_event, rsp_prod, rsp_event;
    u8 pad[48];
    union blkif_entry entry[RING_ENTRIES];
    u8 rest[PAGE_SIZE - 64 - RING_ENTRIES * 112];
};
_Static_assert(sizeof(struct blkif_ring) == PAGE_SIZE, "a frame");

struct blkfront {
    u32 number;
    char front[64], back[128]; /* directories */
    struct blkif_ring *ring;
    u32 ring_ref, port;
    u32 produced, consumed;
};

void frontend_find(struct blkfront *f, const char *directory, u32 number); /* a device in directory, with a / */
static inline void blkfront_find(struct blkfront *f, u32 number) { frontend_find(f, "device/vbd/", number); }
long blkfront_read(struct blkfront *f, const char *node, bool back); /* a number, or -1 */
void blkfront_write(struct blkfront *f, const char *node, const char *value);
void blkfront_write_number(struct blkfront *f, const char *node, u64 value);
bool blkfront_await(struct blkfront *f, u32 state);          /* of the back-end */
bool blkfront_connect(struct blkfront *f, struct blkif_ring *ring, u32 ring_ref, bool persistent);
union blkif_entry *blkfront_next(struct blkfront *f);        /* where the next request goes */
void blkfront_push(struct blkfront *f);                      /* and an event where it is wanted */
bool blkfront_collect(struct blkfront *f, u32 wanted, struct blkif_response *last); /* wait for so many */
long blkfront_finish(struct blkfront *f); /* push and wait for one response: its status, 98: none came */

#endif
