/* xenstore, as a guest asks it: one request at a time over the ring page (public io/xs_wire.h). */
#ifndef GUEST_XENSTORE_H
#define GUEST_XENSTORE_H

#include "guest.h"

struct xenstore_ring {
    char req[1024], rsp[1024];
    u32 req_cons, req_prod, rsp_cons, rsp_prod;
};
struct xenstore_message {
    u32 type, id, transaction, length;
};
volatile struct xenstore_ring *xenstore_ring(void);
void xenstore_wait(void); /* sleep until xenstored rings, who may have done so already */

long xs_read(const char *path, char *value, u64 size);      /* the length, or -1 where it was refused */
long xs_write(const char *path, const char *value, u64 length); /* 0 or -1 */
long xs_rm(const char *path);

void text_append(char *to, const char *what); /* both end with NUL; the caller knows that it fits */
void text_append_number(char *to, u64 number);
u64 text_number(const char *text); /* ~0 if it is none */

#endif
