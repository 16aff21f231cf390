/* Virtual memory: the last columns of the paper's table 5, and copy-on-write. */
#define _GNU_SOURCE
#include "rows.h"

#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, CHUNK_PAGES = 256, MAP_BYTES = 64 << 20 };

static char *map_anonymous(size_t bytes)
{
    char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        die("mmap");
    madvise(memory, bytes, MADV_NOHUGEPAGE); /* one fault a page, on every kernel configuration */
    return memory;
}

/* 64 MB that is never touched: the cost of the mapping itself. */
static double map_unmap(const struct row *row, long count)
{
    double start = now();
    (void)row;
    while (count--) {
        char *memory = mmap(NULL, MAP_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED)
            die("mmap");
        munmap(memory, MAP_BYTES);
    }
    return now() - start;
}

/* The first write to each page of fresh anonymous memory. */
static double page_fault(const struct row *row, long count)
{
    double seconds = 0;
    (void)row;
    for (long pages; count > 0; count -= pages) {
        pages = count < CHUNK_PAGES ? count : CHUNK_PAGES;
        volatile char *memory = map_anonymous(CHUNK_PAGES * PAGE);
        double start = now();
        for (long page = 0; page < pages; page++)
            memory[page * PAGE] = 1;
        seconds += now() - start;
        munmap((void *)memory, CHUNK_PAGES * PAGE);
    }
    return seconds;
}

/* The first write, in a child, to each page that it shares with its parent. */
static double copy_on_write_fault(const struct row *row, long count)
{
    volatile char *memory = map_anonymous(CHUNK_PAGES * PAGE);
    double *seconds = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    (void)row;
    if (seconds == MAP_FAILED)
        die("mmap");
    memset((void *)memory, 1, CHUNK_PAGES * PAGE);
    for (long pages; count > 0; count -= pages) {
        pages = count < CHUNK_PAGES ? count : CHUNK_PAGES;
        int status, pid = must(fork(), "fork");
        if (pid == 0) {
            double start = now();
            for (long page = 0; page < pages; page++)
                memory[page * PAGE] = 2;
            *seconds += now() - start;
            _exit(0);
        }
        must(waitpid(pid, &status, 0), "waitpid");
        if (status != 0)
            die("copy_on_write_fault: the child failed");
    }
    double total = *seconds;
    munmap(seconds, PAGE);
    munmap((void *)memory, CHUNK_PAGES * PAGE);
    return total;
}

const struct row memory_rows[] = {
    {"mmap_munmap", "us", LATENCY, 1e6, map_unmap, NULL, 0, 0, 0},
    {"page_fault", "us", LATENCY, 1e6, page_fault, NULL, 0, 0, CHUNK_PAGES},
    {"cow_fault", "us", LATENCY, 1e6, copy_on_write_fault, NULL, 0, 0, CHUNK_PAGES},
    {0},
};
