/* Computations that stay in user mode. Each checks its own result, so that a wrong CPU is not a fast one. */
#include "rows.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- the sieve of Eratosthenes up to 8,000,000 ---------------------------------------------------- */

enum { SIEVE = 8000000, PRIMES_BELOW_SIEVE = 539777 };
static char composite[SIEVE];

static double sieve(const struct row *row, long count)
{
    double start = now();
    (void)row;
    while (count--) {
        int primes = 0;
        memset(composite, 0, sizeof composite);
        for (int i = 2; i < SIEVE; i++) {
            if (composite[i])
                continue;
            primes++;
            for (long multiple = (long)i * i; multiple < SIEVE; multiple += i)
                composite[multiple] = 1;
        }
        if (primes != PRIMES_BELOW_SIEVE)
            die("sieve: wrong number of primes");
    }
    return now() - start;
}

/* --- SHA-256 (FIPS 180-4), of one megabyte of zeros ----------------------------------------------- */

enum { SHA_BYTES = 1 << 20 };
static uint32_t round_constant[64], initial_state[8];
static unsigned char message[SHA_BYTES];

/* The digest's first word for a message of SHA_BYTES zeros, by another implementation. */
static const uint32_t expected_first_word = 0x30e14955;

static uint32_t fraction_bits(double root)
{
    return (uint32_t)((root - (long)root) * 4294967296.0);
}

static double cube_root(double x)
{
    double root = x;
    for (int i = 0; i < 60; i++)
        root -= (root * root * root - x) / (3 * root * root);
    return root;
}

static double square_root(double x)
{
    double root = x;
    for (int i = 0; i < 60; i++)
        root = (root + x / root) / 2;
    return root;
}

/* The constants are the fractions of the square and cube roots of the first primes. */
static void make_constants(const struct row *row)
{
    int found = 0;
    (void)row;
    for (int candidate = 2; found < 64; candidate++) {
        int divisor = 2;
        while (candidate % divisor)
            divisor++;
        if (divisor != candidate)
            continue;
        if (found < 8)
            initial_state[found] = fraction_bits(square_root(candidate));
        round_constant[found++] = fraction_bits(cube_root(candidate));
    }
}

static inline uint32_t rotate(uint32_t x, int n)
{
    return x >> n | x << (32 - n);
}

static void compress(uint32_t state[8], const unsigned char *block)
{
    uint32_t w[64], a = state[0], b = state[1], c = state[2], d = state[3];
    uint32_t e = state[4], f = state[5], g = state[6], h = state[7];

    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)block[4 * i] << 24 | block[4 * i + 1] << 16 | block[4 * i + 2] << 8 | block[4 * i + 3];
    for (int i = 16; i < 64; i++) {
        uint32_t s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
        uint32_t s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10;
        w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    for (int i = 0; i < 64; i++) {
        uint32_t s1 = rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25);
        uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + round_constant[i] + w[i];
        uint32_t s0 = rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22);
        uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
        h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    state[0] += a, state[1] += b, state[2] += c, state[3] += d;
    state[4] += e, state[5] += f, state[6] += g, state[7] += h;
}

static double sha256(const struct row *row, long count)
{
    double start = now();
    (void)row;
    while (count--) {
        unsigned char padding[64] = {0x80};
        uint32_t state[8];
        memcpy(state, initial_state, sizeof state);
        for (int i = 0; i < 8; i++)
            padding[56 + i] = (uint64_t)SHA_BYTES * 8 >> (56 - 8 * i);
        for (long offset = 0; offset < SHA_BYTES; offset += 64)
            compress(state, message + offset);
        compress(state, padding);
        if (state[0] != expected_first_word)
            die("sha256: wrong digest");
    }
    return now() - start;
}

/* --- a product of two matrices of doubles --------------------------------------------------------- */

enum { N = 192 };
static double left[N][N], right[N][N], product[N][N];

static void fill_matrices(const struct row *row)
{
    (void)row;
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) {
            left[i][j] = i + j;
            right[i][j] = i - j;
        }
}

static double multiply(const struct row *row, long count)
{
    double start = now();
    (void)row;
    while (count--) {
        memset(product, 0, sizeof product);
        for (int i = 0; i < N; i++)
            for (int k = 0; k < N; k++)
                for (int j = 0; j < N; j++)
                    product[i][j] += left[i][k] * right[k][j];
        /* Element [0][0] is the sum of k*k for k below N; all sums here are exact in a double. */
        if (product[0][0] != (double)(N - 1) * N * (2 * N - 1) / 6)
            die("matmul: wrong product");
    }
    return now() - start;
}

/* --- memcpy of 8 MB ------------------------------------------------------------------------------- */

enum { COPY_BYTES = 8 << 20 };
static char *source, *destination;

static void allocate_buffers(const struct row *row)
{
    (void)row;
    source = malloc(COPY_BYTES);
    destination = malloc(COPY_BYTES);
    if (!source || !destination)
        die("malloc");
    memset(source, 1, COPY_BYTES);
    memset(destination, 0, COPY_BYTES);
}

static double copy(const struct row *row, long count)
{
    double start = now();
    (void)row;
    while (count--) {
        source[count % COPY_BYTES] = count;
        memcpy(destination, source, COPY_BYTES);
        if (destination[count % COPY_BYTES] != (char)count)
            die("memcpy: wrong copy");
    }
    return now() - start;
}

const struct row compute_rows[] = {
    {"sieve", "ms", LATENCY, 1e3, sieve, NULL, 0, 0, 0},
    {"sha256", "MB/s", RATE, SHA_BYTES * 1e-6, sha256, make_constants, 0, 0, 0},
    {"matmul", "Mflop/s", RATE, 2e-6 * N * N * N, multiply, fill_matrices, 0, 0, 0},
    {"memcpy", "MB/s", RATE, COPY_BYTES * 1e-6, copy, allocate_buffers, 0, 0, 0},
    {0},
};
