/* Granting frames to another domain: the table, version 1 (public grant_table.h). */
#ifndef GUEST_GRANTS_H
#define GUEST_GRANTS_H

#include "guest.h"

#define GTF_permit_access 1
#define GTF_readonly 4
#define GTF_reading 8
#define GTF_writing 16
#define FIRST_REF 8 /* those below are the toolstack's */
#define GRANTS 512  /* in the one frame that grants_open() maps */

struct grant {
    u16 flags, domid;
    u32 frame;
};
extern volatile struct grant *grant_table;

bool grants_open(void);
void grant_to(u32 ref, u16 domid, u64 mfn, u16 flags); /* flags: 0 or GTF_readonly */
void grant_end(u32 ref);                              /* whatever the other end does with it */
static inline bool grant_in_use(u32 ref) { return grant_table[ref].flags & (GTF_reading | GTF_writing); }

#endif
