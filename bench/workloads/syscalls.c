/* System calls and signals: the paper's table 3. */
#define _GNU_SOURCE
#include "rows.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

static double null_syscall(const struct row *row, long count)
{
    double start = now();
    (void)row;
    while (count--)
        syscall(SYS_getppid); /* glibc caches getpid, never this */
    return now() - start;
}

static int zero_fd, null_fd;

static void open_devices(const struct row *row)
{
    (void)row;
    zero_fd = must(open("/dev/zero", O_RDONLY), "/dev/zero");
    null_fd = must(open("/dev/null", O_WRONLY), "/dev/null");
}

static double read_zero(const struct row *row, long count)
{
    char byte;
    double start = now();
    (void)row;
    while (count--)
        must(read(zero_fd, &byte, 1), "read /dev/zero");
    return now() - start;
}

static double write_null(const struct row *row, long count)
{
    double start = now();
    (void)row;
    while (count--)
        must(write(null_fd, "x", 1), "write /dev/null");
    return now() - start;
}

static double stat_file(const struct row *row, long count)
{
    struct stat status;
    double start = now();
    (void)row;
    while (count--)
        must(stat(HELLO, &status), "stat " HELLO);
    return now() - start;
}

static double open_close(const struct row *row, long count)
{
    double start = now();
    (void)row;
    while (count--)
        close(must(open(HELLO, O_RDONLY), "open " HELLO));
    return now() - start;
}

/* --- select on 100 TCP sockets, as lmbench's lat_select has it ------------------------------------ */

enum { SELECT_SOCKETS = 100 };
static fd_set selected;
static int highest_fd;

static void open_sockets(const struct row *row)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    int listener = must(socket(AF_INET, SOCK_STREAM, 0), "socket");
    int fd = must(socket(AF_INET, SOCK_STREAM, 0), "socket");

    (void)row;
    must(bind(listener, (void *)&address, sizeof address), "bind");
    must(listen(listener, 1), "listen");
    must(getsockname(listener, (void *)&address, &length), "getsockname");
    must(connect(fd, (void *)&address, sizeof address), "connect to 127.0.0.1 (is lo up?)");
    FD_ZERO(&selected);
    for (int i = 0; i < SELECT_SOCKETS; i++) {
        highest_fd = must(dup(fd), "dup");
        FD_SET(highest_fd, &selected);
    }
}

static double select_tcp(const struct row *row, long count)
{
    double start = now();
    (void)row;
    while (count--) {
        fd_set reading = selected;
        struct timeval none = {0, 0};
        must(select(highest_fd + 1, &reading, NULL, NULL, &none), "select");
    }
    return now() - start;
}

/* --- signals -------------------------------------------------------------------------------------- */

static volatile long caught;

static void on_signal(int number)
{
    (void)number;
    caught++;
}

static double signal_install(const struct row *row, long count)
{
    struct sigaction action = {.sa_handler = on_signal};
    double start = now();
    (void)row;
    while (count--)
        sigaction(SIGUSR1, &action, NULL);
    return now() - start;
}

static void catch_usr1(const struct row *row)
{
    struct sigaction action = {.sa_handler = on_signal};
    (void)row;
    must(sigaction(SIGUSR1, &action, NULL), "sigaction");
}

static double signal_handle(const struct row *row, long count)
{
    long before = caught;
    int pid = getpid();
    double start = now();
    (void)row;
    for (long i = 0; i < count; i++)
        kill(pid, SIGUSR1);
    double seconds = now() - start;
    if (caught - before != count)
        die("signal_handle: signals were lost");
    return seconds;
}

/* --- a write to a read-only page, delivered as SIGSEGV --------------------------------------------- */

static char *protected_page;

static void skip_store(int number, siginfo_t *info, void *context)
{
    (void)number, (void)info;
    caught++;
    ((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP] += 3; /* the length of the store below */
}

static void protect_page(const struct row *row)
{
    struct sigaction action = {.sa_sigaction = skip_store, .sa_flags = SA_SIGINFO};
    (void)row;
    protected_page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (protected_page == MAP_FAILED)
        die("mmap");
    protected_page[0] = 1;
    must(mprotect(protected_page, 4096, PROT_READ), "mprotect");
    must(sigaction(SIGSEGV, &action, NULL), "sigaction");
}

static double protection_fault(const struct row *row, long count)
{
    long before = caught;
    double start = now();
    (void)row;
    for (long i = 0; i < count; i++)
        __asm__ volatile(".byte 0xc6, 0x00, 0x00" : : "a"(protected_page) : "memory"); /* movb $0,(%rax) */
    double seconds = now() - start;
    if (caught - before != count)
        die("protection_fault: faults were lost");
    return seconds;
}

const struct row syscall_rows[] = {
    {"null_syscall", "us", LATENCY, 1e6, null_syscall, NULL, 0, 0, 0},
    {"read_zero", "us", LATENCY, 1e6, read_zero, open_devices, 0, 0, 0},
    {"write_null", "us", LATENCY, 1e6, write_null, open_devices, 0, 0, 0},
    {"stat", "us", LATENCY, 1e6, stat_file, NULL, 0, 0, 0},
    {"open_close", "us", LATENCY, 1e6, open_close, NULL, 0, 0, 0},
    {"select_tcp", "us", LATENCY, 1e6, select_tcp, open_sockets, 0, 0, 0},
    {"signal_install", "us", LATENCY, 1e6, signal_install, NULL, 0, 0, 0},
    {"signal_handle", "us", LATENCY, 1e6, signal_handle, catch_usr1, 0, 0, 0},
    {"protection_fault", "us", LATENCY, 1e6, protection_fault, protect_page, 0, 0, 0},
    {0},
};
