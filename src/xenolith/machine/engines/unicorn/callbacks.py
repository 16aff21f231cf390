"""What Unicorn's hooks call: Python for every trap where there is no native code, else deliver.c, which leaves some."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from xenolith.abi.x86 import (
    DR6_STEP,
    EFLAGS_TF,
    OPCODE_RDPMC,
    RFLAGS,
    RIP,
    VECTOR_DB,
    VECTOR_GP,
    VECTOR_SS,
    VECTOR_UD,
    advanced,
)
from xenolith.machine.engines import segment_loads
from xenolith.machine.engines.protocol import TRAP_CPUID, TRAP_SYSCALL, TRAP_SYSENTER, EngineError, TrapHandler
from xenolith.machine.engines.unicorn import layout, library, stubs
from xenolith.machine.engines.unicorn.deliver import SERIALIZES, Hook
from xenolith.machine.engines.unicorn.deliver import library as deliver_library
from xenolith.machine.native import function_address
from xenolith.machine.operands import LONGEST_INSTRUCTION, GuestFault, decode, is_stack_fault

if TYPE_CHECKING:
    from xenolith.machine.engines.unicorn.cpu import UnicornCpu
    from xenolith.machine.engines.unicorn.instance import Instance
    from xenolith.machine.engines.unicorn.watchpoints import Watcher

INT1: Final = b"\xf1"
CPUID: Final = b"\x0f\xa2"
NO_FAR_TRANSFER: Final = (b"", b"\x0f", b"\x62", b"\xc4", b"\xc5", INT1)  # first bytes of other undefined opcodes
_DR6: Final = layout.DR // 8 + 6


def no_handler(vector: int, error_code: int, address: int) -> bool:
    raise EngineError(f"trap {vector} outside run")


class Callbacks:
    """Has every trap of a UnicornCpu call `handler`; what that raises stops the guest and is kept in `failure`."""

    def __init__(
        self,
        cpu: UnicornCpu,
        instance: Instance,
        hook: Hook,
        watcher: Watcher,
        code: Callable[[int, int], bytes | None],
    ) -> None:
        """`code` gives so many bytes of the instruction at RIP, from an offset on."""
        self.handler: TrapHandler = no_handler
        self.failure: BaseException | None = None
        self._cpu, self._hook, self._watcher, self._code = cpu, hook, watcher, code
        self._regs, self._q = cpu.regs, instance.q
        # RIP after a system call that began single-stepping, or a SYSENTER that ended it: Unicorn reports a step there.
        self._step_from = -1
        handlers = self._system_call, self._interrupt, self._invalid, self._cpuid
        native = deliver_library()
        self._in_python = tuple(library.TrapCallback(each if native else self._noting(each)) for each in handlers)
        hook.system_call, hook.interrupt, hook.invalid, hook.cpuid = map(function_address, self._in_python)
        if native is None:
            self._add(instance, *self._in_python)
            return
        if instance.softmmu is not None:
            instance.softmmu.system_call = function_address(native.deliver_system_call)
            instance.softmmu.hook = ctypes.addressof(hook)
        self._add(
            instance,
            native.deliver_system_call,
            native.deliver_interrupt,
            native.deliver_invalid,
            native.deliver_cpuid,
        )

    def _add(self, instance: Instance, system_call: Any, interrupt: Any, invalid: Any, cpuid: Any) -> None:
        """Have Unicorn call these."""
        hook = partial(instance.hook, at=ctypes.addressof(self._hook))
        hook(library.UC_HOOK_INTR, stubs.INTERRUPT, deliver=interrupt, deliver_cpuid=cpuid)
        hook(library.UC_HOOK_INSN_INVALID, stubs.INVALID, deliver_invalid=invalid)
        for instruction, trap in (
            (library.UC_X86_INS_SYSCALL, TRAP_SYSCALL),
            (library.UC_X86_INS_SYSENTER, TRAP_SYSENTER),
        ):
            hook(library.UC_HOOK_INSN, stubs.SYSTEM_CALL, instruction, trap, deliver=system_call)
        for instruction, trap in (
            (library.UC_X86_INS_CPUID, TRAP_CPUID),
            (library.UC_X86_INS_IN, VECTOR_GP),
            (library.UC_X86_INS_OUT, VECTOR_GP),
        ):
            hook(library.UC_HOOK_INSN, stubs.RAISE_FAULT, instruction, trap)

    def _noting(self, handler: TrapHandler) -> TrapHandler:
        """A handler that notes whether the guest single-steps what comes next."""

        def noting(vector: int, error_code: int, address: int) -> bool:
            more = handler(vector, error_code, address)
            if self._hook.watches:
                self._hook.steps = bool(self._regs[RFLAGS] & EFLAGS_TF)
            return more

        return noting

    def _deliver(self, vector: int, error_code: int, address: int) -> bool:
        self._hook.far_transfers = 0
        try:
            return self.handler(vector, error_code, address)
        except BaseException as failure:
            self.failure = failure
            return False

    def _system_call(self, vector: int, error_code: int, address: int) -> bool:
        regs = self._regs
        stepped = regs[RFLAGS] & EFLAGS_TF  # this bit, unlike the status flags, is always current
        more = self._deliver(vector, error_code, address)
        if regs[RFLAGS] & EFLAGS_TF or (stepped and vector == TRAP_SYSENTER):
            self._step_from = regs[RIP]
        return more

    def _interrupt(self, vector: int, error_code: int, address: int) -> bool:
        if self._hook.watches:
            dr6 = self._watcher.trap(vector, self._q[_DR6])
            if vector == VECTOR_DB:
                if dr6 is None:
                    self._q[_DR6] &= ~DR6_STEP
                    return True
                address = self._q[_DR6] = dr6
        if vector == VECTOR_DB and self._step_from == self._regs[RIP]:
            self._step_from = -1
            return True
        if vector == VECTOR_GP and not error_code and self._is_stack_fault():
            vector = VECTOR_SS  # to QEMU, all addresses that are not canonical are the same
        return self._deliver(vector, error_code, address)

    def _invalid(self, vector: int, error_code: int, address: int) -> bool:
        if vector == VECTOR_UD:
            code = self._code(2, 0) or self._code(1, 0) or b""
            if code[:1] not in NO_FAR_TRANSFER:
                try:
                    done = segment_loads.carry_out(self._cpu)
                except GuestFault as fault:
                    return self._deliver(fault.vector, fault.error_code, fault.address)
                if done is not None:
                    segment_loads.note_far_transfer(self._cpu)
                    self._hook.far_transfers += 1
                    self._hook.serializes |= self._hook.far_transfers > SERIALIZES
                    return not done.steps or self._deliver(*segment_loads.STEPPED)
            if code == OPCODE_RDPMC:  # this and the next Unicorn takes for invalid
                return self._deliver(VECTOR_GP, 0, 0)
            if code[:1] == INT1:
                self._regs[RIP] = advanced(self._regs[RIP], 1)
                return self._deliver(VECTOR_DB, 0, self._q[_DR6])
        return self._deliver(vector, error_code, address)

    def _cpuid(self, vector: int, error_code: int, address: int) -> bool:
        prefixes = 0
        while self._code(2, prefixes) != CPUID and prefixes < LONGEST_INSTRUCTION:
            prefixes += 1
        self._regs[RIP] = advanced(self._regs[RIP], prefixes + len(CPUID))
        return self._deliver(vector, error_code, address)

    def _is_stack_fault(self) -> bool:
        """Whether the #GP of the instruction at RIP is a #SS."""
        cpu, rip, wide = self._cpu, self._regs[RIP], self._cpu.runs_64_bit_code
        try:
            return wide and is_stack_fault(cpu.regs, decode(cpu.view.fetch(rip), rip, wide), wide)
        except GuestFault:
            return False
