/*
 * The agent: a program in a Linux guest that runs commands for dom0 (the other end: toolstack/agent/).
 *
 * It speaks over a PV console of its own, /dev/hvc1, in frames: type (u8), command (u16), length (u16), body; all
 * little-endian, encoded by Consistent Overhead Byte Stuffing (Cheshire and Baker, 1999), and a zero byte after each. So a
 * zero always ends a frame, whatever came before: dom0 may begin anew at any moment, as it does when the domain was
 * saved, relocated or cloned in the middle of one. A frame whose length is not what it says is dropped.
 *
 * Several commands run at once. No stream of one may hold up another's: each side sends only as many bytes of a stream as the
 * other has said that it has room for (credit). What dom0 sends is taken at once, and dom0 takes at once what we send.
 *
 * There is no libc: it is 8 KiB, starts in a few system calls, and needs nothing of the guest but its kernel.
 */
#include <asm/ioctls.h>
#include <asm/termios.h>
#include <asm/unistd.h>
#include <linux/fcntl.h>
#include <linux/poll.h>
#include <linux/random.h>
#include <linux/resource.h>
#include <linux/sched.h>
#include <linux/signal.h>
#include <linux/sockios.h>
#include <stddef.h>
#include <stdint.h>

#define VERSION 1
#define MOST_COMMANDS 64
#define MOST_BODY 4096
#define HEADER 5
#define MOST_ARGUMENTS (256 << 10) /* of a command, with its environment */
#define MOST_WORDS 4096
#define INPUT_ROOM (16 << 10) /* of a command's standard input that it has not read yet */
#define STACK (16 << 10)
#define MOST_INTERFACES 256 /* that are looked at */

enum { ENOENT = 2, EIO = 5, E2BIG = 7, EAGAIN = 11, EACCES = 13, EINVAL = 22, EINTR = 4, ENOTDIR = 20 };
enum { POLLIN_ = 1, POLLOUT_ = 4, POLLHUP_ = 16 };

/* From dom0. */
enum { HELLO = 1, IDENTITY, ARGUMENTS, EXEC, STDIN, STDIN_END, SIGNAL, SIZE, CREDIT, FORGET, INTERFACE };
/* To dom0. */
enum { READY = 65, WELCOME, IDENTIFIED, STARTED, FAILED, STDOUT, STDERR, ROOM, EXIT };
/* Where a command failed to start. */
enum { OF_AGENT, OF_USER, OF_DIRECTORY, OF_PROGRAM };

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

/* --- what a libc would have --- */

static long call(long number, long a, long b, long c, long d, long e)
{
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
                     : "rcx", "r11", "memory");
    return result;
}
#define SYS(name, ...) SYS_(name, __VA_ARGS__, 0, 0, 0, 0, 0)
#define SYS_(name, a, b, c, d, e, ...) call(__NR_##name, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e))

void *memcpy(void *to, const void *from, size_t count)
{
    void *result = to;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(count) : : "memory");
    return result;
}

void *memset(void *to, int value, size_t count)
{
    void *result = to;
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(count) : "a"(value) : "memory");
    return result;
}

static size_t length(const char *text)
{
    size_t count = 0;
    while (text[count])
        count++;
    return count;
}

/* Whether `text` begins with `start`. */
static int begins(const char *text, const char *start)
{
    while (*start)
        if (*text++ != *start++)
            return 0;
    return 1;
}

static u16 get16(const u8 *from) { return (u16)(from[0] | from[1] << 8); }
static u32 get32(const u8 *from) { return get16(from) | (u32)get16(from + 2) << 16; }
static u64 get64(const u8 *from) { return get32(from) | (u64)get32(from + 4) << 32; }
static void put32(u8 *to, u32 value)
{
    for (int i = 0; i < 4; i++)
        to[i] = (u8)(value >> 8 * i);
}

/* --- the line to dom0 --- */

static int line;
static u8 incoming[HEADER + MOST_BODY + 64]; /* as it is encoded, without its zero */
static size_t incoming_size;
static int incoming_too_long;

static void send(u8 type, u16 id, const void *body, size_t size)
{
    static u8 plain[HEADER + MOST_BODY], coded[HEADER + MOST_BODY + 32];
    plain[0] = type, plain[1] = (u8)id, plain[2] = (u8)(id >> 8), plain[3] = (u8)size, plain[4] = (u8)(size >> 8);
    memcpy(plain + HEADER, body, size);
    size_t end = 1, code = 0;
    for (size_t i = 0; i < HEADER + size; i++) {
        if (plain[i]) {
            coded[end++] = plain[i];
            if (end - code < 255)
                continue;
        }
        coded[code] = (u8)(end - code);
        code = end++;
    }
    coded[code] = (u8)(end - code);
    coded[end++] = 0;
    for (size_t sent = 0; sent < end;) {
        long count = SYS(write, line, coded + sent, end - sent);
        if (count > 0)
            sent += (size_t)count;
        else if (count != -EINTR && count != -EAGAIN)
            SYS(exit_group, 1);
    }
}

static void send_number(u8 type, u16 id, u32 number)
{
    u8 body[4];
    put32(body, number);
    send(type, id, body, sizeof body);
}

/* --- commands --- */

struct command {
    int pid; /* 0: the place is free */
    u16 id;
    u8 silent; /* dom0 has begun anew since, and knows nothing of it */
    u8 forgotten; /* nobody reads its output */
    u8 terminal;
    u8 exited;
    u8 input_ends;
    int status;
    int input, output, errors; /* -1: closed; of a terminal the first two are one */
    u32 output_credit, errors_credit;
    size_t input_start, input_size; /* of what waits in `waiting` */
    u8 waiting[INPUT_ROOM];
};
static struct command commands[MOST_COMMANDS];

static char arguments[MOST_ARGUMENTS];
static size_t arguments_size;

static struct command *find(u16 id)
{
    for (struct command *c = commands; c < commands + MOST_COMMANDS; c++)
        if (c->pid && c->id == id && !c->silent)
            return c;
    return NULL;
}

static void shut(int *descriptor)
{
    if (*descriptor >= 0)
        SYS(close, *descriptor);
    *descriptor = -1;
}

static void shut_input(struct command *c)
{
    if (c->terminal)
        c->input = -1; /* which is its output, too */
    else
        shut(&c->input);
    c->input_size = 0;
}

static void failed(u16 id, u8 stage, long error)
{
    u8 body[5] = {stage};
    put32(body + 1, (u32)-error);
    send(FAILED, id, body, sizeof body);
}

/* What the child needs; it shares our memory and has us wait until it runs its program. */
static struct {
    char *words[MOST_WORDS + 3]; /* of the command, NULL, the environment, NULL */
    char **environment;
    char *directory;
    int terminal; /* the other end of its terminal, or -1 */
    int input, output, errors;
    u32 uid, gid;
    int as_user;
    struct { int resource; u64 value; } limits[16];
    int limit_count;
    volatile int stage;
    volatile long error;
} new;
static u8 stack[STACK] __attribute__((aligned(16)));

static long run_program(const char *name)
{
    static char path[4096];
    const char *places = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    long error = -ENOENT;
    for (const char *c = name; *c; c++)
        if (*c == '/')
            return SYS(execve, name, new.words, new.environment);
    for (char **each = new.environment; *each; each++)
        if (begins(*each, "PATH="))
            places = *each + 5;
    while (*places) {
        size_t size = 0, named = length(name);
        while (places[size] && places[size] != ':')
            size++;
        if (size && size + named + 2 < sizeof path) {
            memcpy(path, places, size);
            path[size] = '/';
            memcpy(path + size + 1, name, named + 1);
            long result = SYS(execve, path, new.words, new.environment);
            if (result != -ENOENT && result != -ENOTDIR)
                error = result;
        }
        places += size + (places[size] == ':');
    }
    return error;
}

static long become(void)
{
    u64 none = 0;
    new.stage = OF_AGENT;
    SYS(setsid, 0);
    if (new.terminal >= 0) {
        SYS(ioctl, new.terminal, TIOCSCTTY, 0);
        new.input = new.output = new.errors = new.terminal;
    }
    SYS(dup2, new.input, 0), SYS(dup2, new.output, 1), SYS(dup2, new.errors, 2);
    SYS(rt_sigprocmask, SIG_SETMASK, &none, 0, sizeof none);
    for (int i = 0; i < new.limit_count; i++) {
        struct rlimit64 limit = {new.limits[i].value, new.limits[i].value};
        long error = SYS(prlimit64, 0, new.limits[i].resource, &limit, 0);
        if (error)
            return error;
    }
    if (new.as_user) {
        new.stage = OF_USER;
        long error = SYS(setgroups, 1, &new.gid);
        error = error ? error : SYS(setresgid, new.gid, new.gid, new.gid);
        error = error ? error : SYS(setresuid, new.uid, new.uid, new.uid);
        if (error)
            return error;
    }
    new.stage = OF_DIRECTORY;
    long error = SYS(chdir, new.directory);
    if (error)
        return error;
    new.stage = OF_PROGRAM;
    return run_program(new.words[0]);
}

__attribute__((noreturn, used)) static void child(void)
{
    new.error = become();
    SYS(exit_group, 127);
    __builtin_unreachable();
}

/* vfork() on a stack of the child's own; the pid, or an error. */
static long start_child(void)
{
    long result;
    new.error = 0;
    register long r10 __asm__("r10") = 0;
    register long r8 __asm__("r8") = 0;
    __asm__ volatile("syscall\n\ttest %%rax, %%rax\n\tjnz 1f\n\txor %%ebp, %%ebp\n\tcall child\n1:"
                     : "=a"(result)
                     : "a"(__NR_clone), "D"(CLONE_VM | CLONE_VFORK | SIGCHLD), "S"(stack + sizeof stack), "d"(0), "r"(r10), "r"(r8)
                     : "rcx", "r11", "memory");
    return result;
}

/* A number at the start of `text`; what follows it, or NULL where there is none. */
static const char *number(const char *text, u32 *value)
{
    u64 sum = 0;
    const char *c = text;
    for (; *c >= '0' && *c <= '9' && sum < 1ull << 32; c++)
        sum = sum * 10 + (u64)(*c - '0');
    *value = (u32)sum;
    return c > text && sum < 1ull << 32 ? c : NULL;
}

/* The field of a line of passwd(5) after `skip` colons. */
static const char *field(const char *line_of_file, int skip)
{
    while (skip && *line_of_file && *line_of_file != '\n')
        skip -= *line_of_file++ == ':';
    return skip ? NULL : line_of_file;
}

/* Who a command runs as, and its home. Users who have no line in passwd(5) are those with that number. */
static long find_user(const char *user, char *home, size_t room)
{
    static char file[64 << 10];
    long size = 0, count;
    int descriptor = (int)SYS(open, "/etc/passwd", O_RDONLY | O_CLOEXEC);
    if (descriptor >= 0) {
        while (size < (long)sizeof file - 1 && (count = SYS(read, descriptor, file + size, sizeof file - 1 - (size_t)size)) > 0)
            size += count;
        SYS(close, descriptor);
    }
    file[size] = 0;
    u32 wanted = 0;
    const char *rest = number(user, &wanted);
    int numeric = rest && (!*rest || *rest == ':');
    size_t named = 0;
    while (user[named] && user[named] != ':')
        named++;
    memcpy(home, "/", 2);
    int found = numeric;
    new.uid = new.gid = wanted;
    for (const char *entry = file; *entry;) {
        const char *uid = field(entry, 2), *gid = field(entry, 3), *where = field(entry, 5);
        u32 its_uid, its_gid;
        int same = 1;
        for (size_t i = 0; i < named && same; i++)
            same = entry[i] == user[i];
        same = same && entry[named] == ':';
        if (uid && gid && where && number(uid, &its_uid) && number(gid, &its_gid) && (numeric ? its_uid == wanted : same)) {
            size_t end = 0;
            while (where[end] && where[end] != ':' && where[end] != '\n' && end + 1 < room)
                end++;
            memcpy(home, where, end);
            home[end] = 0;
            new.uid = its_uid, new.gid = its_gid;
            found = 1;
            break;
        }
        while (*entry && *entry != '\n')
            entry++;
        entry += *entry == '\n';
    }
    if (user[named] == ':') {
        rest = number(user + named + 1, &new.gid);
        if (!rest || *rest)
            return -EINVAL;
    }
    return found ? 0 : -ENOENT;
}

/* A terminal for a command: our end, or an error; new.terminal is the other. */
static long open_terminal(u16 rows, u16 columns)
{
    static int mounted;
    if (!mounted) { /* fails where that was done */
        SYS(mkdir, "/dev/pts", 0755);
        SYS(mount, "devpts", "/dev/pts", "devpts", 0, "mode=620,ptmxmode=666");
        mounted = 1;
    }
    long ours = SYS(open, "/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
    if (ours < 0)
        return ours;
    int unlock = 0;
    struct winsize size = {rows, columns, 0, 0};
    SYS(ioctl, ours, TIOCSPTLCK, &unlock);
    SYS(ioctl, ours, TIOCSWINSZ, &size);
    long other = SYS(ioctl, ours, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (other < 0) {
        SYS(close, ours);
        return other;
    }
    new.terminal = (int)other;
    return ours;
}

static long pipe_of(int ends[2], int ours)
{
    long error = SYS(pipe2, ends, O_CLOEXEC);
    if (!error)
        SYS(fcntl, ends[ours], F_SETFL, O_NONBLOCK);
    else
        ends[0] = ends[1] = -1;
    return error;
}

/* The words in `arguments`, and in `new`: directory, user, command, environment. */
static long take_words(u32 argc, u32 envc, char **user)
{
    static char home[256 + 5];
    char *word = arguments, *end = arguments + arguments_size;
    char *found[2];
    u32 given = 0, count = 0;
    if (!argc || argc + envc > MOST_WORDS)
        return -E2BIG;
    new.environment = new.words + argc + 1;
    while (word < end && given < argc + envc + 2) {
        char *next = word;
        while (next < end && *next)
            next++;
        if (next == end)
            return -EINVAL;
        if (given < 2)
            found[given] = word;
        else {
            if (count == argc)
                new.words[count++] = NULL;
            new.words[count++] = word;
        }
        given++;
        word = next + 1;
    }
    if (given != argc + envc + 2 || word != end)
        return -EINVAL;
    new.words[argc] = NULL;
    count = argc + 1 + envc;
    new.directory = found[0];
    *user = found[1];
    new.as_user = **user != 0;
    memcpy(home, "HOME=/root", 11);
    if (new.as_user) {
        long error = find_user(*user, home + 5, sizeof home - 5);
        if (error) {
            new.stage = OF_USER;
            return error;
        }
    }
    for (u32 i = argc + 1; i < count; i++)
        if (begins(new.words[i], "HOME="))
            goto complete;
    new.words[count++] = home;
complete:
    new.words[count] = NULL;
    return 0;
}

static void start(u16 id, const u8 *body, size_t size)
{
    struct command *c = commands;
    int in[2] = {-1, -1}, out[2] = {-1, -1}, err[2] = {-1, -1};
    char *user;
    new.stage = OF_AGENT;
    new.terminal = -1;
    new.limit_count = size < 14 ? 17 : body[13];
    if (new.limit_count > 16 || size != 14 + 9 * (size_t)new.limit_count || find(id)) {
        failed(id, OF_AGENT, -EINVAL);
        return;
    }
    while (c < commands + MOST_COMMANDS && c->pid)
        c++;
    if (c == commands + MOST_COMMANDS) {
        failed(id, OF_AGENT, -EAGAIN);
        return;
    }
    for (int i = 0; i < new.limit_count; i++) {
        new.limits[i].resource = body[14 + 9 * i];
        new.limits[i].value = get64(body + 15 + 9 * i);
    }
    long error = arguments_size > MOST_ARGUMENTS ? -E2BIG : take_words(get32(body + 5), get32(body + 9), &user);
    long ours = -1;
    if (!error && body[0] & 1) {
        ours = open_terminal(get16(body + 1), get16(body + 3));
        error = ours < 0 ? ours : 0;
    } else if (!error) {
        error = pipe_of(in, 1);
        error = error ? error : pipe_of(out, 0);
        error = error ? error : pipe_of(err, 0);
        new.input = in[0], new.output = out[1], new.errors = err[1];
    }
    if (!error) {
        long pid = start_child();
        error = pid < 0 ? pid : new.error;
        if (pid > 0 && error) { /* its end is of no interest */
            SYS(wait4, pid, 0, 0, 0);
        } else if (!error) {
            *c = (struct command){.pid = (int)pid, .id = id, .terminal = ours >= 0, .errors = err[0]};
            c->input = ours >= 0 ? (int)ours : in[1];
            c->output = ours >= 0 ? (int)ours : out[0];
        }
    }
    shut(&new.terminal);
    shut(&in[0]), shut(&out[1]), shut(&err[1]);
    if (error) {
        int end = (int)ours;
        shut(&in[1]), shut(&out[0]), shut(&err[0]), shut(&end);
        failed(id, (u8)new.stage, error);
    } else {
        send_number(STARTED, id, (u32)c->pid);
    }
}

/* Give a command of its input what it takes now. */
static void feed(struct command *c)
{
    size_t taken = 0;
    while (c->input_size && c->input >= 0) {
        size_t first = c->input_start, count = c->input_size;
        if (count > INPUT_ROOM - first)
            count = INPUT_ROOM - first;
        long written = SYS(write, c->input, c->waiting + first, count);
        if (written == -EAGAIN)
            break;
        if (written <= 0) { /* nobody reads it any more */
            taken += c->input_size;
            shut_input(c);
            break;
        }
        c->input_start = (first + (size_t)written) % INPUT_ROOM;
        c->input_size -= (size_t)written;
        taken += (size_t)written;
    }
    if (taken && !c->silent)
        send_number(ROOM, c->id, (u32)taken);
    if (!c->input_size && c->input_ends && c->input >= 0)
        shut_input(c);
}

static void take_input(struct command *c, const u8 *data, size_t size)
{
    if (size > INPUT_ROOM - c->input_size)
        return; /* more than it was allowed */
    if (c->input < 0) {
        send_number(ROOM, c->id, (u32)size); /* it goes nowhere */
        return;
    }
    for (size_t i = 0; i < size; i++)
        c->waiting[(c->input_start + c->input_size++) % INPUT_ROOM] = data[i];
    feed(c);
}

/* Send on what one of a command's streams has. */
static void pump(struct command *c, int *from, u8 type, u32 *credit)
{
    static u8 data[MOST_BODY];
    while (*from >= 0 && (*credit || c->forgotten)) {
        size_t most = c->forgotten || *credit > sizeof data ? sizeof data : *credit;
        long count = SYS(read, *from, data, most);
        if (count == -EINTR)
            continue;
        if (count == -EAGAIN && !c->exited)
            return;
        if (count <= 0) { /* its end, or all that it has left */
            if (c->terminal)
                c->input = -1;
            shut(from);
            return;
        }
        if (!c->forgotten) {
            *credit -= (u32)count;
            send(type, c->id, data, (size_t)count);
        }
        if (!c->exited)
            return; /* others get their turn */
    }
}

static void serve(struct command *c)
{
    feed(c);
    pump(c, &c->output, STDOUT, &c->output_credit);
    pump(c, &c->errors, STDERR, &c->errors_credit);
    if (c->exited && c->output < 0 && c->errors < 0) {
        shut_input(c);
        if (!c->silent)
            send_number(EXIT, c->id, (u32)c->status);
        c->pid = 0;
    }
}

static void reap(void)
{
    int status;
    long pid;
    while ((pid = SYS(wait4, -1, &status, 1 /* WNOHANG */, 0)) > 0)
        for (struct command *c = commands; c < commands + MOST_COMMANDS; c++)
            if (c->pid == pid)
                c->exited = 1, c->status = status;
}

/* --- what dom0 asks for --- */

/*
 * Who this domain is: 32 random bytes, a machine-id, the time (ns since 1970), a host name. A clone is told before it does
 * anything else.
 */
static void identify(const u8 *body, size_t size)
{
    struct { int bits, size; u8 seed[32]; } entropy = {256, 32, {0}};
    char id[33];
    long error = -EINVAL;
    if (size >= 73 && size <= 72 + 64) {
        memcpy(entropy.seed, body, 32);
        int random = (int)SYS(open, "/dev/urandom", O_RDWR | O_CLOEXEC);
        error = random < 0 ? random : SYS(ioctl, random, RNDADDENTROPY, &entropy);
        if (!error)
            SYS(ioctl, random, RNDRESEEDCRNG, 0); /* ENODATA: it was not ready before, and is now */
        SYS(close, random);
        memcpy(id, body + 32, 32);
        id[32] = '\n';
        int file = (int)SYS(open, "/etc/machine-id", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0444);
        SYS(write, file, id, sizeof id);
        SYS(close, file);
        u64 now[2] = {get64(body + 64) / 1000000000, get64(body + 64) % 1000000000};
        SYS(clock_settime, 0 /* CLOCK_REALTIME */, now);
        SYS(sethostname, body + 72, size - 72);
    }
    send_number(IDENTIFIED, 0, (u32)-error);
}

/* As netdevice(7) has them; its headers want a libc. */
struct address { u16 family; u8 port[2]; u32 ipv4; u8 rest[8]; };
struct interface {
    char name[16];
    union { struct address address; struct { u16 family; u8 mac[14]; }; u16 flags; int index; u8 all[24]; };
};
struct route {
    u64 pad;
    struct address to, gateway, netmask;
    u16 flags;
    u64 more[3];
    char *interface;
    u64 metrics[3];
};
enum { AF_INET = 2, SOCK_DGRAM = 2, IFF_UP = 1, ETHERNET = 1, RTF_UP_GATEWAY = 3 };

static int interfaces; /* a socket to ask about them */

static long ask(long question, void *about) { return SYS(ioctl, interfaces, question, about); }

/*
 * Let an interface be another machine's: a MAC, and where it is up a new IPv4 address and a default route. It may be up
 * without an address: a DHCP client that asks for one goes on to do so with the MAC that it knew, and gets none.
 */
static void readdress(struct interface *it, const u8 *mac, u32 address, u32 netmask, u32 router)
{
    const struct address any = {.family = AF_INET};
    struct route route = {.to = any, .gateway = any, .netmask = any, .flags = RTF_UP_GATEWAY, .interface = it->name};
    if (ask(SIOCGIFFLAGS, it))
        return;
    u16 flags = it->flags;
    if (flags & IFF_UP) { /* then the driver takes no MAC */
        it->flags = flags & ~IFF_UP;
        ask(SIOCSIFFLAGS, it);
    }
    it->family = ETHERNET;
    memcpy(it->mac, mac, 6);
    ask(SIOCSIFHWADDR, it);
    if (flags & IFF_UP) {
        it->address = any, it->address.ipv4 = address;
        ask(SIOCSIFADDR, it);
        it->address = any, it->address.ipv4 = netmask;
        ask(SIOCSIFNETMASK, it);
        it->flags = flags;
        ask(SIOCSIFFLAGS, it);
        route.gateway.ipv4 = router;
        ask(SIOCADDRT, &route);
    }
}

/*
 * An interface of this domain's has other addresses than its parent's: the MAC that it had, its own, and its IPv4 address,
 * netmask and router in the network's byte order. Whatever runs here learns of them as of any change by an administrator.
 */
static void be_interface(const u8 *body, size_t size)
{
    if (size != 24)
        return;
    interfaces = (int)SYS(socket, AF_INET, SOCK_DGRAM | O_CLOEXEC, 0);
    for (int index = 1; index <= MOST_INTERFACES; index++) {
        struct interface it = {.index = index};
        if (ask(SIOCGIFNAME, &it) || ask(SIOCGIFHWADDR, &it) || it.family != ETHERNET)
            continue;
        if (get32(it.mac) == get32(body) && get16(it.mac + 4) == get16(body + 4)) {
            readdress(&it, body + 6, get32(body + 12), get32(body + 16), get32(body + 20));
            break;
        }
    }
    SYS(close, interfaces);
}

static void greet(const u8 *body, size_t size)
{
    u8 answer[18] = {0};
    if (size != 16)
        return;
    for (struct command *c = commands; c < commands + MOST_COMMANDS; c++)
        c->silent = c->forgotten = 1;
    arguments_size = 0;
    memcpy(answer, body, 16);
    answer[16] = VERSION;
    send(WELCOME, 0, answer, sizeof answer);
}

static void obey(u8 type, u16 id, const u8 *body, size_t size)
{
    struct command *c = find(id);
    if (type == HELLO)
        greet(body, size);
    else if (type == IDENTITY)
        identify(body, size);
    else if (type == INTERFACE)
        be_interface(body, size);
    else if (type == ARGUMENTS) {
        if (size <= MOST_ARGUMENTS - arguments_size && arguments_size <= MOST_ARGUMENTS) {
            memcpy(arguments + arguments_size, body, size);
            arguments_size += size;
        } else {
            arguments_size = MOST_ARGUMENTS + 1;
        }
    } else if (type == EXEC) {
        start(id, body, size);
        arguments_size = 0;
    } else if (!c)
        return; /* it has ended meanwhile */
    else if (type == STDIN)
        take_input(c, body, size);
    else if (type == STDIN_END && !c->terminal) { /* there Ctrl-D is its input's */
        c->input_ends = 1;
        feed(c);
    } else if (type == SIGNAL && size == 1 && !c->exited)
        SYS(kill, -c->pid, body[0]);
    else if (type == SIZE && size == 4 && c->terminal && c->output >= 0) {
        struct winsize window = {get16(body), get16(body + 2), 0, 0};
        SYS(ioctl, c->output, TIOCSWINSZ, &window);
    } else if (type == CREDIT && size == 5) {
        *(body[0] == 2 ? &c->errors_credit : &c->output_credit) += get32(body + 1);
    } else if (type == FORGET) {
        c->forgotten = 1;
        shut_input(c);
        if (!c->exited)
            SYS(kill, -c->pid, SIGHUP);
    }
}

static void decode(void)
{
    static u8 plain[sizeof incoming];
    size_t count = 0, at = 0;
    while (at < incoming_size) {
        size_t code = incoming[at++];
        for (size_t i = 1; i < code && at < incoming_size; i++)
            plain[count++] = incoming[at++];
        if (code < 255 && at < incoming_size)
            plain[count++] = 0;
    }
    if (count >= HEADER && count == HEADER + (size_t)get16(plain + 3))
        obey(plain[0], get16(plain + 1), plain + HEADER, count - HEADER);
}

static void hear(void)
{
    static u8 data[4096];
    long count = SYS(read, line, data, sizeof data);
    if (count <= 0 && count != -EINTR && count != -EAGAIN)
        SYS(exit_group, 1);
    for (long i = 0; i < count; i++) {
        if (!data[i]) {
            if (!incoming_too_long)
                decode();
            incoming_size = 0, incoming_too_long = 0;
        } else if (incoming_size < sizeof incoming)
            incoming[incoming_size++] = data[i];
        else
            incoming_too_long = 1;
    }
}

/* --- */

static void wait_and_serve(int deaths)
{
    struct { int fd; short events, found; } polled[2 + 3 * MOST_COMMANDS] = {{line, POLLIN_, 0}, {deaths, POLLIN_, 0}};
    int count = 2;
    for (struct command *c = commands; c < commands + MOST_COMMANDS; c++) {
        if (!c->pid)
            continue;
        if (c->input_size && c->input >= 0)
            polled[count].fd = c->input, polled[count++].events = POLLOUT_;
        if (c->output >= 0 && (c->output_credit || c->forgotten))
            polled[count].fd = c->output, polled[count++].events = POLLIN_;
        if (c->errors >= 0 && (c->errors_credit || c->forgotten))
            polled[count].fd = c->errors, polled[count++].events = POLLIN_;
    }
    if (SYS(poll, polled, count, -1) <= 0)
        return;
    if (polled[0].found)
        hear();
    if (polled[1].found) {
        u8 information[128];
        SYS(read, deaths, information, sizeof information);
        reap();
    }
    for (struct command *c = commands; c < commands + MOST_COMMANDS; c++)
        if (c->pid)
            serve(c);
}

/* The program: `agent LINE [ROOT]`; with a second argument what it does is done in that directory as its root. */
__attribute__((used)) static void begin(long *top)
{
    long count = top[0];
    char **words = (char **)(top + 1);
    struct termios mode;
    u64 blocked = 1ull << (SIGCHLD - 1) | 1ull << (SIGPIPE - 1);
    u8 version[2] = {VERSION, 0};
    if (count < 2)
        SYS(exit_group, 2);
    line = (int)SYS(open, words[1], O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (line < 0 || SYS(ioctl, line, TCGETS, &mode))
        SYS(exit_group, 1);
    mode.c_iflag = mode.c_oflag = mode.c_lflag = 0;
    mode.c_cflag = (mode.c_cflag & ~(CSIZE | PARENB)) | CS8;
    mode.c_cc[VMIN] = 1, mode.c_cc[VTIME] = 0;
    SYS(ioctl, line, TCSETSF, &mode); /* what has come so far went through the other mode */
    if (count > 2 && (SYS(chroot, words[2]) || SYS(chdir, "/")))
        SYS(exit_group, 1);
    SYS(rt_sigprocmask, SIG_BLOCK, &blocked, 0, sizeof blocked);
    /* A shell has what it starts in the background ignore these; commands are to begin with none ignored. */
    const struct { void *handler; unsigned long flags; void *restorer; u64 mask; } usual = {0};
    SYS(rt_sigaction, SIGINT, &usual, 0, sizeof usual.mask);
    SYS(rt_sigaction, SIGQUIT, &usual, 0, sizeof usual.mask);
    u64 deaths_of = 1ull << (SIGCHLD - 1);
    int deaths = (int)SYS(signalfd4, -1, &deaths_of, sizeof deaths_of, O_CLOEXEC);
    u8 zero = 0;
    SYS(write, line, &zero, 1);
    send(READY, 0, version, sizeof version);
    for (;;)
        wait_and_serve(deaths);
}

__asm__(".globl _start\n_start:\n\txor %ebp, %ebp\n\tmov %rsp, %rdi\n\tand $-16, %rsp\n\tcall begin\n\thlt\n");
