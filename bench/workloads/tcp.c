/*
 * TCP between two systems, no library:
 *
 *     tcp serve PORT                      takes connections, one after the other; each begins with a byte that says what for
 *     tcp send|receive|echo HOST PORT SECONDS
 *     tcp flood HOST PORT SECONDS         datagrams of 1,400 bytes, as many as go out, to nobody
 *
 * send, receive and echo print "RESULT amount seconds least median": bytes moved, or round trips of one byte; microseconds of one.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define CHUNK (256 << 10)
#define MAX_SAMPLES 1000000

static char data[CHUNK];
static double samples[MAX_SAMPLES];

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static void answer(int fd)
{
    char kind;
    if (read(fd, &kind, 1) != 1)
        return;
    if (kind == 'r') /* until the other side has had enough */
        while (send(fd, data, sizeof data, MSG_NOSIGNAL) > 0)
            ;
    else if (kind == 'e')
        while (read(fd, data, 1) == 1 && send(fd, data, 1, MSG_NOSIGNAL) == 1)
            ;
    else {
        unsigned long long total = 0;
        ssize_t got;
        while ((got = read(fd, data, sizeof data)) > 0)
            total += (unsigned long long)got;
        if (send(fd, &total, sizeof total, MSG_NOSIGNAL) < 0)
            perror("send");
    }
}

static void serve(unsigned short port)
{
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(port)};
    int listener = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&here, sizeof here) || listen(listener, 8))
        die("listen");
    printf("serving\n");
    fflush(stdout);
    for (;;) {
        int fd = accept(listener, NULL, NULL);
        if (fd < 0)
            die("accept");
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        answer(fd);
        close(fd);
    }
}

static int flood(const struct sockaddr_in *there, double limit)
{
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    unsigned long long sent = 0;
    for (double start = now(); now() - start < limit;)
        for (int i = 0; i < 100; i++)
            sent += sendto(fd, data, 1400, 0, (const struct sockaddr *)there, sizeof *there) == 1400;
    printf("FLOODED %llu\n", sent * 1400);
    return 0;
}

int main(int count, char **words)
{
    if (count == 3)
        serve((unsigned short)atoi(words[2]));
    if (count != 5)
        return 2;
    struct sockaddr_in there = {.sin_family = AF_INET, .sin_port = htons((unsigned short)atoi(words[3]))};
    inet_pton(AF_INET, words[2], &there.sin_addr);
    if (words[1][0] == 'f')
        return flood(&there, atof(words[4]));
    int fd = -1, on = 1;
    for (int attempt = 0; attempt < 100; attempt++) {
        fd = socket(AF_INET, SOCK_STREAM, 0);
        if (!connect(fd, (struct sockaddr *)&there, sizeof there))
            break;
        close(fd), fd = -1;
        usleep(100000);
    }
    if (fd < 0)
        die("connect");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    char kind = words[1][0];
    if (write(fd, &kind, 1) != 1)
        die("write");
    double start = now(), end = start, limit = atof(words[4]);
    unsigned long long amount = 0;
    long taken = 0;
    while (end - start < limit) {
        double began = end;
        ssize_t moved;
        if (kind == 's')
            moved = write(fd, data, sizeof data);
        else if (kind == 'r')
            moved = read(fd, data, sizeof data);
        else
            moved = write(fd, data, 1) == 1 ? read(fd, data, 1) : -1;
        if (moved <= 0)
            die("a connection");
        amount += (unsigned long long)moved;
        end = now();
        if (taken < MAX_SAMPLES)
            samples[taken++] = (end - began) * 1e6;
    }
    if (kind == 's') { /* what has arrived counts */
        shutdown(fd, SHUT_WR);
        if (read(fd, &amount, sizeof amount) != sizeof amount)
            die("the count");
        end = now();
    }
    qsort(samples, (size_t)taken, sizeof *samples, compare);
    printf("RESULT %llu %.6f %.1f %.1f\n", amount, end - start, samples[0], samples[taken / 2]);
    return 0;
}
