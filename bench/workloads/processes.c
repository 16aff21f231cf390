/* Creating processes: the last three columns of the paper's table 3. */
#include "rows.h"

#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

static void wait_for_success(int pid, const char *what)
{
    int status;
    must(waitpid(pid, &status, 0), "waitpid");
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
        die(what);
}

static double fork_exit(const struct row *row, long count)
{
    double start = now();
    (void)row;
    while (count--) {
        int pid = must(fork(), "fork");
        if (pid == 0)
            _exit(0);
        wait_for_success(pid, "fork_exit: the child failed");
    }
    return now() - start;
}

static double fork_exec(const struct row *row, long count)
{
    double start = now();
    (void)row;
    while (count--) {
        int pid = must(fork(), "fork");
        if (pid == 0) {
            execl(HELLO, HELLO, (char *)NULL);
            _exit(127);
        }
        wait_for_success(pid, "fork_exec: " HELLO " failed");
    }
    return now() - start;
}

static double fork_sh(const struct row *row, long count)
{
    double start = now();
    (void)row;
    while (count--) {
        int pid = must(fork(), "fork");
        if (pid == 0) {
            execl("/bin/sh", "sh", "-c", HELLO, (char *)NULL);
            _exit(127);
        }
        wait_for_success(pid, "fork_sh: sh -c " HELLO " failed");
    }
    return now() - start;
}

const struct row process_rows[] = {
    {"fork_exit", "us", LATENCY, 1e6, fork_exit, NULL, 0, 0, 0},
    {"fork_exec", "us", LATENCY, 1e6, fork_exec, NULL, 0, 0, 0},
    {"fork_sh", "us", LATENCY, 1e6, fork_sh, NULL, 0, 0, 0},
    {0},
};
