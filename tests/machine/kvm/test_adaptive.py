"""A vCPU that moves between KVM and Unicorn while it runs keeps every bit of its state."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from struct import pack, unpack

import pytest

from xenolith.abi.x86 import (
    CS,
    EFLAGS_CF,
    FS_BASE,
    PAGE_SHIFT,
    R8,
    R15,
    RAX,
    RBX,
    RCX,
    RDI,
    RDX,
    RIP,
    RSP,
    SS,
    VECTOR_DB,
    VECTOR_GP,
    VECTOR_NM,
    VECTOR_PF,
    VECTOR_UD,
)
from xenolith.machine import native
from xenolith.machine.engines.adaptive.engine import (
    BOOT_PATIENCE,
    POLICY_KVM,
    POLICY_MEASURED,
    POLICY_ON_REQUEST,
    AdaptiveCpu,
    AdaptiveEngine,
)
from xenolith.machine.engines.adaptive.placement import Placement
from xenolith.machine.engines.native_state import GO_ON, NOT_HANDLED, UNLIMITED
from xenolith.machine.engines.protocol import TRAP_CPUID, TRAP_SYSCALL, CpuState

from .bare import CODE, DATA, GDT, STACK_TOP, TABLE, Machine
from .test_run import NativeModes

ENGINES = ("kvm", "unicorn")


class AdaptiveMachine(Machine):
    def make_engine(self) -> AdaptiveEngine:  # type: ignore[override]
        return AdaptiveEngine(self.memory)

    def adaptive_cpu(self) -> AdaptiveCpu:
        cpu = self.engine.cpu(0)
        assert isinstance(cpu, AdaptiveCpu)
        cpu.policy = POLICY_ON_REQUEST
        state = CpuState(l4_mfn=self.l4, gdt_va=GDT, gdt_limit=0xFFF, xcr0=self.engine.xcr0_mask)
        state.regs[CS], state.regs[SS] = 0xE033, 0xE02B
        cpu.load(state)
        cpu.regs[RSP] = STACK_TOP
        cpu.executable_mapped(self.code)
        return cpu

    def on(self, cpu: AdaptiveCpu, engine: str, code: str | None = None, offset: int = 0) -> tuple[int, int, int]:
        """Run from CODE + offset to the first trap, on that engine."""
        if code is not None:
            self.write_code(code, offset)
            cpu.code_written(self.code)
        cpu.request_move(engine)
        cpu.regs[RIP] = CODE + offset
        return self.go_on(cpu)

    def engines(
        self, cpu: AdaptiveCpu, code: str, count: int, meanwhile: Callable[[int], None] = lambda _: None
    ) -> list[str]:
        """Where each of `count` traps of this code finds the vCPU; `meanwhile` gets each one's number, from 1 on."""
        self.write_code(code)
        cpu.code_written(self.code)
        cpu.regs[RIP] = CODE
        seen: list[str] = []

        def on_trap(_vector: int, _error_code: int, _address: int) -> bool:
            seen.append(cpu.running_on)
            meanwhile(len(seen))
            return len(seen) < count

        while len(seen) < count:
            cpu.run(on_trap)
        return seen

    def go_on(self, cpu: AdaptiveCpu) -> tuple[int, int, int]:
        traps: list[tuple[int, int, int]] = []

        def on_trap(vector: int, error_code: int, address: int) -> bool:
            traps.append((vector, error_code, address))
            return False

        while not traps:
            cpu.run(on_trap)
        return traps[0]


@pytest.fixture
def machine() -> Iterator[AdaptiveMachine]:
    made = AdaptiveMachine()
    yield made
    made.close()


def test_general_registers_flags_and_bases_survive_every_move(machine: AdaptiveMachine) -> None:
    cpu = machine.adaptive_cpu()
    for register in range(16):
        cpu.regs[register] = 0x1234_5678_9ABC_DE00 + register
    cpu.regs[RSP] = STACK_TOP
    cpu.regs[FS_BASE] = DATA
    cpu.set_rflags(EFLAGS_CF | 0x400)
    before = cpu.regs[: R15 + 1].tolist()
    for number in range(20):
        engine = ENGINES[number % 2]
        assert machine.on(cpu, engine, "0f 0b") == (VECTOR_UD, 0, 0)
        assert cpu.running_on == engine
        assert cpu.regs[: R15 + 1].tolist() == before
        assert cpu.regs[FS_BASE] == DATA
        assert cpu.get_rflags() & 0xFFF == EFLAGS_CF | 0x400 | 0x202
    assert cpu.moves >= 19


def test_what_one_engine_writes_the_other_reads(machine: AdaptiveMachine) -> None:
    cpu = machine.adaptive_cpu()
    cpu.regs[RDI] = DATA
    for number in range(10):
        cpu.regs[RAX] = number
        machine.on(cpu, ENGINES[number % 2], "48 89 07 0f 0b")
        cpu.regs[RAX] = 0
        machine.on(cpu, ENGINES[(number + 1) % 2], "48 8b 07 0f 0b")
        assert cpu.regs[RAX] == number


def test_code_changed_on_kvm_is_not_stale_on_unicorn(machine: AdaptiveMachine) -> None:
    """The guest rewrites its own code on one engine and runs it on the other, to and fro."""
    cpu = machine.adaptive_cpu()
    alias = DATA + 0x20_0000
    machine.memory.q[machine.entry(alias)] = machine.code << PAGE_SHIFT | TABLE
    machine.write_code("b8 00 00 00 00 0f 0b", 0x800)  # mov eax, imm; ud2
    machine.write_code("89 07 0f 0b")  # mov [rdi], eax; ud2
    cpu.code_written(machine.code)
    cpu.regs[RDI] = alias + 0x801
    for number in [1, 2, 1, 1, 3, 2, 1]:
        cpu.regs[RAX] = number
        assert machine.on(cpu, "kvm")[0] == VECTOR_UD
        assert machine.on(cpu, "unicorn", offset=0x800)[0] == VECTOR_UD
        assert cpu.regs[RAX] == number
        cpu.regs[RAX] = number + 100
        assert machine.on(cpu, "unicorn")[0] == VECTOR_UD
        assert machine.on(cpu, "unicorn", offset=0x800)[0] == VECTOR_UD
        assert cpu.regs[RAX] == number + 100
        assert machine.on(cpu, "kvm", offset=0x800)[0] == VECTOR_UD
        assert cpu.regs[RAX] == number + 100


def test_page_tables_changed_while_on_one_engine_hold_on_the_other(machine: AdaptiveMachine) -> None:
    cpu = machine.adaptive_cpu()
    machine.set_word(1)
    machine.set_word(2, page=1)
    machine.write_code("48 8b 07 0f 0b")
    cpu.regs[RDI] = DATA
    index = machine.entry(DATA)
    for number in range(12):
        change, use = ENGINES[number % 2], ENGINES[(number // 2 + 1) % 2]
        machine.on(cpu, change)
        target = number % 3
        machine.change_entry(index, machine.data[target] << PAGE_SHIFT | TABLE if target < 2 else 0)
        cpu.flush_page(DATA)
        vector, _, _ = machine.on(cpu, use)
        assert vector == (VECTOR_UD if target < 2 else VECTOR_PF)
        if target < 2:
            assert cpu.regs[RAX] == target + 1


def test_vector_registers_survive_whole(machine: AdaptiveMachine) -> None:
    """Unicorn has no upper halves; it must not lose them, nor may its SSE code change them."""
    if not machine.engine.xcr0_mask & 4:
        pytest.skip("this processor has no AVX")
    cpu = machine.adaptive_cpu()
    data = os.urandom(32)
    start = machine.data[0] << PAGE_SHIFT
    machine.memory.b[start : start + 32] = data
    cpu.regs[RDI] = DATA
    machine.on(cpu, "kvm", "c5 fe 6f 1f 0f 0b")  # vmovdqu ymm3, [rdi]
    machine.on(cpu, "unicorn", "66 0f ef db 0f 0b")  # pxor xmm3, xmm3: legacy SSE, the upper half stays
    assert cpu.running_on == "unicorn"
    machine.on(cpu, "kvm", "c5 fe 7f 5f 20 0f 0b")
    assert machine.memory.b[start + 32 : start + 48] == bytes(16)
    assert machine.memory.b[start + 48 : start + 64] == data[16:]


def test_a_wide_instruction_on_unicorn_moves_to_kvm_and_is_executed(machine: AdaptiveMachine) -> None:
    if not machine.engine.xcr0_mask & 4:
        pytest.skip("this processor has no AVX")
    cpu = machine.adaptive_cpu()
    data = os.urandom(32)
    start = machine.data[0] << PAGE_SHIFT
    machine.memory.b[start : start + 32] = data
    cpu.regs[RDI] = DATA
    code = "48 ff c0 c5 fe 6f 07 c5 fe 7f 47 20 48 ff c0 0f 0b"
    cpu.regs[RAX] = 0
    assert machine.on(cpu, "unicorn", code) == (VECTOR_UD, 0, 0)
    assert cpu.running_on == "kvm"
    assert cpu.regs[RAX] == 2
    assert machine.memory.b[start + 32 : start + 64] == data


def test_a_short_vex_instruction_has_three_operands_and_clears_the_upper_half(machine: AdaptiveMachine) -> None:
    """Which a translator that does not know VEX would not do."""
    if not machine.engine.xcr0_mask & 4:
        pytest.skip("this processor has no AVX")
    cpu = machine.adaptive_cpu()
    start = machine.data[0] << PAGE_SHIFT
    machine.memory.b[start : start + 96] = pack("<24I", *[1] * 8, *[10] * 8, *[100] * 8)
    cpu.regs[RDI] = DATA
    machine.on(cpu, "kvm", "c5 fe 6f 0f c5 fe 6f 57 20 c5 fe 6f 5f 40 0f 0b")  # vmovdqu ymm1..3, [rdi], +32, +64
    machine.on(cpu, "unicorn", "c5 e9 fe cb c5 fe 7f 0f 0f 0b")  # vpaddd xmm1, xmm2, xmm3; vmovdqu [rdi], ymm1
    assert unpack("<8I", machine.memory.b[start : start + 32]) == (110,) * 4 + (0,) * 4


def has_instruction(machine: AdaptiveMachine, code: str) -> bool:
    """Whether this processor has that form of XSAVE: XSAVEC is newer than the others, and no emulator has it."""
    return "0f c7 27" not in code or bool(machine.engine.host_cpuid(0xD, 1)[0] & 2)


@pytest.mark.parametrize(
    "code", ["0f ae 27", "0f 01 d0", "0f c7 27", "0f ae 2f"], ids=["xsave", "xgetbv", "xsavec", "xrstor"]
)
def test_extended_state_is_only_saved_where_all_of_it_is(machine: AdaptiveMachine, code: str) -> None:
    if not machine.engine.xcr0_mask & ~3 or not has_instruction(machine, code):
        pytest.skip("this processor has no wide state")
    cpu = machine.adaptive_cpu()
    cpu.regs[RDI] = DATA
    cpu.regs[RCX] = 0
    cpu.regs[RAX], cpu.regs[2] = 7, 0
    assert machine.on(cpu, "unicorn", code + " 0f 0b")[0] == VECTOR_UD
    assert cpu.running_on == "kvm"
    assert cpu.regs[RIP] == CODE + 3


def test_an_undefined_opcode_is_one_on_both(machine: AdaptiveMachine) -> None:
    cpu = machine.adaptive_cpu()
    for engine in ENGINES:
        assert machine.on(cpu, engine, "0f 0b 78 65 6e 0f a2") == (VECTOR_UD, 0, 0)
        assert cpu.running_on == engine
        assert machine.on(cpu, engine, "0f 04") == (VECTOR_UD, 0, 0)
        assert cpu.regs[RIP] == CODE


def test_cpuid_gives_the_same_answer_on_both_but_for_wide_vectors(machine: AdaptiveMachine) -> None:
    cpu = machine.adaptive_cpu()
    for leaf in (0, 1, 7, 0xD, 0x8000_0000, 0x8000_0001):
        answers = []
        for engine in ENGINES:
            cpu.regs[RAX], cpu.regs[RCX] = leaf, 0
            machine.on(cpu, engine, "0f a2 0f 0b")
            answers.append([cpu.regs[register] & 0xFFFF_FFFF for register in range(4)])
            if leaf == 1:
                answers[-1][RBX] &= 0x00FF_FFFF  # the APIC ID is that of the CPU which executed it
        on_kvm, on_unicorn = answers
        assert [own & told for own, told in zip(on_kvm, on_unicorn, strict=True)][1:] == on_unicorn[1:]
        if leaf == 1:
            assert not on_unicorn[1] & (1 << 27 | 1 << 28)  # OSXSAVE, AVX (in ECX)
        elif leaf == 7:
            assert not on_unicorn[3] & 1 << 5  # AVX2 (in EBX)
        else:
            assert on_kvm == on_unicorn


def test_on_unicorn_no_program_is_told_of_avx_whatever_the_native_handler_knows(machine: AdaptiveMachine) -> None:
    """A kernel asks by Xen's own instruction, and is told; the native handler remembers the answer."""
    cpu = machine.adaptive_cpu()

    def remembers(vector: int, _error_code: int, _address: int) -> int:
        if vector != TRAP_CPUID:
            return NOT_HANDLED
        cpu.regs[RCX] = 0xFFFF_FFFF
        cpu.regs[RIP] += 2
        return GO_ON

    cpu.attach(NativeModes(remembers))
    cpu.regs[RAX], cpu.regs[RCX] = 1, 0
    assert machine.on(cpu, "unicorn", "0f a2 0f 0b") == (VECTOR_UD, 0, 0)
    assert not cpu.regs[RCX] & (1 << 27 | 1 << 28)


def test_nobody_is_told_of_what_makes_kernels_slow_on_unicorn(machine: AdaptiveMachine) -> None:
    _, ebx, _, edx = machine.engine.host_cpuid(7, 0)
    _, host_ebx, _, host_edx = machine.engine.kvm.host_cpuid(7, 0)
    assert (ebx, edx) == (host_ebx & ~(1 << 9 | 1 << 31), host_edx & ~(1 << 4))  # ERMS, AVX512VL, FSRM


@pytest.mark.parametrize("restore_on", ENGINES)
@pytest.mark.parametrize("save_on", ENGINES)
@pytest.mark.parametrize("form", ["48 0f ae 27", "48 0f ae 37", "48 0f c7 27"], ids=["xsave", "xsaveopt", "xsavec"])
def test_what_is_saved_on_one_engine_is_restored_on_the_other(
    machine: AdaptiveMachine, form: str, save_on: str, restore_on: str
) -> None:
    """Unicorn's part is x87 and SSE; upper halves have waited in KVM and are saved with them."""
    if not machine.engine.xcr0_mask & 4 or not has_instruction(machine, form):
        pytest.skip("this processor has no AVX")
    cpu = machine.adaptive_cpu()
    data = os.urandom(32)
    start = machine.data[0] << PAGE_SHIFT
    machine.memory.b[start : start + 32] = data
    area = DATA + 0x1000
    cpu.regs[RDI] = area
    machine.on(cpu, "unicorn", "48 89 07 48 89 87 00 10 00 00 0f 0b")  # the pages are accessed and dirty
    cpu.regs[RDI] = DATA
    machine.on(cpu, "kvm", "db e3 d9 e8 c5 fe 6f 1f c5 7e 6f 07 0f 0b")  # fninit; fld1; vmovdqu ymm3 and ymm8, [rdi]
    cpu.regs[RDI], cpu.regs[RAX], cpu.regs[RDX] = area, 7, 0
    machine.on(cpu, save_on, form + " 0f 0b")
    assert cpu.running_on == save_on
    machine.on(cpu, "kvm", "db e3 c5 fc 77 0f 0b")  # fninit; vzeroall
    cpu.regs[RAX], cpu.regs[RDX] = 7, 0
    machine.on(cpu, restore_on, "48 0f ae 2f 0f 0b")
    # Upper halves are restored where they are, and whoever has them is likely to use them.
    assert cpu.running_on == "kvm"
    cpu.regs[RDI] = DATA
    machine.on(cpu, "kvm", "dd 5f 60 c5 fe 7f 5f 20 c5 7e 7f 47 40 0f 0b")  # fstp; vmovdqu [rdi + 32], ymm3; ..., ymm8
    assert machine.memory.b[start + 32 : start + 64] == data
    assert machine.memory.b[start + 64 : start + 96] == data
    assert machine.word(12) == 0x3FF0_0000_0000_0000


@pytest.mark.parametrize("save_on", ENGINES)
def test_state_without_upper_halves_is_saved_and_restored_on_unicorn(machine: AdaptiveMachine, save_on: str) -> None:
    form = "48 0f c7 27"
    if not machine.engine.xcr0_mask & ~3 or not has_instruction(machine, form):
        pytest.skip("this processor has no wide state")
    cpu = machine.adaptive_cpu()
    data = os.urandom(16)
    start = machine.data[0] << PAGE_SHIFT
    machine.memory.b[start : start + 16] = data
    area = DATA + 0x1000
    cpu.regs[RDI] = area
    machine.on(cpu, "unicorn", "48 89 07 48 89 87 00 10 00 00 0f 0b")
    cpu.regs[RDI] = DATA
    machine.on(cpu, "unicorn", "f3 0f 6f 1f 0f 0b")  # movdqu xmm3, [rdi]
    cpu.regs[RDI], cpu.regs[RAX], cpu.regs[RDX] = area, 0xFFFF_FFFF, 0xFFFF_FFFF
    machine.on(cpu, save_on, form + " 0f 0b")
    machine.on(cpu, "unicorn", "66 0f ef db 0f 0b")  # pxor xmm3, xmm3
    cpu.regs[RAX] = cpu.regs[RDX] = 0xFFFF_FFFF
    assert machine.on(cpu, "unicorn", "48 0f ae 2f 0f 0b") == (VECTOR_UD, 0, 0)
    assert cpu.running_on == "unicorn"
    cpu.regs[RDI] = DATA
    machine.on(cpu, "unicorn", "f3 0f 7f 5f 20 0f 0b")
    assert machine.memory.b[start + 32 : start + 48] == data


def test_an_xsave_that_faults_does_so_as_on_a_processor(machine: AdaptiveMachine) -> None:
    if not machine.engine.xcr0_mask & ~3:
        pytest.skip("this processor has no wide state")
    cpu = machine.adaptive_cpu()
    index = machine.entry(DATA + 0x1000)
    machine.change_entry(index, machine.memory.q[index] & ~2)  # read-only
    cpu.flush_tlb()
    cpu.regs[RDI] = DATA
    machine.on(cpu, "unicorn", "48 89 07 48 89 87 00 20 00 00 0f 0b")  # the pages around it are accessed and dirty
    pages = {DATA + 0x1000: 7, DATA + 0xFC0: 7, 0x7000: 6}
    for form in filter(partial(has_instruction, machine), ("48 0f ae 27", "48 0f ae 37", "48 0f c7 27")):
        for address, error_code in pages.items():
            cpu.regs[RDI], cpu.regs[RAX], cpu.regs[RDX] = address, 7, 0
            page = max(address, DATA + 0x1000) if address >= DATA else address
            assert machine.on(cpu, "unicorn", form + " 0f 0b") == (VECTOR_PF, error_code, page)
            assert (cpu.regs[RIP], cpu.running_on) == (CODE, "unicorn")
    cpu.regs[RDI] = 0x7000
    assert machine.on(cpu, "unicorn", "48 0f ae 2f 0f 0b") == (VECTOR_PF, 4, 0x7000)
    cpu.regs[RDI] = DATA + 8
    assert machine.on(cpu, "unicorn", form + " 0f 0b")[:2] == (VECTOR_GP, 0)
    assert cpu.regs[RIP] == CODE


@pytest.mark.parametrize("first", ENGINES)
def test_a_flat_selector_that_guest_code_loads_by_itself_goes_along_and_so_does_its_end(
    machine: AdaptiveMachine, first: str
) -> None:
    """A Linux kernel loads one, makes a hypercall, and loads 0; it forgets the FS base of who seems to have one."""
    machine.set_descriptor(0x28, 0x0000_FFFF, 0x00CF_F300)
    cpu = machine.adaptive_cpu()
    for between in ENGINES:
        machine.on(cpu, first, "b8 2b 00 00 00 8e e0 0f 0b")  # mov fs, 0x2b
        machine.on(cpu, between, "31 c0 8c e0 0f 0b")  # mov eax, fs
        assert cpu.regs[RAX] == 0x2B
        machine.on(cpu, first, "31 c0 8e e0 0f 0b")
        for engine in (*ENGINES, first):
            cpu.regs[RAX] = 1
            machine.on(cpu, engine, "8c e0 0f 0b")
            assert cpu.regs[RAX] & 0xFFFF == 0, engine


def test_the_task_switched_flag_is_honoured_on_every_host(machine: AdaptiveMachine) -> None:
    cpu = machine.adaptive_cpu()
    machine.on(cpu, "kvm", "0f 05 d9 e8 0f 0b")
    cpu.set_task_switched(True)
    assert machine.go_on(cpu) == (VECTOR_NM, 0, 0)
    cpu.set_task_switched(False)
    assert machine.go_on(cpu) == (VECTOR_UD, 0, 0)


def test_a_vcpu_returns_to_kvm_when_nothing_needs_unicorn_any_more(machine: AdaptiveMachine) -> None:
    cpu = machine.adaptive_cpu()
    cpu.policy = POLICY_KVM
    seen = machine.engines(cpu, "0f 05 eb fc", 200, lambda number: cpu.set_task_switched(number < 10))
    assert seen[5] == ("kvm" if machine.engine.kvm.traits.traps_task_switched else "unicorn")
    assert seen[-1] == "kvm"


@pytest.mark.parametrize(("program", "ends_on"), [(False, "unicorn"), (True, "kvm")])
def test_a_kernel_that_boots_is_not_kept_on_kvm_and_one_with_a_program_is(
    machine: AdaptiveMachine, program: bool, ends_on: str
) -> None:
    cpu = machine.adaptive_cpu()
    cpu.policy = POLICY_KVM
    cpu._placement = Placement(1_000_000, BOOT_PATIENCE)  # exits so dear that no other time counts, on whatever host
    modes = NativeModes(lambda *_: NOT_HANDLED)
    modes.user_l4 = machine.l4 if program else 0
    cpu.attach(modes)
    cpu.request_move("kvm")
    seen = machine.engines(cpu, "0f 05 eb fc", 200)
    assert (seen[0], seen[-1]) == ("kvm", ends_on)


def test_of_several_vcpus_none_leaves_kvm_and_native_code_may_handle_any_number_of_traps(
    machine: AdaptiveMachine,
) -> None:
    cpu = machine.adaptive_cpu()
    machine.engine.cpu(1)
    cpu.policy = POLICY_MEASURED
    modes = NativeModes(lambda *_: NOT_HANDLED)
    cpu.attach(modes)
    machine.write_code("0f 05 eb fc")
    cpu.regs[RIP] = CODE
    seen: list[tuple[str, int]] = []

    def on_trap(_vector: int, _error_code: int, _address: int) -> bool:
        seen.append((cpu.running_on, modes.native_budget))
        return len(seen) < 500

    while len(seen) < 500:
        cpu.run(on_trap)
    assert set(seen) == {("kvm", UNLIMITED)}


def test_a_program_starts_on_unicorn(machine: AdaptiveMachine) -> None:
    """When the guest makes an address space the vCPU leaves KVM, and stays away until CPUID may have been asked."""
    cpu = machine.adaptive_cpu()
    cpu.policy = POLICY_MEASURED
    modes = NativeModes(lambda *_: NOT_HANDLED)
    cpu.attach(modes)
    cpu.request_move("kvm")
    machine.write_code("0f 05 b9 40 42 0f 00 48 ff c9 75 fb eb f2")  # syscall; mov ecx, 1000000; dec/jnz; again
    cpu.code_written(machine.code)
    cpu.regs[RIP] = CODE
    seen: list[str] = []

    def on_trap(_vector: int, _error_code: int, _address: int) -> bool:
        seen.append(cpu.running_on)
        if len(seen) == 10:
            modes.new_space = True
        return len(seen) < 11 or seen[-1] != "kvm"

    while len(seen) < 11 or seen[-1] != "kvm":
        cpu.run(on_trap)
    assert seen[:10] == ["kvm"] * 10
    assert seen[10] == "unicorn"
    assert not modes.new_space


def test_the_time_for_translation_is_known(machine: AdaptiveMachine) -> None:
    if native.missing() is not None:
        pytest.skip(f"no native code here: {native.missing()}")
    cpu = machine.engine.unicorn.cpu(0)
    if cpu._instance.softmmu is None:
        pytest.skip("this process has made its first Unicorn without native code, which holds for all its others")
    before = cpu.translation_ns
    machine.on(machine.adaptive_cpu(), "unicorn", "48 ff c0 0f 0b")
    assert before < cpu.translation_ns < before + 10**9


def test_breakpoints_are_honoured_on_every_host(machine: AdaptiveMachine) -> None:
    cpu = machine.adaptive_cpu()
    machine.on(cpu, "kvm", "0f 05 90 90 0f 0b")
    cpu.set_debug(0, CODE + 3)
    cpu.set_debug(7, 0x402)
    assert machine.go_on(cpu)[0] == VECTOR_DB
    assert cpu.regs[RIP] == CODE + 3
    cpu.set_debug(7, 0x400)
    assert machine.go_on(cpu) == (VECTOR_UD, 0, 0)


def test_selectors_read_back_as_loaded_on_every_host(machine: AdaptiveMachine) -> None:
    machine.set_descriptor(0x68, 0x0010_0FFF, 0x0040_F360)
    cpu = machine.adaptive_cpu()
    cpu.regs[RAX] = 0x6B
    machine.on(cpu, "kvm", "8e e0 0f 05 31 c0 8c e0 0f 0b")  # mov fs, eax; syscall; mov eax, fs; ud2
    assert machine.go_on(cpu)[0] == VECTOR_UD
    assert cpu.regs[RAX] == 0x6B


def test_one_instruction_of_kvms_between_two_that_need_unicorn(machine: AdaptiveMachine) -> None:
    if not machine.engine.xcr0_mask & 4 or machine.engine.kvm.traits.keeps_selectors:
        pytest.skip("nothing here needs both engines at once")
    machine.set_descriptor(0x68, 0x0010_0FFF, 0x0040_F360)
    cpu = machine.adaptive_cpu()
    cpu.regs[RAX] = 0x6B
    cpu.regs[RDI] = DATA
    # mov fs, eax; syscall; vmovdqu ymm0, [rdi]; mov eax, fs; vmovdqu [rdi + 32], ymm0; mov ebx, fs; pushf; pop rcx; ud2
    machine.on(cpu, "kvm", "8e e0 0f 05 c5 fe 6f 07 31 c0 8c e0 c5 fe 7f 47 20 8c e3 9c 59 0f 0b")
    machine.set_word(0x1234)
    assert machine.go_on(cpu) == (VECTOR_UD, 0, 0)
    assert cpu.running_on == "unicorn"
    assert (cpu.regs[RAX], cpu.regs[3] & 0xFFFF, machine.word(4)) == (0x6B, 0x6B, 0x1234)
    assert not (cpu.regs[RCX] | cpu.get_rflags()) & 0x100
    # a fault in such an instruction is the guest's
    cpu.regs[RDI] = 0x7000
    assert machine.on(cpu, "kvm", "c5 fe 6f 07") == (VECTOR_PF, 4, 0x7000)
    assert not cpu.get_rflags() & 0x100


def test_the_task_switched_flag_concerns_wide_instructions_too(machine: AdaptiveMachine) -> None:
    cpu = machine.adaptive_cpu()
    machine.on(cpu, "kvm", "0f 05")
    cpu.set_task_switched(True)
    wide = ["c5 fe 6f 07"] if machine.engine.xcr0_mask & 4 else []
    for code in (*wide, "0f ae 27", "66 0f ef c0"):
        trap = machine.on(cpu, "kvm", code)
        if trap[0] == VECTOR_PF and code == "0f ae 27" and machine.engine.kvm.traits.traps_task_switched:
            pytest.skip("an emulated processor, QEMU's: its XSAVE does not look at CR0.TS")
        assert trap == (VECTOR_NM, 0, 0)
        assert cpu.regs[RIP] == CODE


def test_32_bit_code_runs_on_every_host(machine: AdaptiveMachine) -> None:
    machine.set_descriptor(0x20, 0x0000_FFFF, 0x00CF_FB00)
    machine.set_descriptor(0x28, 0x0000_FFFF, 0x00CF_F300)
    cpu = machine.adaptive_cpu()
    machine.on(cpu, "kvm", "0f 05")
    machine.write_code("40 50 5b cd 80")
    cpu.code_written(machine.code)
    cpu.set_code_stack(0x23, 0x2B)
    cpu.regs[RAX] = 7
    cpu.regs[RIP] = CODE
    assert machine.go_on(cpu) == (VECTOR_GP, 0x402, 0)
    assert (cpu.regs[RAX], cpu.regs[3]) == (8, 8)


def test_a_checksum_is_exact_over_a_thousand_moves(machine: AdaptiveMachine) -> None:
    """An FNV hash over a page, a byte at a time with a system call after each; every few calls the vCPU moves."""
    cpu = machine.adaptive_cpu()
    data = os.urandom(4096)
    start = machine.data[0] << PAGE_SHIFT
    machine.memory.b[start : start + 4096] = data
    # rax = hash, rdi = pointer, r8 = left, r9 = prime
    code = "0f b6 17"  # movzx edx, byte [rdi]
    code += "48 31 d0"  # xor rax, rdx
    code += "49 0f af c1"  # imul rax, r9
    code += "48 ff c7"  # inc rdi
    code += "0f 05"  # syscall
    code += "49 ff c8"  # dec r8
    code += "75 ec"  # jnz
    code += "0f 0b"
    machine.write_code(code)
    cpu.code_written(machine.code)
    prime, mask = 0x100_0000_01B3, (1 << 64) - 1
    cpu.regs[RAX], cpu.regs[RDI], cpu.regs[R8], cpu.regs[9] = 0xCBF2_9CE4_8422_2325, DATA, 4096, prime
    cpu.regs[RIP] = CODE
    calls = 0
    done = False

    def on_trap(vector: int, _error_code: int, _address: int) -> bool:
        nonlocal calls, done
        if vector != TRAP_SYSCALL:
            done = True
            return False
        calls += 1
        if calls % 4 == 0:
            cpu.request_move(ENGINES[calls // 4 % 2])
        return True

    while not done:
        cpu.run(on_trap)
    expected = 0xCBF2_9CE4_8422_2325
    for byte in data:
        expected = (expected ^ byte) * prime & mask
    assert calls == 4096
    assert cpu.regs[RAX] == expected
    assert cpu.moves >= 1000


def test_a_vcpu_that_computes_settles_on_kvm_and_one_that_traps_may_leave_it(machine: AdaptiveMachine) -> None:
    cpu = machine.adaptive_cpu()
    cpu.policy = POLICY_MEASURED
    machine.write_code("b9 40 42 0f 00 48 ff c9 75 fb 0f 05 eb f2")  # mov ecx, 1000000; dec/jnz; syscall; again
    cpu.code_written(machine.code)
    cpu.regs[RIP] = CODE
    calls = 0

    def on_trap(_vector: int, _error_code: int, _address: int) -> bool:
        nonlocal calls
        calls += 1
        return calls < 600 and cpu.running_on == "unicorn"

    while calls < 600 and cpu.running_on == "unicorn":
        cpu.run(on_trap)
    assert cpu.running_on == "kvm"
