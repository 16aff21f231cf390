/* Grants (public grant_table.h): the table, version 1; the operations on what others granted. */
#ifndef GUEST_GRANTS_H
#define GUEST_GRANTS_H

#include "guest.h"

#define GNTTABOP_map_grant_ref 0
#define GNTTABOP_unmap_grant_ref 1
#define GNTTABOP_setup_table 2
#define GNTTABOP_copy 5
#define GNTTABOP_query_size 6
#define GNTTABOP_set_version 8
#define GNTTABOP_get_status_frames 9
#define GNTTABOP_get_version 10
#define GNTTABOP_swap_grant_ref 11

#define GNTMAP_device_map 1
#define GNTMAP_host_map 2
#define GNTMAP_readonly 4
#define GNTCOPY_source_gref 1
#define GNTCOPY_dest_gref 2

#define GNTST_okay 0
#define GNTST_general_error -1
#define GNTST_bad_domain -2
#define GNTST_bad_gntref -3
#define GNTST_bad_handle -4
#define GNTST_bad_virt_addr -5
#define GNTST_bad_dev_addr -6
#define GNTST_permission_denied -8
#define GNTST_bad_page -9
#define GNTST_bad_copy_arg -10
#define GNTST_eagain -12

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

struct grant_setup {
    u16 dom;
    u32 nr;
    s16 status;
    u64 *list;
};
struct grant_map {
    u64 host_addr;
    u32 flags, ref;
    u16 dom;
    s16 status;
    u32 handle;
    u64 dev_bus_addr;
};
_Static_assert(sizeof(struct grant_map) == 32, "public ABI");
struct grant_unmap {
    u64 host_addr, dev_bus_addr;
    u32 handle;
    s16 status;
};
struct grant_end {
    u64 ref_or_mfn;
    u16 domid, offset;
};
struct grant_copy {
    struct grant_end source, dest;
    u16 len, flags;
    s16 status;
};

bool grants_open(void);
void grant_to(u32 ref, u16 domid, u64 mfn, u16 flags); /* flags: 0 or GTF_readonly */
void grant_end(u32 ref);                              /* whatever the other end does with it */
static inline bool grant_in_use(u32 ref) { return grant_table[ref].flags & (GTF_reading | GTF_writing); }

/* One operation each; its status, or the errno of the whole hypercall. */
struct grant_map grant_map(u32 ref, u64 va, u32 flags, u16 dom);
s16 grant_unmap(u32 handle, u64 va, u64 dev_bus_addr);
s16 grant_copy(struct grant_end from, struct grant_end to, u16 length, u16 flags);
u16 own_domid(void); /* the first whose grant table is ours to ask for */

#endif
