/* The tables of rows, one for each part of the system; each ends with a row without a name. */
#ifndef ROWS_H
#define ROWS_H

#include "measure.h"

extern const struct row syscall_rows[], process_rows[], memory_rows[], file_rows[], ipc_rows[], network_rows[],
    compute_rows[];

#define HELLO "/bench/hello" /* the smallest static program, for exec, stat and open */

#endif
