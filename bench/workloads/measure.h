/*
 * How every row of the evaluation is measured.
 *
 * A row names one operation.  Its `run` performs the operation `count` times and says how many seconds
 * that took, leaving out whatever it must do in between but does not want measured.  measure() first
 * doubles the count until one batch is long enough for a coarse clock, then times batches until the
 * row's budget of wall-clock time is used up, and prints the median:
 *
 *     @row NAME VALUE UNIT OPERATIONS SECONDS
 *
 * OPERATIONS counts every operation performed, warm-up included, so that a virtual machine monitor's
 * trap counters can be divided by it; SECONDS is the whole time by the clock of the system under test,
 * which the program outside compares with its own clock.
 *
 * The doubling serves as warm-up.  A row takes about its budget on any system, unless one operation
 * alone takes longer; then it takes two operations, of which the second is the value.
 */
#ifndef MEASURE_H
#define MEASURE_H

enum kind {
    LATENCY, /* value = seconds per operation * scale */
    RATE,    /* value = operations per second * scale */
};

struct row {
    const char *name;
    const char *unit;
    enum kind kind;
    double scale;
    double (*run)(const struct row *row, long count);
    void (*prepare)(const struct row *row); /* once, before the first run; may be NULL */
    int processes;                          /* for the context-switch rows */
    int kilobytes;                          /* for the context-switch and file rows */
    int at_least;                           /* the smallest count: what one preparation is shared by; 0 means 1 */
};

/* Seconds by CLOCK_MONOTONIC. */
double now(void);

/* Measure one row within about `budget` seconds and print its line. */
void measure(const struct row *row, double budget);

/* Print what failed, with errno's text, and exit with status 1. */
void die(const char *what) __attribute__((noreturn));

/* Die when a system call has failed; else its result. */
long must(long result, const char *what);

/* fork(), with the child killed when its parent ends. */
int fork_child(void);

#endif
