/* TCP over the loopback device: latency of one byte there and back, and bandwidth. */
#include "rows.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { CHUNK = 64 << 10, CHUNKS_A_MB = (1 << 20) / CHUNK };

static int connection; /* our end */
static char buffer[CHUNK];

/* Connect `connection` to a child that runs `serve` on the other end. */
static void connect_to_child(void (*serve)(int fd))
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    int one = 1, listener = must(socket(AF_INET, SOCK_STREAM, 0), "socket");

    must(bind(listener, (void *)&address, sizeof address), "bind");
    must(listen(listener, 1), "listen");
    must(getsockname(listener, (void *)&address, &length), "getsockname");
    if (fork_child() == 0) {
        int fd = must(accept(listener, NULL, NULL), "accept");
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        serve(fd);
        _exit(0);
    }
    connection = must(socket(AF_INET, SOCK_STREAM, 0), "socket");
    must(connect(connection, (void *)&address, sizeof address), "connect to 127.0.0.1 (is lo up?)");
    setsockopt(connection, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

static void echo(int fd)
{
    char byte;
    while (read(fd, &byte, 1) == 1)
        must(write(fd, &byte, 1), "write to a socket");
}

static void start_echo(const struct row *row)
{
    (void)row;
    connect_to_child(echo);
}

static double round_trip(const struct row *row, long count)
{
    char byte = 'x';
    double start = now();
    (void)row;
    while (count--) {
        must(write(connection, &byte, 1), "write to a socket");
        if (read(connection, &byte, 1) != 1)
            die("read from a socket");
    }
    return now() - start;
}

/* Acknowledge every megabyte with one byte. */
static void sink(int fd)
{
    long received = 0, length;
    while ((length = read(fd, buffer, sizeof buffer)) > 0)
        for (received += length; received >= 1 << 20; received -= 1 << 20)
            must(write(fd, "k", 1), "write to a socket");
}

static void start_sink(const struct row *row)
{
    (void)row;
    connect_to_child(sink);
}

static double send_megabytes(const struct row *row, long count)
{
    double start = now();
    (void)row;
    for (long sent = 0; sent < count * CHUNKS_A_MB; sent++)
        if (must(write(connection, buffer, CHUNK), "write to a socket") != CHUNK)
            die("short write to a socket");
    for (long acknowledged = 0, length; acknowledged < count; acknowledged += length)
        if ((length = read(connection, buffer, count - acknowledged < CHUNK ? count - acknowledged : CHUNK)) <= 0)
            die("read from a socket");
    return now() - start;
}

const struct row network_rows[] = {
    {"tcp_rtt", "us", LATENCY, 1e6, round_trip, start_echo, 0, 0, 0},
    {"tcp_bandwidth", "MB/s", RATE, 1.048576, send_megabytes, start_sink, 0, 0, 0},
    {0},
};
