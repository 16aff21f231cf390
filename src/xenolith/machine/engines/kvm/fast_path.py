"""The fast path: system calls, returns from them and the cheapest hypercalls, without an exit to Python.

For hosts where an exit is dear and SYSCALL arrives at CPL 3 (`HostTraits.syscall_cpl`), and where guest code may write
its segment bases.  What needs no privilege is code at CPL 3, on a page that LSTAR points to.  The one thing that does,
the change of page tables between guest-user and guest-kernel mode, is INT3 to a *gate*, a few instructions at CPL 0.

**Two views.**  A guest kernel's L4 tables map the hypervisor area in another view than those of its programs
(`Engine.kernel_l4_entries`): the same address holds the code for system calls in one and that for hypercalls in the
other, and the data is in the kernel's view alone.  So the mode a vCPU is in *is* the table it is on, and nothing
depends on what guest code says it is.

**What a guest can do with it.**  The code at CPL 3 is the guest's to jump into, and its data the guest kernel's to
write, at any time.  The gates lead to nothing but the vCPU's own two tables, which the hypervisor has validated, at
CPL 3, so a guest kernel can only confuse itself; what Python takes back from the data (`leave`) it checks.  A program
can reach only its own view: the gate, which goes on at `landing`.  It may jump to the INT3 itself, with flags that
SYSCALL would have cleared and with which no kernel must run (AC): so `landing` looks at them once more.

**Ticks.**  While a program computes, KVM's local timer interrupts it in time for each tick of its kernel, and the gate
for that leads to code which does what the hypervisor would: the event becomes pending, the upcall is bounced.  `run.c`
sets the timer (`start_ticks`); any exit ends it.

**Interruptions.**  Whatever stops the vCPU within this code, a kick or a fault, is undone by `roll_back`: the
SYSCALL instruction has just been executed, and Python, which remains the reference for all of it, carries it out.  A
tick becomes a timer that is due.

The listings are in fast_path_code.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import TYPE_CHECKING, Final

from xenolith.abi.hypercalls import HYPERVISOR_iret
from xenolith.abi.layout import FLAT_RING3_CS64, FLAT_RING3_SS64
from xenolith.abi.x86 import (
    CS,
    GS_BASE,
    MASK64,
    PAGE_SHIFT,
    PAGE_SIZE,
    R11,
    RAX,
    RCX,
    RFLAGS,
    RIP,
    RSP,
    SS,
    is_canonical,
)
from xenolith.machine.engines.kvm import area, run_page
from xenolith.machine.engines.kvm.alarm import host_tick_ns
from xenolith.machine.engines.kvm.fast_path_code import (
    AT,
    GATE_IN_AT,
    GATE_IN_CODE,
    GATE_OUT_AT,
    GATE_OUT_CODE,
    GATE_TICK_AT,
    GATE_TICK_CODE,
    NO_SELECTOR,
    NO_TIMER,
    NOTHING,
    TICKS,
    TIMER_SLOP,
    USER,
    WITHOUT_RCX,
    WORD,
    kernel_code,
)
from xenolith.machine.engines.protocol import ALWAYS_SET, ENTRY_FLAGS, TRAP_NOTHING, TRAP_SYSCALL
from xenolith.machine.native import buffer_address

if TYPE_CHECKING:
    from xenolith.machine.engines.kvm.alarm import Alarm
    from xenolith.machine.engines.kvm.native_run import KvmFields
    from xenolith.machine.engines.kvm.run_page import RunPage
    from xenolith.machine.engines.protocol import ModeSwitchState
    from xenolith.machine.memory import MachineMemory

_USER_RIP: Final = (1 << 47) - 1
_pack_fields = Struct("<11Q").pack_into  # those before `rip`


class FastPath:
    """The fast path of one vCPU. All but `follow` is called around KVM_RUN."""

    def __init__(
        self,
        memory: MachineMemory,
        pages: area.CpuPages,
        regs: memoryview,
        page: RunPage,
        has_view: Callable[[int, int], bool],
        info_moved: Callable[[], None],
        alarm: Alarm,
        shared: KvmFields,
    ) -> None:
        self._memory = memory
        self._alarm = alarm
        self._info_moved = info_moved  # a present entry of the area changed
        self._has_view = has_view  # whether an L4 maps the area in that view
        self._pages = pages
        self._data = pages.data
        self._data_bytes = pages.data.cast("B")
        self._list = pages.list
        self._regs = regs
        self._page = page
        self._modes: ModeSwitchState | None = None
        self._info = -1  # machine address that the code was made for
        self.timer_told = False  # the hypervisor was told of a timer: it had better look for events
        self._shared = shared
        shared.data = buffer_address(pages.data)
        shared.kernel_code, shared.user_code = buffer_address(pages.kernel_code), buffer_address(pages.user_code)
        shared.code_va = code = pages.code_va
        shared.slow[:] = USER.labels["slow"], AT["slow"]
        shared.landing_slow, shared.iret_slow = AT["landing_slow"], AT["iret_slow"]
        for on in (False, True):
            shared.kernel_start[on][:] = b"\xe9" + (AT["hypercall" if on else "slow"] - 5).to_bytes(4, "little")
            shared.user_start[on][:] = USER.code[:2] if on else bytes((0xEB, USER.labels["slow"] - 2))
        shared.gate_rips[:] = code + AT["landing"], code + AT["gate"] + 1
        shared.shared_va = pages.shared_va
        pages.list[area.TICK_CR3], pages.list[area.TICK_RIP] = area.NO_CR3, code + AT["tick"]
        pages.user_code[: len(USER.code)] = USER.code
        self._make_kernel_code(0)
        self._turn(False)

    def attach(self, modes: ModeSwitchState | None) -> None:
        """Whose modes to switch; None: nobody's."""
        self._modes = modes
        self._shared.info = NOTHING
        if modes is None:
            self._turn(False)

    def alarm_is_off(self) -> None:
        """The alarm goes to another thread now, and has to be set anew."""
        self._shared.look = 0
        self._shared.alarm, self._shared.has_alarm = self._alarm.timer, True
        self._shared.host_tick = host_tick_ns()

    @property
    def on(self) -> bool:
        """Whether it is in use now."""
        return self._shared.on

    def enter(self) -> None:
        """Before the guest runs."""
        modes = self._modes
        if modes is None:
            return
        shared = self._shared
        if (
            modes.kernel_l4 != shared.kernel_l4
            or modes.user_l4 != shared.user_l4
            or modes.info != shared.info
            or modes.syscall_callback != shared.callback
            or modes.syscall_masks_events != shared.masks_events
            or (shared.on and modes.architectural_iopl)
        ):
            self._configure(modes)
        if not shared.on:
            return
        regs = self._regs
        if not modes.kernel_mode and not modes.compatibility:
            shared.pair_cs, shared.pair_ss = regs[CS] & 0xFFFF, regs[SS] & 0xFFFF
        look = modes.timer_look
        if look and look != shared.look:
            left = modes.until(look)
            if left > 0:
                shared.look = look
                self._alarm.set(left)
            else:  # nobody would look again: the guest's timer is to be told of
                modes.timer_look = look = 0
        known = (shared.pair_cs, shared.pair_ss) in modes.flat_selectors
        _pack_fields(
            self._data_bytes,
            0,
            modes.kernel_sp & MASK64,
            modes.kernel_ss,
            modes.other_gs_base,
            modes.syscall_callback,
            shared.pair_cs if known else NO_SELECTOR,
            shared.pair_ss,
            modes.nmi_masked,
            modes.vcpu_id,
            look - TIMER_SLOP if look else NO_TIMER,
            0,
            0,
        )

    def leave(self, l4_mfn: int) -> bool | None:
        """After the guest ran: take over what the fast path did.

        The mode (True: guest-kernel) if it may have changed.
        """
        data, modes, shared = self._data, self._modes, self._shared
        used = data[WORD["used"]]
        if modes is None or not shared.on:
            return None
        if not used and l4_mfn == (shared.kernel_l4 if modes.kernel_mode else shared.user_l4):
            return None
        modes.kernel_sp, modes.kernel_ss = data[WORD["kernel_sp"]], data[WORD["kernel_ss"]] & 0xFFFF
        modes.other_gs_base = _canonical(data[WORD["other_gs"]])
        syscalls = data[WORD["switches"]]
        if syscalls:
            data[WORD["switches"]] = 0
            modes.count_syscalls(syscalls & 0xFFFF_FFFF)
        if data[WORD["timer"]]:
            modes.set_timer_late(data[WORD["timer"]])
            self.timer_told = True
        modes.kernel_mode = kernel = l4_mfn == shared.kernel_l4
        regs = self._regs
        if used & 2 or not kernel:
            pair = shared.pair_cs, shared.pair_ss
            regs[CS], regs[SS] = (FLAT_RING3_CS64, FLAT_RING3_SS64) if kernel else pair
        return kernel

    def contains(self, address: int) -> bool:
        """Whether it lies in this vCPU's code."""
        return address & -PAGE_SIZE == self._pages.code_va

    def take_over(self, stopped_in_it: bool) -> int | None:
        """The guest has stopped, its registers are in the register file: take over what was done here.

        `stopped_in_it`: it was in this code.  The trap that the stop counts as: TRAP_SYSCALL, TRAP_NOTHING or None.
        """
        q, regs, shared = self._page.q, self._regs, self._shared
        l4_mfn = q[run_page.CR3] >> PAGE_SHIFT
        trap = None
        if stopped_in_it:
            l4_mfn, trap = self.roll_back(l4_mfn)
            regs[RFLAGS] = regs[RFLAGS] & ENTRY_FLAGS | ALWAYS_SET
            q[run_page.CR3] = l4_mfn << PAGE_SHIFT
        kernel_mode = self.leave(l4_mfn)
        if kernel_mode is not None:
            shared.l4_mfn, shared.user = l4_mfn, not kernel_mode
        return trap

    def roll_back(self, l4_mfn: int) -> tuple[int, int | None]:
        """The vCPU stopped in this code at CPL 3, its registers are in the register file; it was on this table.

        The table to be on, and what the stop counts as: TRAP_SYSCALL, just executed, TRAP_NOTHING,
        or None if the guest goes on at RIP.
        """
        regs, data = self._regs, self._data
        at = regs[RIP] - self._pages.code_va
        trap: int | None = TRAP_SYSCALL
        if not self.on or l4_mfn == self._shared.user_l4:
            pass
        elif AT["landing"] <= at < AT["landing_end"]:
            if at >= AT["landing_saved"]:
                if AT["landing_commit"] < at < AT["landing_slow"]:
                    self._undo_gs(at == AT["landing_store"])
                if AT["landing_stored"] < at < AT["landing_slow"]:
                    self._memory.b[self._info + 1] = 0
                self._restore_saved()
                regs[RSP] = data[WORD["saved_rsp"]]
            l4_mfn = self._shared.user_l4
        elif AT["tick"] <= at < AT["tick_end"]:
            if at > AT["tick_stack"]:
                regs[RSP] = data[WORD["saved_rsp"]]
            if at >= AT["tick_saved"]:
                if AT["tick_commit"] < at < AT["tick_slow"]:
                    self._undo_gs(at == AT["tick_store"])
                if AT["tick_masked"] <= at < AT["tick_slow"]:
                    self._memory.b[self._info + 1] = 0
                self._restore_saved()
            if at > AT["tick_moved"]:
                regs[RFLAGS] = data[WORD["tick_flags"]]
            l4_mfn = self._to_interrupted(data[WORD["tick_rip"]])
            if regs[RIP] & -PAGE_SIZE != self._pages.code_va:
                return l4_mfn, TRAP_NOTHING
        elif AT["iret"] <= at < AT["iret_end"]:
            if AT["gate"] <= at < AT["iret_slow"]:
                regs[RIP] = data[WORD["rip"]] & _USER_RIP
                return self._shared.user_l4, None
            if at >= AT["iret_saved"]:
                if AT["iret_commit"] < at < AT["gate"]:
                    self._undo_gs(at == AT["iret_store"])
                if at == AT["iret_flags"]:
                    regs[RSP] = regs[RSP] + 8 & MASK64
                self._restore_saved()
            regs[RAX] = HYPERVISOR_iret
        elif at == AT["back"]:
            trap = None
        elif at == AT["done_flags"]:
            regs[RSP] = regs[RSP] + 8 & MASK64
        elif any(AT[first] <= at < AT[last] for first, last in WITHOUT_RCX):
            regs[RCX] = data[WORD["saved_rcx"]]
        regs[RIP] = regs[RCX]
        regs[RFLAGS] = regs[R11]
        return l4_mfn, trap

    def finish_gate(self, rip: int) -> bool:
        """The vCPU stopped at CPL 0, at `rip`: if in a gate, it is as if it stopped before or behind it.

        False: not in a gate, or not by this vCPU's own INT3; nothing was changed then.
        """
        if rip & -PAGE_SIZE != area.GATES:
            return False
        regs, frame = self._regs, self._pages.gate_frame
        pushed, returns_to, selector, flags, stack, _ = frame
        for gate, start, own in (
            (GATE_IN_CODE, GATE_IN_AT, area.GATE_IN_RIP),
            (GATE_OUT_CODE, GATE_OUT_AT, area.GATE_OUT_RIP),
        ):
            at, labels = rip - start, gate.labels
            if 0 <= at < labels["other"]:
                if "exchanged" in labels and labels["exchanged"] <= at < labels["checked"]:
                    returns_to = regs[RAX]
                if at < labels["checked"] and returns_to != self._list[own]:
                    return False
                if 0 < at <= labels["tail"]:
                    regs[RAX] = pushed
                regs[RIP] = self._pages.code_va + USER.labels["gate"]
                if gate is GATE_OUT_CODE:
                    regs[RIP] = self._data[WORD["rip"]] & _USER_RIP
                self._leave_gate(flags, stack)
                return True
        at, labels = rip - GATE_TICK_AT, GATE_TICK_CODE.labels
        if not 0 <= at < labels["other"] or not selector & 3:
            return False
        if at == labels["exchanged"]:
            returns_to = regs[RAX]
        elif at > labels["exchanged"]:
            returns_to = self._data[WORD["tick_rip"]]
        if labels["pushed"] <= at <= labels["stored"]:
            regs[RAX] = pushed
        self._to_interrupted(returns_to)
        self._leave_gate(flags, stack)
        return True

    def _leave_gate(self, flags: int, stack: int) -> None:
        """The vCPU is at CPL 3 again, on the table of its programs."""
        regs = self._regs
        regs[RSP], regs[RFLAGS] = stack, flags & ENTRY_FLAGS | ALWAYS_SET
        self._page.q[run_page.CR3] = self._shared.user_l4 << PAGE_SHIFT

    def _to_interrupted(self, rip: int) -> int:
        """The vCPU is to go on where the local timer interrupted it, on the table that this gives."""
        self.timer_told = True
        self._regs[RIP] = rip
        return self._shared.user_l4

    def stop_ticks(self) -> None:
        """There are no more: take over what was delivered."""
        self._list[area.TICK_CR3] = area.NO_CR3
        self._shared.look = 0  # nor is there an alarm
        count = TICKS - self._data[WORD["ticks_left"]]
        if self._modes is not None and 0 < count <= TICKS:
            self._modes.count_ticks(count, self._shared.tick_length)

    def _undo_gs(self, in_rcx: bool) -> None:
        regs, data = self._regs, self._data
        other = regs[RCX] if in_rcx else data[WORD["other_gs"]]
        data[WORD["other_gs"]], regs[GS_BASE] = regs[GS_BASE], _canonical(other)

    def _restore_saved(self) -> None:
        regs, data = self._regs, self._data
        regs[RCX], regs[R11] = data[WORD["saved_rcx"]], data[WORD["saved_r11"]]

    # --- turning it on and off ----------------------------------------------------------------------------

    def _configure(self, modes: ModeSwitchState) -> None:
        self._turn(False)
        shared = self._shared
        shared.kernel_l4, shared.user_l4 = kernel, user = modes.kernel_l4, modes.user_l4
        shared.info, shared.callback = modes.info, modes.syscall_callback
        shared.masks_events = modes.syscall_masks_events
        shared.info_mapped = modes.info == self._info
        if not (user and kernel and modes.syscall_callback and modes.syscall_masks_events) or modes.architectural_iopl:
            return
        if not (self._has_view(kernel, area.KERNEL_VIEW) and self._has_view(user, area.USER_VIEW)):
            return
        if modes.info != self._info:
            if self._pages.map_info(modes.info >> PAGE_SHIFT, modes.shared_info >> PAGE_SHIFT):
                self._info_moved()
            self._make_kernel_code(modes.info & PAGE_SIZE - 1)
            self._info = modes.info
            shared.info_mapped = True
        self._list[area.KERNEL_CR3], self._list[area.USER_CR3] = kernel << PAGE_SHIFT, user << PAGE_SHIFT
        self._turn(True)

    def _make_kernel_code(self, info_offset: int) -> None:
        code = kernel_code(info_offset).code
        self._pages.kernel_code[: len(code)] = code

    def _turn(self, on: bool) -> None:
        """While it is off both views begin with a jump to where they leave for Python, and the gates are closed."""
        shared = self._shared
        shared.on = on
        self._pages.kernel_code[:5] = bytes(shared.kernel_start[on])
        self._pages.user_code[:2] = bytes(shared.user_start[on])
        gates = self._list
        gates[area.GATE_IN_RIP], gates[area.GATE_OUT_RIP] = shared.gate_rips if on else (area.NO_RIP, area.NO_RIP)
        if not on:
            gates[area.KERNEL_CR3] = gates[area.USER_CR3] = gates[area.TICK_CR3] = area.NO_CR3


def _canonical(address: int) -> int:
    """The address, or 0 where it is none: no processor would have taken it."""
    return address if is_canonical(address) else 0
