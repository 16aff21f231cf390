/* From the entry point to main() and on to a clean shutdown. */
#include "guest.h"

struct start_info *start_info;
u64 builder_stack;

static u8 shared_info_page[PAGE_SIZE] PAGE_ALIGNED;
struct shared_info *const shared_info = (struct shared_info *)shared_info_page;

void guest_start(void);

void guest_start(void)
{
    /* Present, writable, accessed, dirty. The page's own frame is simply no longer mapped here. */
    long status = HYPERCALL(HC_update_va_mapping, shared_info_page, start_info->shared_info | 0x63, UVMF_INVLPG);
    if (status)
        shut_down(SHUTDOWN_crash);
    main();
    report();
    shut_down(SHUTDOWN_poweroff);
}

void shut_down(unsigned reason)
{
    console_drain();
    HYPERCALL(HC_sched_op, SCHEDOP_shutdown, &reason);
    for (;;)
        __asm__ volatile("ud2");
}

static const char *find_word(const char *word, u64 length)
{
    const char *at = start_info->cmd_line;
    while (*at) {
        while (*at == ' ')
            at++;
        if (*at && memcmp(at, word, length) == 0)
            return at + length;
        while (*at && *at != ' ')
            at++;
    }
    return NULL;
}

bool option(const char *word)
{
    const char *end = find_word(word, strlen(word));
    return end && (*end == ' ' || *end == 0);
}

u64 option_value(const char *name, u64 otherwise)
{
    const char *at = find_word(name, strlen(name));
    if (!at || *at != '=')
        return otherwise;
    u64 value = 0;
    while (*++at >= '0' && *at <= '9')
        value = value * 10 + (u64)(*at - '0');
    return value;
}

u64 mfn_to_pfn(u64 mfn)
{
    for (u64 pfn = 0; pfn < start_info->nr_pages; pfn++)
        if (pfn_to_mfn(pfn) == mfn)
            return pfn;
    return ~0ul;
}

void *memset(void *to, int byte, u64 n)
{
    void *start = to;
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(n) : "a"(byte) : "memory");
    return start;
}

void *memcpy(void *to, const void *from, u64 n)
{
    void *start = to;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
    return start;
}

int memcmp(const void *a, const void *b, u64 n)
{
    const u8 *x = a, *y = b;
    for (u64 i = 0; i < n; i++)
        if (x[i] != y[i])
            return x[i] - y[i];
    return 0;
}

u64 strlen(const char *s)
{
    u64 n = 0;
    while (s[n])
        n++;
    return n;
}
