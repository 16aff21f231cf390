/*
 * A 9pfs front-end (public io/9pfs.h; 9P2000.L): files read and written through folder 0, nothing written through folder
 * 1, and a lie for each further one, which must close it. `fuzz=N seed=S`: N random messages to folder 0 instead.
 */
#include "blkif.h"
#include "events.h"
#include "paging.h"
#include "random.h"
#include "timing.h"

#define ORDER 2
#define FRAMES (1u << ORDER)
#define HALF (FRAMES / 2 * PAGE_SIZE)
#define RING_REF 20
#define TABLE_REF 30
#define PATIENCE (20000 * MS)
#define NOTAG 0xffff
#define NOFID 0xffffffff

#define RLERROR 7
#define TSTATFS 8
#define TLOPEN 12
#define TLCREATE 14
#define TSYMLINK 16
#define TMKNOD 18
#define TREADLINK 22
#define TGETATTR 24
#define TMKDIR 72
#define TUNLINKAT 76
#define TVERSION 100
#define TATTACH 104
#define TFLUSH 108
#define TWALK 110
#define TREAD 116
#define TWRITE 118
#define TCLUNK 120

#define EPERM 1
#define ENOENT 2
#define EBADF 9
#define EINVAL 22
#define EROFS 30
#define EOPNOTSUPP 95

struct interface {
    volatile u32 in_cons, in_prod;
    u8 pad1[56];
    volatile u32 out_cons, out_prod;
    u8 pad2[56];
    u32 order, refs[FRAMES];
};
_Static_assert(__builtin_offsetof(struct interface, order) == 128, "public ABI");

static union {
    struct interface words;
    u8 bytes[PAGE_SIZE];
} page PAGE_ALIGNED;
static u8 data[FRAMES * PAGE_SIZE] PAGE_ALIGNED;
static struct interface *ring = &page.words;
static struct blkfront device; /* of a block device's: its directories and port */
static u8 request[HALF], answer[HALF];
static u32 length, answered, error;

/* --- messages ------------------------------------------------------------------------------------------- */

static void put(const void *what, u32 size)
{
    memcpy(request + length, what, size);
    length += size;
}

static void put8(u8 value) { put(&value, sizeof value); }
static void put16(u16 value) { put(&value, sizeof value); }
static void put32(u32 value) { put(&value, sizeof value); }
static void put64(u64 value) { put(&value, sizeof value); }

static void put_text(const char *text)
{
    put16((u16)strlen(text));
    put(text, (u32)strlen(text));
}

static void begin(u8 type, u16 tag)
{
    length = 4;
    put8(type);
    put16(tag);
}

static void end(void) { memcpy(request, &length, sizeof length); }

static u32 number(u32 at)
{
    u32 value;
    memcpy(&value, answer + at, sizeof value);
    return value;
}

static bool wait(volatile u32 *word, u32 while_it_is)
{
    u64 start = now_ns();
    while (*word == while_it_is) {
        if (now_ns() - start > PATIENCE)
            return false;
        evtchn_wait(device.port, now_ns() + 100 * MS);
    }
    return true;
}

/* Put bytes into the ring, `piece` of them at a time. */
static bool send(const u8 *what, u32 size, u32 piece)
{
    while (size) {
        u32 at = ring->out_prod, taken = ring->out_cons, room = HALF - (at - taken);
        u32 now = size < piece ? size : piece;
        if (room < now) {
            if (!wait(&ring->out_cons, taken))
                return false;
            continue;
        }
        for (u32 i = 0; i < now; i++)
            data[HALF + (at + i) % HALF] = what[i];
        fence();
        ring->out_prod = at + now;
        evtchn_send(device.port);
        what += now;
        size -= now;
    }
    return true;
}

/* Take a message out of the ring. */
static bool receive(void)
{
    u32 at = ring->in_cons, there, size = 7;
    while ((there = ring->in_prod - at) < size)
        if (!wait(&ring->in_prod, at + there))
            return false;
    fence();
    for (u32 i = 0; i < 4; i++)
        answer[i] = data[(at + i) % HALF];
    size = number(0);
    if (size < 7 || size > HALF)
        return false;
    while ((there = ring->in_prod - at) < size)
        if (!wait(&ring->in_prod, at + there))
            return false;
    fence();
    for (u32 i = 0; i < size; i++)
        answer[i] = data[(at + i) % HALF];
    answered = size;
    ring->in_cons = at + size;
    evtchn_send(device.port);
    return true;
}

/* 0, an errno, or -1 where there is no answer, or one of another kind. */
static long ask_in_pieces(u32 piece)
{
    u8 type = request[4];
    end();
    if (!send(request, length, piece) || !receive())
        return -1;
    error = answer[4] == RLERROR ? number(7) : 0;
    return error ? (long)error : answer[4] == type + 1 ? 0 : -1;
}

static long ask(void) { return ask_in_pieces(HALF); }

static long version(u32 msize)
{
    begin(TVERSION, NOTAG), put32(msize), put_text("9P2000.L");
    return ask();
}

static long attach(u32 fid)
{
    begin(TATTACH, 1), put32(fid), put32(NOFID), put_text("root"), put_text("/etc"), put32(0);
    return ask();
}

static long walk(u32 fid, u32 newfid, const char *name)
{
    begin(TWALK, 2), put32(fid), put32(newfid), put16(*name != 0);
    if (*name)
        put_text(name);
    return ask();
}

static long open(u32 fid, u32 flags)
{
    begin(TLOPEN, 3), put32(fid), put32(flags);
    return ask();
}

static long create(u32 fid, const char *name)
{
    begin(TLCREATE, 4), put32(fid), put_text(name), put32(2 /* read and write */), put32(0644), put32(0);
    return ask();
}

static long read(u32 fid, u64 offset, u32 count)
{
    begin(TREAD, 5), put32(fid), put64(offset), put32(count);
    return ask();
}

static long write(u32 fid, u64 offset, const u8 *what, u32 count)
{
    begin(TWRITE, 6), put32(fid), put64(offset), put32(count), put(what, count);
    return ask();
}

static long clunk(u32 fid)
{
    begin(TCLUNK, 7), put32(fid);
    return ask();
}

static long unlink(u32 fid, const char *name)
{
    begin(TUNLINKAT, 8), put32(fid), put_text(name), put32(0);
    return ask();
}

/* --- the device ----------------------------------------------------------------------------------------- */

static void find(u32 index)
{
    frontend_find(&device, "device/9pfs/", index);
    memset(page.bytes, 0, sizeof page);
    ring->order = ORDER;
    for (u32 i = 0; i < FRAMES; i++) {
        ring->refs[i] = RING_REF + 1 + i;
        grant_to(ring->refs[i], 0, va_to_mfn(data + i * PAGE_SIZE), 0);
    }
    grant_to(RING_REF, 0, va_to_mfn(&page), 0);
    device.ring_ref = RING_REF;
    device.port = (u32)evtchn_alloc_unbound(DOMID_SELF, 0);
}

static void say_where_it_is(void)
{
    blkfront_await(&device, INIT_WAIT);
    blkfront_write_number(&device, "num-rings", 1);
    blkfront_write_number(&device, "ring-ref0", device.ring_ref);
    blkfront_write_number(&device, "event-channel-0", device.port);
    blkfront_write(&device, "version", "1");
    blkfront_write_number(&device, "state", INITIALISED);
}

static void connect(u32 index)
{
    find(index);
    say_where_it_is();
    check(blkfront_await(&device, CONNECTED), "  connect");
    blkfront_write_number(&device, "state", CONNECTED);
}

static bool in_use(void)
{
    bool used = grant_in_use(RING_REF);
    for (u32 i = 0; i < FRAMES; i++)
        used |= grant_in_use(RING_REF + 1 + i);
    return used;
}

static void close(void)
{
    blkfront_write_number(&device, "state", CLOSED);
    check(blkfront_await(&device, CLOSED), "  the back-end closes when we do");
    check_eq("  a frame of the ring is still in use", in_use(), 0);
}

static void closes(void)
{
    check(blkfront_await(&device, CLOSING), "  the back-end closes the device");
    check_eq("  a frame of the ring is still in use", in_use(), 0);
    blkfront_write_number(&device, "state", CLOSED);
    check(blkfront_await(&device, CLOSED), "  and says goodbye");
}

/* --- what is done with it ------------------------------------------------------------------------------- */

static void use(void)
{
    static u8 pattern[6000];
    print("# a folder\n");
    connect(0);
    check_eq("  attach before there is a session", attach(0), EINVAL);
    check_eq("  a session", version(1 << 20), 0);
    check_eq("  of messages no larger than 64 KiB", number(7), 64 << 10);
    check_eq("  attach", attach(0), 0);
    check_eq("  walk to a file", walk(0, 1, "greeting"), 0);
    check_eq("  open it", open(1, 0), 0);
    check_eq("  read it", read(1, 0, 100), 0);
    check_eq("  as many bytes as it has", number(7), 5);
    check_eq("  which are its bytes", memcmp(answer + 11, "hello", 5), 0);
    check_eq("  a second name for the folder", walk(0, 2, ""), 0);
    check_eq("  make a file", create(2, "from-guest"), 0);
    for (u32 i = 0; i < sizeof pattern; i++)
        pattern[i] = (u8)(i * 7);
    long status = 0;
    for (u32 at = 0; at < 4 * sizeof pattern; at += sizeof pattern)
        status |= write(2, at, pattern, sizeof pattern);
    check_eq("  write it, around the ring's end", status, 0);
    check_eq("  read it", read(2, sizeof pattern, sizeof pattern), 0);
    check_eq("  all that was asked for", number(7), sizeof pattern);
    check_eq("  as it was written", memcmp(answer + 11, pattern, sizeof pattern), 0);
    begin(TGETATTR, 9), put32(2), put64(0x7ff);
    check_eq("  a message that comes byte by byte", ask_in_pieces(1), 0);
    check_eq("  close it", clunk(2), 0);
    check_eq("  a session in its place", version(8192) | attach(0), 0);
    check_eq("  of which files that were open are none", read(1, 0, 1), EBADF);
}

static void leave(void)
{
    static const char *const elsewhere[] = {"..", ".", "a/b", "/etc/passwd"};
    print("# ways out of it\n");
    for (u32 i = 0; i < LENGTH(elsewhere); i++) {
        check_eq("  a walk elsewhere", walk(0, 5, elsewhere[i]), ENOENT);
        check_eq("  a file elsewhere", walk(0, 5, "") | create(5, elsewhere[i]), ENOENT);
        check_eq("  remove one elsewhere", unlink(0, elsewhere[i]), ENOENT);
        check_eq("  let go", clunk(5), 0);
    }
    begin(TWALK, 2), put32(0), put32(5), put16(17);
    for (u32 i = 0; i < 17; i++)
        put_text("x");
    check_eq("  a walk of 17 steps", ask(), EINVAL);
    begin(TWALK, 2), put32(0), put32(5), put16(0xffff);
    check_eq("  a walk of 65,535", ask(), EINVAL);
    begin(TSYMLINK, 2), put32(0), put_text("up"), put_text("../secret"), put32(0);
    check_eq("  a link to the outside", ask(), 0);
    check_eq("  is followed by nobody", walk(0, 5, "up") | open(5, 0) ? error != 0 : 0, 1);
    clunk(5);
    check_eq("  not the host's either", walk(0, 5, "escape") | open(5, 0) ? error != 0 : 0, 1);
    clunk(5);
    begin(TMKNOD, 2), put32(0), put_text("null"), put32(0020666), put32(1), put32(3), put32(0);
    check_eq("  a device", ask(), EPERM);
    begin(TLCREATE, 2), put32(0), put_text("set-uid"), put32(1), put32(04777), put32(0);
    check_eq("  a file that is set-user-ID", ask(), 0);
    check_eq("  (the folder's fid is that file's now)", clunk(0) | attach(0), 0);
}

static void nonsense(void)
{
    print("# nonsense\n");
    check_eq("  a fid that is none", read(77, 0, 1), EBADF);
    check_eq("  no fid", walk(0, NOFID, ""), EBADF);
    check_eq("  a fid that is in use", walk(0, 3, "") | walk(0, 3, ""), EBADF);
    check_eq("  a type that there is not", (begin(250, 1), ask()), EOPNOTSUPP);
    check_eq("  a message that is too short", (begin(TREAD, 1), put16(0), ask()), EINVAL);
    check_eq("  one that is too long", (begin(TCLUNK, 1), put32(3), put8(0), ask()), EINVAL);
    begin(TWRITE, 1), put32(3), put64(0), put32(0xffffffff);
    check_eq("  data of 4 GiB that do not come", ask(), EINVAL);
    begin(TWALK, 1), put32(0), put32(6), put16(1), put16(0xffff), put8('x');
    check_eq("  a name of 64 KiB that does not come", ask(), EINVAL);
    check_eq("  a read at the end of all offsets", walk(0, 6, "greeting") | open(6, 0), 0);
    read(6, ~0ul, 0xffffffff);
    check_eq("  is answered", answer[4] == RLERROR || !number(7), 1);
    begin(TFLUSH, 9), put16(9);
    check_eq("  a flush of itself", ask(), 0);
    long made = 0;
    for (u32 fid = 1000; fid < 1500; fid++)
        made |= walk(0, fid, "");
    for (u32 fid = 1000; fid < 1500; fid++)
        made |= clunk(fid);
    check_eq("  500 fids", made, 0);
    u32 before = ring->in_prod;
    length = 0;
    for (u16 tag = 0; tag < 200; tag++)
        put32(11), put8(TCLUNK), put16(tag), put32(88);
    bool all = send(request, length, HALF);
    for (u32 i = 0; all && i < 200; i++)
        all = receive() && answer[4] == RLERROR;
    check(all && ring->in_prod - before == 200 * 11, "  200 refusals for one event");
}

static void read_only(void)
{
    print("# a folder that is read-only\n");
    connect(1);
    check_eq("  a session", version(64 << 10) | attach(0), 0);
    check_eq("  a file in it", walk(0, 1, "greeting") | open(1, 0) | read(1, 0, 5), 0);
    check_eq("  opened to be written", walk(0, 2, "greeting") | open(2, 1), EROFS);
    check_eq("  emptied", open(2, 01000), EROFS);
    check_eq("  written", write(1, 0, (const u8 *)"x", 1), EROFS);
    check_eq("  made", create(0, "new"), EROFS);
    check_eq("  removed", unlink(0, "greeting"), EROFS);
    begin(TMKDIR, 1), put32(0), put_text("d"), put32(0755), put32(0);
    check_eq("  a directory", ask(), EROFS);
    close();
}

static void lie(u32 number, const char *what)
{
    print("# %s\n", what);
    connect(number);
    check_eq("  it works", version(64 << 10) | attach(0), 0);
    switch (number) {
    case 2:
        ring->out_prod = ring->out_cons + HALF + 1;
        break;
    case 3:
        length = 0, put32(6), put32(0);
        send(request, length, HALF);
        break;
    case 4:
        length = 0, put32(0xffffffff), put32(0);
        send(request, length, HALF);
        break;
    case 5:
        ring->in_cons = ring->in_prod + 1;
        begin(TGETATTR, 1), put32(0), put64(1), end();
        send(request, length, HALF);
        break;
    case 6:
        begin(TGETATTR, 1), put32(0), put64(1), end();
        memcpy(request + length, request, length);
        send(request, 2 * length, HALF);
        break;
    case 7:
        begin(TVERSION, 1), put32(8192), put_text("9P2000.L"), end();
        send(request, length, HALF);
        break;
    }
    evtchn_send(device.port);
    closes();
}

static void rings_that_are_none(void)
{
    print("# a ring of no size, one that is too large\n");
    find(8);
    ring->order = 0;
    say_where_it_is();
    closes();
    find(9);
    ring->order = 31;
    say_where_it_is();
    closes();
    print("# a ring in a page table\n");
    find(10);
    device.ring_ref = TABLE_REF;
    say_where_it_is();
    closes();
    find(11);
    ring->refs[3] = TABLE_REF;
    say_where_it_is();
    closes();
}

/* Messages of every kind with fields that are almost right, and other bytes in the ring meanwhile. */
static void fuzz(u64 count)
{
    static const u8 kinds[] = {TSTATFS, TLOPEN, TLCREATE, TSYMLINK, TMKNOD, 20, TREADLINK, TGETATTR, 26, 30, 32, 40, 50, 52,
                               54, 70, TMKDIR, 74, TUNLINKAT, TATTACH, TFLUSH, TWALK, TREAD, TWRITE, TCLUNK, 122};
    print("# %lu random messages\n", count);
    random_seed(option_value("seed", 1));
    connect(0);
    check_eq("  a session", version(64 << 10) | attach(0), 0);
    for (u64 done = 0; done < count; done++) {
        u64 r = next();
        begin(r % 64 ? kinds[(r >> 8) % LENGTH(kinds)] : (u8)(r >> 16), 1);
        if (request[4] == TVERSION)
            request[4] = TCLUNK;
        put32((u32)below(4));
        u32 parts = (u32)below(8);
        for (u32 i = 0; i < parts; i++) {
            r = next();
            switch (r % 5) {
            case 0: put32((u32)(r >> 8) % 4); break;
            case 1: put64(r >> 40 & (below(2) ? ~0ul : 7)); break;
            case 2: put_text((r >> 8) % 2 ? "x" : "greeting"); break;
            case 3: put16((u16)(r >> 8) % 4); break;
            default: put8((u8)(r >> 8)); break;
            }
        }
        if (ask() < 0) {
            check(false, "  every message is answered");
            return;
        }
        for (u32 at = 0; at < 16; at++)
            data[HALF + below(HALF)] = (u8)next();
    }
    check(true, "  every message is answered");
    check_eq("  a session after all that", version(64 << 10) | attach(0), 0);
    check_eq("  of the folder", walk(0, 1, ""), 0);
    close();
}

int main(void)
{
    events_quiet();
    grants_open();
    grant_to(TABLE_REF, 0, va_to_mfn((void *)start_info->pt_base), 0);
    u64 count = option_value("fuzz", 0);
    if (count) {
        fuzz(count);
        return 0;
    }
    use();
    leave();
    nonsense();
    close();
    read_only();
    lie(2, "a producer that is ahead");
    lie(3, "a message of 6 bytes");
    lie(4, "a message of 4 GiB");
    lie(5, "a consumer that is ahead");
    lie(6, "a tag twice");
    lie(7, "a session with a tag");
    rings_that_are_none();
    print("# after all that\n");
    connect(12);
    check_eq("another folder works", version(64 << 10) | attach(0) | walk(0, 1, "greeting"), 0);
    close();
    return 0;
}
