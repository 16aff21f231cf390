/*
 * Pipes and context switches: the paper's table 4.
 *
 * As in lmbench's lat_ctx, processes in a ring of pipes pass a token on; whoever holds it first sums an
 * array of its own.  What one process alone needs for as many pipes and sums is measured right after and
 * taken off, so that the switch remains, with the cache and TLB misses it causes.
 */
#include "rows.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int to_child[2], to_parent[2];

/* Pass on bytes until the writer has gone. */
static void echo(int from, int to)
{
    char byte;
    while (read(from, &byte, 1) == 1)
        must(write(to, &byte, 1), "write to a pipe");
    _exit(0);
}

static void start_echo(const struct row *row)
{
    (void)row;
    must(pipe(to_child), "pipe");
    must(pipe(to_parent), "pipe");
    if (fork_child() == 0)
        echo(to_child[0], to_parent[1]);
}

static double pipe_round_trip(const struct row *row, long count)
{
    char byte = 'x';
    double start = now();
    (void)row;
    while (count--) {
        must(write(to_child[1], &byte, 1), "write to a pipe");
        if (read(to_parent[0], &byte, 1) != 1)
            die("read from a pipe");
    }
    return now() - start;
}

/* --- the ring ------------------------------------------------------------------------------------- */

enum { MOST_PROCESSES = 16 };
static int ring[MOST_PROCESSES][2];
static int *array;
static size_t array_length;
static int own_pipe[2]; /* for hops without a switch */

static void sum_array(void)
{
    int sum = 0;
    for (size_t i = 0; i < array_length; i++)
        sum += array[i];
    *(volatile int *)&array[0] = sum;
}

/* Take the token from one pipe, work, and put it into another. Returns 0 when the ring has ended. */
static int hop(int from, int to)
{
    char token;
    if (read(from, &token, 1) != 1)
        return 0;
    sum_array();
    return write(to, &token, 1) == 1;
}

/* Seconds for so many hops of a token through a pipe of this process alone. */
static double hop_alone(long count)
{
    double start = now();
    while (count--)
        hop(own_pipe[0], own_pipe[1]);
    return now() - start;
}

static void allocate_array(int kilobytes)
{
    array_length = kilobytes * 1024 / sizeof *array;
    array = malloc(array_length * sizeof *array + sizeof *array);
    if (!array)
        die("malloc");
    memset(array, 1, array_length * sizeof *array + sizeof *array); /* pages of its own, not the parent's */
}

static void start_ring(const struct row *row)
{
    allocate_array(row->kilobytes);
    must(pipe(own_pipe), "pipe");
    must(write(own_pipe[1], "t", 1), "write to a pipe");
    for (int i = 0; i < row->processes; i++)
        must(pipe(ring[i]), "pipe");
    /* Process 0 is this one; process i reads from pipe i-1 and writes to pipe i. */
    for (int i = 1; i < row->processes; i++)
        if (fork_child() == 0) {
            allocate_array(row->kilobytes);
            while (hop(ring[i - 1][0], ring[i][1]))
                ;
            _exit(0);
        }
}

static double context_switch(const struct row *row, long count)
{
    int last = row->processes - 1;
    long rounds = (count + last) / row->processes, hops = rounds * row->processes;
    double start = now();

    for (long i = 0; i < rounds; i++) {
        must(write(ring[0][1], "t", 1), "write to a pipe");
        char token;
        if (read(ring[last][0], &token, 1) != 1)
            die("read from a pipe");
        sum_array();
    }
    double seconds = now() - start - hop_alone(hops);
    return seconds / hops * count; /* at least one round is made, even for fewer hops */
}

#define CONTEXT_SWITCH(P, K) {"ctx_" #P "p_" #K "k", "us", LATENCY, 1e6, context_switch, start_ring, P, K, 0}

const struct row ipc_rows[] = {
    {"pipe", "us", LATENCY, 1e6, pipe_round_trip, start_echo, 0, 0, 0},
    CONTEXT_SWITCH(2, 0),
    CONTEXT_SWITCH(2, 16),
    CONTEXT_SWITCH(2, 64),
    CONTEXT_SWITCH(8, 16),
    CONTEXT_SWITCH(8, 64),
    CONTEXT_SWITCH(16, 16),
    CONTEXT_SWITCH(16, 64),
    {0},
};
