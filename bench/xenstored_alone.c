/*
 * Lets Debian's xenstored run where there is no Xen, so that bench/xenstore.py can measure it: preloaded, this answers
 * for the hypervisor libraries. There is one domain, 0, whose ring page is the file $XENSTORED_ALONE/page; no event
 * channel ever fires. The daemon's socket, store and protocol are untouched.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char *const handle = (char *)1;
static int never[2] = {-1, -1};

void *xc_interface_open(void *log, void *dombuild, unsigned flags) { return handle; }
int xc_interface_close(void *xch) { return 0; }

/* xc_dominfo_t starts with domid, ssidref and the state bits; all clear is a running domain. */
int xc_domain_getinfo(void *xch, uint32_t first, unsigned max, uint32_t *info)
{
    if (first) {
        errno = ESRCH;
        return -1;
    }
    info[0] = info[1] = info[2] = 0;
    return 1;
}

void *xengnttab_open(void *log, unsigned flags) { return handle; }
int xengnttab_close(void *xgt) { return 0; }
int xengnttab_set_max_grants(void *xgt, uint32_t count) { return 0; }
int xengnttab_unmap(void *xgt, void *start, uint32_t count) { return 0; }
void *xengnttab_map_grant_ref(void *xgt, uint32_t domid, uint32_t ref, int prot) { errno = ESRCH; return NULL; }

void *xenevtchn_open(void *log, unsigned flags) { return pipe(never) ? NULL : handle; }
int xenevtchn_fd(void *xce) { return never[0]; }
int xenevtchn_notify(void *xce, uint32_t port) { return 0; }
int xenevtchn_bind_interdomain(void *xce, uint32_t domid, uint32_t port) { return 1; }
int xenevtchn_bind_virq(void *xce, unsigned virq) { return 2; }
int xenevtchn_unbind(void *xce, uint32_t port) { return 0; }
int xenevtchn_unmask(void *xce, uint32_t port) { return 0; }
int xenevtchn_pending(void *xce) { return -1; }

int open(const char *path, int flags, ...)
{
    static int (*real)(const char *, int, ...);
    char ours[4096];
    int mode = 0;

    if (flags & O_CREAT) {
        va_list rest;
        va_start(rest, flags);
        mode = va_arg(rest, int);
        va_end(rest);
    }
    if (!real)
        real = dlsym(RTLD_NEXT, "open");
    if (!strcmp(path, "/proc/xen/xsd_port") || !strcmp(path, "/proc/xen/xsd_kva")) {
        snprintf(ours, sizeof ours, "%s/%s", getenv("XENSTORED_ALONE"), strstr(path, "port") ? "port" : "page");
        path = ours;
    }
    return real(path, flags, mode);
}
