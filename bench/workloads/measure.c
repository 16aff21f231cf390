#include "measure.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { MOST_BATCHES = 21, FEWEST_BATCHES = 1, BATCHES_IN_BUDGET = 8 };

double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

void die(const char *what)
{
    perror(what);
    exit(1);
}

long must(long result, const char *what)
{
    if (result < 0)
        die(what);
    return result;
}

int fork_child(void)
{
    int pid = must(fork(), "fork");
    if (pid == 0)
        prctl(PR_SET_PDEATHSIG, SIGKILL);
    return pid;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, int count)
{
    qsort(values, count, sizeof *values, ascending);
    return count % 2 ? values[count / 2] : (values[count / 2 - 1] + values[count / 2]) / 2;
}

void measure(const struct row *row, double budget)
{
    double started, begin, per_operation[MOST_BATCHES];
    double batch_seconds = budget / BATCHES_IN_BUDGET;
    long count = row->at_least ? row->at_least : 1, operations = 0;
    int batches = 0;

    if (row->prepare)
        row->prepare(row);

    /* Warm-up: once for the page faults of a first time, then to find how many operations fill a batch. Wall-clock
     * time decides, because a row may spend much of it on work that it leaves out of the result. */
    started = now();
    row->run(row, count);
    begin = now();
    for (;;) {
        double start = now();
        row->run(row, count);
        operations += count;
        if (now() - start >= batch_seconds / 2)
            break;
        count *= 2;
    }

    while (batches < FEWEST_BATCHES || (batches < MOST_BATCHES && now() - begin < budget)) {
        per_operation[batches++] = row->run(row, count) / count;
        operations += count;
    }

    double seconds = median(per_operation, batches);
    double value = row->kind == LATENCY ? seconds * row->scale : row->scale / seconds;
    printf("@row %s %.6g %s %ld %.3f\n", row->name, value, row->unit, operations, now() - started);
    fflush(stdout);
}
