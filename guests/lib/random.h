/* Random numbers that a seed decides (xorshift64*). */
#ifndef GUEST_RANDOM_H
#define GUEST_RANDOM_H

#include "guest.h"

static u64 random_state;

static inline void random_seed(u64 seed) { random_state = seed * 0x9e3779b97f4a7c15ul | 1; }

static inline u64 next(void)
{
    random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
    return random_state * 0x2545f4914f6cdd1dul >> 8;
}

static inline u64 below(u64 n) { return next() % n; }

#endif
