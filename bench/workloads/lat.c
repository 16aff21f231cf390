/*
 * lat [-b SECONDS] ROW ...     measure these rows, one after the other
 * lat -l                       list the rows: name and unit
 *
 * Latencies and rates in the manner of lmbench (McVoy and Staelin, USENIX 1996), which the Xen paper's
 * tables 3 to 5 are made with, and four computations.
 */
#include "rows.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const struct row *const tables[] = {
    syscall_rows, process_rows, memory_rows, file_rows, ipc_rows, network_rows, compute_rows,
};

static const struct row *find(const char *name)
{
    for (unsigned table = 0; table < sizeof tables / sizeof *tables; table++)
        for (const struct row *row = tables[table]; row->name; row++)
            if (strcmp(row->name, name) == 0)
                return row;
    fprintf(stderr, "lat: no row is called '%s'; `lat -l` lists them\n", name);
    exit(2);
}

static void list(void)
{
    for (unsigned table = 0; table < sizeof tables / sizeof *tables; table++)
        for (const struct row *row = tables[table]; row->name; row++)
            printf("%s %s\n", row->name, row->unit);
}

int main(int argc, char **argv)
{
    double budget = 0.5;
    int option;

    while ((option = getopt(argc, argv, "b:l")) != -1) {
        if (option == 'l') {
            list();
            return 0;
        }
        if (option != 'b' || (budget = atof(optarg)) <= 0) {
            fprintf(stderr, "usage: lat [-b SECONDS] ROW ...\n       lat -l\n");
            return 2;
        }
    }
    for (; optind < argc; optind++)
        measure(find(argv[optind]), budget);
    return 0;
}
