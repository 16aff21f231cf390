/* Checks, reported line by line on the console. */
#include "guest.h"

static int passed, failed;

void check(bool right, const char *what)
{
    if (right)
        print("ok %d - %s\n", ++passed + failed, what);
    else
        print("not ok %d - %s\n", passed + ++failed, what);
}

static void print_value(long value)
{
    if (value > -4096 && value < 4096)
        print("%ld", value);
    else
        print("0x%lx", value);
}

void check_eq(const char *what, long got, long expected)
{
    if (got == expected) {
        check(true, what);
        return;
    }
    print("not ok %d - %s: got ", passed + ++failed, what);
    print_value(got);
    print(" expected ");
    print_value(expected);
    print("\n");
}

void report(void)
{
    print("done PASSED=%d FAILED=%d\n", passed, failed);
}
