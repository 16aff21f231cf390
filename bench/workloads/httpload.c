/*
 * httpload [-b SECONDS] NAME PORT PATH
 *
 * Requests a second that a server on this machine answers: one client, a new connection for every
 * request, the whole answer read and its status and length checked.
 */
#include "measure.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static struct sockaddr_in server = {.sin_family = AF_INET};
static char request[512];
static long answer_length;

/* One request; the number of bytes in its answer. */
static long fetch(void)
{
    char answer[8192];
    long total = 0, length;
    int fd = must(socket(AF_INET, SOCK_STREAM, 0), "socket");

    must(connect(fd, (void *)&server, sizeof server), "connect to the server");
    must(write(fd, request, strlen(request)), "send a request");
    while ((length = must(read(fd, answer, sizeof answer), "read an answer")) > 0) {
        if (total == 0 && (length < 12 || memcmp(answer + 8, " 200", 4) != 0)) {
            fprintf(stderr, "httpload: the server answered '%.*s'\n", (int)(length < 40 ? length : 40), answer);
            exit(1);
        }
        total += length;
    }
    close(fd);
    return total;
}

static void wait_for_server(const struct row *row)
{
    (void)row;
    for (int tries = 0; tries < 1000; tries++) {
        int fd = must(socket(AF_INET, SOCK_STREAM, 0), "socket");
        int refused = connect(fd, (void *)&server, sizeof server);
        close(fd);
        if (!refused) {
            answer_length = fetch();
            return;
        }
        usleep(20000);
    }
    die("the server does not answer");
}

static double fetch_many(const struct row *row, long count)
{
    double start = now();
    (void)row;
    while (count--)
        if (fetch() != answer_length) {
            fprintf(stderr, "httpload: answers differ in length\n");
            exit(1);
        }
    return now() - start;
}

int main(int argc, char **argv)
{
    double budget = 2;
    int option;

    while ((option = getopt(argc, argv, "b:")) != -1)
        if (option != 'b' || (budget = atof(optarg)) <= 0)
            argc = 0;
    if (argc - optind != 3) {
        fprintf(stderr, "usage: httpload [-b SECONDS] NAME PORT PATH\n");
        return 2;
    }
    server.sin_port = htons(atoi(argv[optind + 1]));
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    snprintf(request, sizeof request, "GET %s HTTP/1.0\r\nHost: localhost\r\n\r\n", argv[optind + 2]);
    measure(&(struct row){argv[optind], "req/s", RATE, 1, fetch_many, wait_for_server, 0, 0, 0}, budget);
    return 0;
}
