/* Faults: the trap table, and coming back from those that a check asked for. */
#include "traps.h"

struct fault fault = {.vector = NO_FAULT};
u64 fault_elsewhere;
bool (*trap_hook)(struct regs *);

struct fixup {
    u64 start, end;
};
extern const struct fixup fixups_start[], fixups_end[]; /* guest.lds */

#define ENTRY(vector, flags)                                                       \
    {                                                                              \
        vector, flags, FLAT_RING3_CS64, (u64)trap_##vector                         \
    }
#define DECLARE(vector) extern void trap_##vector(void)
DECLARE(0), trap_1(void), trap_2(void), trap_3(void), trap_4(void), trap_5(void), trap_7(void), trap_8(void);
DECLARE(9), trap_10(void), trap_11(void), trap_12(void), trap_13(void), trap_14(void), trap_15(void), trap_16(void);
DECLARE(17), trap_18(void), trap_19(void), trap_0x80(void);

struct trap_info trap_table[] = {
    ENTRY(0, 4),  ENTRY(1, 4),  ENTRY(2, 4),     ENTRY(3, 7),     ENTRY(4, 7),     ENTRY(5, 4),  ENTRY(6, 4),
    ENTRY(7, 4),  ENTRY(8, 4),  ENTRY(9, 4),     ENTRY(10, 4),    ENTRY(11, 4),    ENTRY(12, 4), ENTRY(13, 4),
    ENTRY(14, 4), ENTRY(15, 4), ENTRY(16, 4),    ENTRY(17, 4),    ENTRY(18, 4),    ENTRY(19, 4), ENTRY(0x21, 7),
    ENTRY(0x42, 7), ENTRY(0x80, 7), {0, 0, 0, 0},
};

void trap(struct regs *regs);

void traps_install(void)
{
    check_eq("set_trap_table", HYPERCALL(HC_set_trap_table, trap_table), 0);
}

void trap_set(u8 vector, u8 flags, void (*entry)(void))
{
    struct trap_info one[2] = {{vector, flags, FLAT_RING3_CS64, (u64)entry}, {0, 0, 0, 0}};
    HYPERCALL(HC_set_trap_table, one);
}

long callback_register(u16 type, u16 flags, void (*entry)(void))
{
    struct {
        u16 type, flags;
        u64 address;
    } callback = {type, flags, (u64)entry};
    return HYPERCALL(HC_callback_op, CALLBACKOP_register, &callback);
}

static void unexpected(struct regs *regs)
{
    print("UNEXPECTED TRAP vector %ld error 0x%lx rip 0x%lx cs 0x%lx rsp 0x%lx cr2 0x%lx\n", regs->vector, regs->error,
          regs->rip, regs->cs, regs->rsp, shared_info->vcpu[0].cr2);
    shut_down(SHUTDOWN_crash);
}

void trap(struct regs *regs)
{
    if (trap_hook && trap_hook(regs))
        return;
    u64 resume = 0;
    for (const struct fixup *f = fixups_start; f < fixups_end; f++)
        if (regs->rip >= f->start && regs->rip <= f->end)
            resume = f->end;
    if (!resume) {
        resume = fault_elsewhere;
        fault_elsewhere = 0;
    }
    if (!resume)
        unexpected(regs);
    fault = (struct fault){regs->vector, regs->error, regs->rip,           regs->cs, regs->rflags,
                           regs->rsp,    shared_info->vcpu[0].cr2};
    regs->rflags &= ~0x100ul; /* no more single steps */
    regs->cs = FLAT_RING3_CS64 & ~3; /* the fault may have been about these two */
    regs->ss = FLAT_RING3_SS;
    regs->rip = resume;
}
