/*
 * The console ring (public io/console.h): one page shared with dom0's console back-end. The producer
 * index is ours; an event tells the other end; when the ring is full we yield until it was read.
 */
#include <stdarg.h>

#include "guest.h"

#define DRAIN_YIELDS 5000000 /* give up on a console that nobody reads, after many seconds */

static struct console_ring *ring(void)
{
    static struct console_ring *found;
    if (!found)
        found = pfn_to_va(mfn_to_pfn(start_info->console_mfn));
    return found;
}

static void notify(void)
{
    u32 port = start_info->console_evtchn;
    HYPERCALL(HC_event_channel_op, EVTCHNOP_send, &port);
}

static void wait_for_room(struct console_ring *r, u32 most_unread)
{
    for (long i = 0; i < DRAIN_YIELDS; i++) {
        if (r->out_prod - *(volatile u32 *)&r->out_cons <= most_unread)
            return;
        HYPERCALL(HC_sched_op, SCHEDOP_yield, 0);
    }
}

void console_write(const char *text, u64 length)
{
    struct console_ring *r = ring();
    for (u64 i = 0; i < length; i++) {
        if (r->out_prod - *(volatile u32 *)&r->out_cons == sizeof r->out) {
            notify();
            wait_for_room(r, sizeof r->out / 2);
        }
        r->out[r->out_prod % sizeof r->out] = text[i];
        barrier(); /* x86 keeps stores in order: only the compiler must not move the index up */
        *(volatile u32 *)&r->out_prod = r->out_prod + 1;
    }
    notify();
}

void console_drain(void)
{
    notify();
    wait_for_room(ring(), 0);
}

struct line {
    char text[256];
    u64 length;
};

static void put(struct line *line, char c)
{
    if (line->length < sizeof line->text)
        line->text[line->length++] = c;
}

static void put_number(struct line *line, u64 value, unsigned base)
{
    char digits[24];
    int n = 0;
    do
        digits[n++] = "0123456789abcdef"[value % base];
    while (value /= base);
    while (n)
        put(line, digits[--n]);
}

void print(const char *format, ...)
{
    struct line line = {.length = 0};
    va_list args;
    va_start(args, format);
    for (; *format; format++) {
        if (*format != '%') {
            put(&line, *format);
            continue;
        }
        bool wide = *++format == 'l';
        if (wide)
            format++;
        if (*format == 's') {
            for (const char *s = va_arg(args, const char *); *s; s++)
                put(&line, *s);
        } else if (*format == 'c') {
            put(&line, (char)va_arg(args, int));
        } else if (*format == 'd') {
            long value = wide ? va_arg(args, long) : va_arg(args, int);
            if (value < 0)
                put(&line, '-');
            put_number(&line, value < 0 ? -(u64)value : (u64)value, 10);
        } else {
            u64 value = wide ? va_arg(args, u64) : va_arg(args, u32);
            put_number(&line, value, *format == 'x' ? 16 : 10);
        }
    }
    va_end(args);
    console_write(line.text, line.length);
}
