/* Creating and deleting files in the root file system, a tmpfs: the first columns of the paper's table 5. */
#include "rows.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FILES = 64 }; /* created, then deleted */
static const char content[10 << 10];

static void change_to_scratch(const struct row *row)
{
    (void)row;
    mkdir("/tmp", 0777);
    mkdir("/tmp/files", 0777);
    must(chdir("/tmp/files"), "/tmp/files");
}

static void create(int number, int kilobytes)
{
    char name[16];
    snprintf(name, sizeof name, "f%d", number);
    int fd = must(open(name, O_CREAT | O_EXCL | O_WRONLY, 0666), "create a file");
    if (kilobytes && write(fd, content, kilobytes << 10) != kilobytes << 10)
        die("write a file");
    close(fd);
}

static void delete(int number)
{
    char name[16];
    snprintf(name, sizeof name, "f%d", number);
    must(unlink(name), "unlink");
}

/* Seconds for `count` creations and the same number of deletions. */
struct seconds {
    double creating, deleting;
};

static struct seconds create_and_delete(const struct row *row, long count)
{
    struct seconds spent = {0, 0};
    for (long files; count > 0; count -= files) {
        files = count < FILES ? count : FILES;
        double start = now();
        for (int i = 0; i < files; i++)
            create(i, row->kilobytes);
        double middle = now();
        for (int i = 0; i < files; i++)
            delete(i);
        spent.creating += middle - start;
        spent.deleting += now() - middle;
    }
    return spent;
}

static double file_create(const struct row *row, long count)
{
    return create_and_delete(row, count).creating;
}

static double file_delete(const struct row *row, long count)
{
    return create_and_delete(row, count).deleting;
}

const struct row file_rows[] = {
    {"create_0k", "us", LATENCY, 1e6, file_create, change_to_scratch, 0, 0, FILES},
    {"delete_0k", "us", LATENCY, 1e6, file_delete, change_to_scratch, 0, 0, FILES},
    {"create_10k", "us", LATENCY, 1e6, file_create, change_to_scratch, 0, 10, FILES},
    {"delete_10k", "us", LATENCY, 1e6, file_delete, change_to_scratch, 0, 10, FILES},
    {0},
};
