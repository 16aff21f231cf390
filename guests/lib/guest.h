/*
 * What the library offers a guest. A guest is one C file with a main(); the library starts it, prints
 * its checks on the console ring, one line each, and shuts the domain down when main() returns.
 */
#ifndef GUEST_GUEST_H
#define GUEST_GUEST_H

#include "xen.h"

/* start.S and start.c */
extern struct start_info *start_info;
extern struct shared_info *const shared_info; /* mapped before main() */
extern u64 builder_stack;                     /* the stack pointer on entry */
extern char virt_base[], image_start[], image_end[];
long hypercall(long number, long a1, long a2, long a3, long a4, long a5);
#define HYPERCALL(...) HYPERCALL_PICK(__VA_ARGS__, 0, 0, 0, 0, 0)
#define HYPERCALL_PICK(nr, a, b, c, d, e, ...) \
    hypercall((nr), (long)(a), (long)(b), (long)(c), (long)(d), (long)(e))

int main(void);                   /* the guest itself */
void shut_down(unsigned reason) __attribute__((noreturn));
bool option(const char *word);    /* is this word on the command line? */
u64 option_value(const char *name, u64 otherwise); /* the number in name=number */

/* memory: virtual address, pseudo-physical frame and machine frame of a page in the initial mapping */
static inline u64 va_to_pfn(const void *va) { return ((u64)va - (u64)virt_base) >> PAGE_SHIFT; }
static inline void *pfn_to_va(u64 pfn) { return virt_base + (pfn << PAGE_SHIFT); }
static inline u64 pfn_to_mfn(u64 pfn) { return ((u64 *)start_info->mfn_list)[pfn]; }
static inline u64 va_to_mfn(const void *va) { return pfn_to_mfn(va_to_pfn(va)); }
u64 mfn_to_pfn(u64 mfn); /* searches the p2m; ~0 if the frame is not ours */
void *memset(void *to, int byte, u64 n);
void *memcpy(void *to, const void *from, u64 n);
int memcmp(const void *a, const void *b, u64 n);
u64 strlen(const char *s);
#define PAGE_ALIGNED __attribute__((aligned(4096), section(".bss.page,\"aw\",@nobits#")))

/* console.c */
void print(const char *format, ...); /* %s %c %d %u %x, and l for 64 bits */
void console_write(const char *text, u64 length);
void console_drain(void); /* wait until dom0 has read everything */

/* check.c: `ok N - what` or `not ok N - what: got X expected Y` */
void check(bool right, const char *what);
void check_eq(const char *what, long got, long expected);
void report(void); /* the final `done PASSED=n FAILED=m` */

#define barrier() __asm__ volatile("" ::: "memory")
#define fence() __asm__ volatile("mfence" ::: "memory")
#define LENGTH(array) (sizeof(array) / sizeof *(array))

#endif
