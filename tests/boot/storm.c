/* What breaks when vCPUs come and go: threads that hand each other a futex, processes that hand each other a pipe's
   byte, forks, and checksums whose results are known. Runs until the file /stop exists, at least one round of each;
   prints how many rounds each did, and ends with 1 if any was wrong. */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define SUM_BYTES (256 << 10)
#define BURST 100
enum { SUM, FUTEX, PIPE, FORK, KINDS };

static volatile long *done, *wrong;

static int stopped(void) { return access("/stop", F_OK) == 0; }

static uint64_t fnv(const unsigned char *data, size_t size) {
    uint64_t hash = 14695981039346656037u;
    while (size--) hash = (hash ^ *data++) * 1099511628211u;
    return hash;
}

static void sums(int seed) {
    unsigned char *data = malloc(SUM_BYTES);
    for (int i = 0; i < SUM_BYTES; i++) data[i] = (unsigned char)(i * seed >> 3);
    uint64_t first = fnv(data, SUM_BYTES);
    do {
        if (fnv(data, SUM_BYTES) != first) *wrong = SUM + 1;
        __sync_fetch_and_add(&done[SUM], 1);
    } while (!stopped());
}

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static long turn, stop_at = -1;

static void *player(void *me) {
    long mine = (long)me;
    pthread_mutex_lock(&mutex);
    while (stop_at < 0 || turn < stop_at) {
        if (turn % 3 == mine) {
            turn++;
            if (mine == 0 && turn > BURST && stop_at < 0 && stopped()) stop_at = turn;
            pthread_cond_broadcast(&changed);
        } else {
            pthread_cond_wait(&changed, &mutex);
        }
    }
    pthread_mutex_unlock(&mutex);
    return NULL;
}

static void futexes(void) {
    pthread_t threads[3];
    for (long i = 0; i < 3; i++)
        if (pthread_create(&threads[i], NULL, player, (void *)i)) *wrong = FUTEX + 1;
    for (int i = 0; i < 3; i++) pthread_join(threads[i], NULL);
    if (turn != stop_at) *wrong = FUTEX + 1;
    done[FUTEX] += turn;
}

static void pipes(void) {
    int there[2], back[2];
    unsigned char byte = 0, answer;
    if (pipe(there) || pipe(back)) exit(9);
    if (!fork()) {
        close(there[1]);
        while (read(there[0], &byte, 1) == 1) {
            byte ^= 0x5a;
            if (write(back[1], &byte, 1) != 1) break;
        }
        _exit(0);
    }
    do {
        for (int i = 0; i < BURST; i++) {
            byte = (unsigned char)i;
            if (write(there[1], &byte, 1) != 1 || read(back[0], &answer, 1) != 1 || answer != (byte ^ 0x5a))
                *wrong = PIPE + 1;
            done[PIPE]++;
        }
    } while (!stopped());
    close(there[1]);
    wait(NULL);
}

static void forks(void) {
    do {
        pid_t children[6];
        int status;
        for (int i = 0; i < 6; i++)
            if (!(children[i] = fork())) _exit(40 + i);
        for (int i = 0; i < 6; i++)
            if (waitpid(children[i], &status, 0) != children[i] || WEXITSTATUS(status) != 40 + i) *wrong = FORK + 1;
        done[FORK] += 6;
    } while (!stopped());
}

int main(void) {
    done = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    wrong = done + KINDS;
    pid_t workers[5];
    for (int i = 0; i < 5; i++) {
        if ((workers[i] = fork())) continue;
        if (i < 2) sums(i + 3);
        if (i == 2) futexes();
        if (i == 3) pipes();
        if (i == 4) forks();
        exit(0);
    }
    for (int i = 0, status; i < 5; i++)
        if (waitpid(workers[i], &status, 0) != workers[i] || status) *wrong = 9;
    printf("sums %ld futex %ld pipe %ld fork %ld wrong %ld\n", done[SUM], done[FUTEX], done[PIPE], done[FORK], *wrong);
    return *wrong != 0;
}
