#include "xenstore.h"

#include "events.h"

#define XS_READ 2
#define XS_WRITE 11
#define XS_RM 13
#define XS_WATCH_EVENT 15
#define XS_ERROR 16

volatile struct xenstore_ring *xenstore_ring(void)
{
    static struct xenstore_ring *found;
    if (!found)
        found = pfn_to_va(mfn_to_pfn(start_info->store_mfn));
    return found;
}

void xenstore_wait(void)
{
    evtchn_send(start_info->store_evtchn);
    evtchn_wait(start_info->store_evtchn, 0);
}

static void put(const void *data, u64 length)
{
    volatile struct xenstore_ring *r = xenstore_ring();
    for (u64 i = 0; i < length; i++) {
        while (r->req_prod - r->req_cons == sizeof r->req)
            xenstore_wait();
        r->req[r->req_prod % sizeof r->req] = ((const char *)data)[i];
        barrier();
        r->req_prod = r->req_prod + 1;
    }
}

static void get(char *data, u64 length, u64 size)
{
    volatile struct xenstore_ring *r = xenstore_ring();
    for (u64 i = 0; i < length; i++) {
        while (r->rsp_prod == r->rsp_cons)
            xenstore_wait();
        char byte = r->rsp[r->rsp_cons % sizeof r->rsp];
        if (i < size)
            data[i] = byte;
        barrier();
        r->rsp_cons = r->rsp_cons + 1;
    }
}

static long request(u32 type, const char *path, const char *data, u64 length, char *answer, u64 size)
{
    struct xenstore_message head = {type, 7, 0, (u32)(strlen(path) + 1 + length)};
    put(&head, sizeof head);
    put(path, strlen(path) + 1);
    put(data, length);
    evtchn_send(start_info->store_evtchn);
    do {
        get((char *)&head, sizeof head, sizeof head);
        get(answer, head.length, head.type == XS_WATCH_EVENT ? 0 : size);
    } while (head.type == XS_WATCH_EVENT);
    return head.type == XS_ERROR ? -1 : (long)head.length;
}

long xs_read(const char *path, char *value, u64 size)
{
    long length = request(XS_READ, path, NULL, 0, value, size - 1);
    value[length < 0 ? 0 : (u64)length < size ? (u64)length : size - 1] = 0;
    return length;
}

long xs_write(const char *path, const char *value, u64 length)
{
    char answer[8];
    return request(XS_WRITE, path, value, length, answer, sizeof answer) < 0 ? -1 : 0;
}

long xs_rm(const char *path)
{
    char answer[8];
    return request(XS_RM, path, NULL, 0, answer, sizeof answer) < 0 ? -1 : 0;
}

void text_append(char *to, const char *what) { memcpy(to + strlen(to), what, strlen(what) + 1); }

void text_append_number(char *to, u64 number)
{
    char digits[24];
    u64 at = sizeof digits - 1;
    digits[at] = 0;
    do
        digits[--at] = (char)('0' + number % 10);
    while (number /= 10);
    text_append(to, digits + at);
}

u64 text_number(const char *text)
{
    u64 number = 0;
    if (!*text)
        return ~0ul;
    for (; *text; text++) {
        if (*text < '0' || *text > '9')
            return ~0ul;
        number = number * 10 + (u64)(*text - '0');
    }
    return number;
}
