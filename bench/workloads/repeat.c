/*
 * repeat [-b SECONDS] NAME PROGRAM [ARGUMENT ...]
 *
 * Measure a macro workload: run the program again and again within the budget, print the median time of
 * one run in milliseconds as the row NAME. The program's own output is not the row's and goes nowhere.
 */
#include "measure.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

static char **command;

static double run_command(const struct row *row, long count)
{
    double start = now();
    while (count--) {
        int status, pid = must(fork(), "fork");
        if (pid == 0) {
            dup2(must(open("/dev/null", O_WRONLY), "/dev/null"), STDOUT_FILENO);
            execv(command[0], command);
            die(command[0]);
        }
        must(waitpid(pid, &status, 0), "waitpid");
        if (status != 0) {
            fprintf(stderr, "repeat: %s failed (wait status 0x%x)\n", row->name, status);
            exit(1);
        }
    }
    return now() - start;
}

int main(int argc, char **argv)
{
    double budget = 2;
    int option;

    while ((option = getopt(argc, argv, "+b:")) != -1)
        if (option != 'b' || (budget = atof(optarg)) <= 0)
            argc = 0;
    if (argc - optind < 2) {
        fprintf(stderr, "usage: repeat [-b SECONDS] NAME PROGRAM [ARGUMENT ...]\n");
        return 2;
    }
    command = argv + optind + 1;
    measure(&(struct row){argv[optind], "ms", LATENCY, 1e3, run_command, NULL, 0, 0, 0}, budget);
    return 0;
}
