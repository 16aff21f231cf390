/*
 * Requests to a block device, past the page cache, as many at a time as asked for (Linux AIO; no library):
 *
 *     disk DEVICE read|write|fsync BYTES DEPTH random|sequential SECONDS
 *
 * prints operations, seconds, and the least and the median time of one in microseconds. fsync: a write of BYTES and an
 * fsync each time. Nothing is kept of what a written device held.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAX_DEPTH 64
#define MAX_SAMPLES 1000000

static double samples[MAX_SAMPLES];
static long taken;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static uint64_t random_number(void)
{
    static uint64_t state = 88172645463325252ull;
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static void note(double seconds)
{
    if (taken < MAX_SAMPLES)
        samples[taken++] = seconds * 1e6;
}

int main(int count, char **words)
{
    if (count != 7)
        return 2;
    int writes = words[2][0] != 'r', syncs = words[2][0] == 'f', random = words[5][0] == 'r';
    size_t size = strtoul(words[3], NULL, 0), depth = strtoul(words[4], NULL, 0), next = 0;
    double limit = strtod(words[6], NULL);
    int fd = open(words[1], (writes ? O_RDWR : O_RDONLY) | O_DIRECT);
    if (fd < 0)
        die(words[1]);
    size_t blocks = (size_t)lseek(fd, 0, SEEK_END) / size;
    aio_context_t context = 0;
    struct iocb requests[MAX_DEPTH];
    double began[MAX_DEPTH];
    char *data;
    if (!blocks || depth > MAX_DEPTH || posix_memalign((void **)&data, 4096, size * depth))
        return 2;
    memset(data, 0x5a, size * depth);
    if (syscall(SYS_io_setup, MAX_DEPTH, &context))
        die("io_setup");
    double start = now(), end = start;
    long done = 0;
    if (syncs)
        while (end - start < limit) {
            double began = end;
            if (pwrite(fd, data, size, (off_t)(random_number() % blocks * size)) != (ssize_t)size || fdatasync(fd))
                die("fsync");
            end = now(), note(end - began), done++;
        }
    else {
        size_t free_slots[MAX_DEPTH], free_count = depth, flying = 0;
        for (size_t i = 0; i < depth; i++)
            free_slots[i] = i;
        while (flying || end - start < limit) {
            while (free_count && end - start < limit) {
                size_t slot = free_slots[--free_count];
                struct iocb *r = &requests[slot], *one = r;
                memset(r, 0, sizeof *r);
                r->aio_fildes = (uint32_t)fd;
                r->aio_lio_opcode = writes ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
                r->aio_buf = (uint64_t)(data + slot * size);
                r->aio_nbytes = size;
                r->aio_offset = (int64_t)((random ? random_number() % blocks : next++ % blocks) * size);
                r->aio_data = slot;
                began[slot] = now();
                if (syscall(SYS_io_submit, context, 1, &one) != 1)
                    die("io_submit");
                flying++;
            }
            struct io_event events[MAX_DEPTH];
            long got = syscall(SYS_io_getevents, context, 1, MAX_DEPTH, events, NULL);
            if (got < 0)
                die("io_getevents");
            end = now();
            for (long i = 0; i < got; i++) {
                if (events[i].res != (int64_t)size)
                    die("a request failed");
                note(end - began[events[i].data]);
                free_slots[free_count++] = events[i].data, flying--, done++;
            }
        }
    }
    qsort(samples, (size_t)taken, sizeof *samples, compare);
    printf("RESULT %ld %.6f %.1f %.1f\n", done, end - start, samples[0], samples[taken / 2]);
    return 0;
}
