"""Start-up verification: the installed Unicorn is laid out as layout.py says, or no guest runs.

Once per process a throw-away instance is probed: its private state is compared with what Unicorn's public functions
say, and a tiny guest raises every kind of trap and exercises every private mechanism (TLBs, translated blocks, flags)
whose result is known.  A disagreement raises EngineError and names the probe.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from ctypes import c_int, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Final

from xenolith.abi.x86 import (
    CS,
    DS,
    EFER_LMA,
    EFER_LME,
    EFER_NX,
    EFER_SCE,
    EFLAGS_TF,
    ES,
    FS,
    FS_BASE,
    GS,
    GS_BASE,
    PTE_NX,
    PTE_P,
    PTE_RW,
    PTE_US,
    R8,
    R15,
    RAX,
    RBP,
    RBX,
    RCX,
    RDI,
    RDX,
    RFLAGS,
    RIP,
    RSI,
    RSP,
    SS,
    VECTOR_BP,
    VECTOR_DB,
    VECTOR_GP,
    VECTOR_NM,
    VECTOR_PF,
    VECTOR_UD,
    XSAVE_EXTENDED,
)
from xenolith.machine.engines.protocol import TRAP_CPUID, TRAP_SYSCALL, TRAP_SYSENTER, CpuState, EngineError
from xenolith.machine.engines.unicorn import exit_check, layout, library, softmmu, vex, xsave
from xenolith.machine.engines.unicorn.cpu import UnicornCpu
from xenolith.machine.engines.unicorn.instance import CR0, CR4, Instance
from xenolith.machine.engines.unicorn.library import Library
from xenolith.machine.memory import MachineMemory

# The guest: page tables of two modes, which differ in one page, and what they map
KERNEL_L4, L3, L2, KERNEL_L1, USER_L4, USER_L3, USER_L2, USER_L1 = range(1, 9)
CODE, DATA, GDT, KERNEL_PAGE, USER_PAGE, USER_CODE = range(9, 15)
FRAMES: Final = 16
CODE_VA: Final = 0x40_0000
DATA_VA: Final = 0x40_1000
GDT_VA: Final = 0x40_2000
PAGE_VA: Final = 0x40_3000  # KERNEL_PAGE or USER_PAGE
NX_VA: Final = 0x40_4000  # DATA, not executable
TABLE: Final = PTE_P | PTE_RW | PTE_US

# Unicorn's public numbers of registers, by where they lie in CPUX86State
GENERAL: Final = {35: RAX, 38: RCX, 40: RDX, 37: RBX, 44: RSP, 36: RBP, 43: RSI, 39: RDI, 41: RIP}
GENERAL_R8: Final = 106  # .. R15 follow
SELECTORS: Final = {28: ES, 11: CS, 49: SS, 17: DS, 32: FS, 33: GS}
BASES: Final = {250: FS_BASE, 251: GS_BASE}
CONTROL: Final = {50: (0, CR0), 53: (3, 0), 54: (4, CR4)}
DEBUG: Final = {66 + number: number for number in (0, 1, 2, 3, 6, 7)}
TABLES: Final = {243: layout.GDT, 242: layout.IDT, 244: layout.LDT, 245: layout.TR}
XMM0: Final = 122
MXCSR: Final = 249
FPCW: Final = 246
FPSW: Final = 31

FLAT_DATA32: Final = bytes.fromhex("ffff000000f3cf00")  # descriptor: writable data, DPL 3
BASED_DATA: Final = bytes.fromhex("3412785600f34012")  # base 0x12005678, limit 0x1234
CODE32: Final = bytes.fromhex("ffff000000fbcf00")
DESCRIPTORS: Final = (bytes(8), FLAT_DATA32, BASED_DATA, CODE32)
DATA_SELECTOR, BASED_SELECTOR, CODE32_SELECTOR = 0x0B, 0x13, 0x1B

Trap = tuple[int, int, int, int]  # vector, error code, address, RIP - CODE_VA


@functools.cache
def verify(lib: Library) -> None:
    """Raises EngineError unless every probe agrees."""
    exit_check.install(lib)
    vex.install(lib)
    _expect("the state's address", _state_address(lib), True)
    memory = MachineMemory(FRAMES)
    instance = Instance(lib, memory)
    cpu = UnicornCpu(instance, memory)
    guest = Guest(memory, instance, cpu)
    _public_registers(instance)
    for probe in (_traps, _descriptors, _modes, _stale_code, _softmmu, _fpu, _debug):
        probe(guest)
    _stops(lib, memory)
    cpu.close()
    memory.close()


def _expect(probe: str, found: object, expected: object) -> None:
    if found != expected:
        raise EngineError(
            f"Unicorn's private layout is not the one Xenolith knows: the probe of {probe} found"
            f" {repr(found)[:200]}, not {repr(expected)[:200]}; {library.ADVICE}"
        )


def _state_address(lib: Library) -> bool:
    """CPUX86State lies where layout.py says: Unicorn itself tells, as it passes its address to its register reader."""
    usable = ctypes.CDLL(None).malloc_usable_size
    usable.argtypes, usable.restype = (c_void_p,), c_size_t
    handle = c_void_p()
    lib.check(lib.open(library.UC_ARCH_X86, library.UC_MODE_64, ctypes.byref(handle)), "opening an instance")
    uc = handle.value or 0
    value = c_uint64()
    lib.check(lib.ctl(uc, library.UC_CTL_TCG_BUFFER_SIZE | 1 << 26 | 1 << 30, 1 << 20), "setting the buffer's size")
    lib.check(lib.reg_read(uc, 41, ctypes.byref(value)), "reading a register")  # which makes the processor
    size = usable(uc)
    if size < layout.UC_STRUCT_SIZE:
        return False
    words = (c_uint64 * (size // 8)).from_address(uc)
    reader = lib.address("reg_read_x86_64")
    places = [index for index, word in enumerate(words) if word == reader]
    if len(places) != 1:
        return False
    found: list[int] = []

    def note(env: int) -> int:
        found.append(env)
        return 0

    callback = ctypes.CFUNCTYPE(c_int, c_void_p)(note)
    words[places[0]] = ctypes.cast(callback, c_void_p).value or 0
    lib.reg_read(uc, 41, ctypes.byref(value))
    words[places[0]] = reader
    known = words[layout.UC_CPU // 8] - layout.CPU_STATE
    lib.check(lib.close(uc), "closing an instance")
    return found == [known]


def _public_registers(instance: Instance) -> None:
    """What lies in CPUX86State is what Unicorn's public functions say."""
    lib, uc, q, d = instance.lib, instance.uc, instance.q, instance.d
    general = {**GENERAL, **{GENERAL_R8 + i: R8 + i for i in range(R15 - R8 + 1)}}

    def read(register: int, size: int = 8) -> int:
        value = ctypes.create_string_buffer(32)
        lib.check(lib.reg_read(uc, register, value), "reading a register")
        return int.from_bytes(value.raw[:size], "little")

    for number, index in general.items():
        q[index] = 0x1000_0000_0000 + number
    _expect("general registers", [read(number) - 0x1000_0000_0000 for number in general], list(general))
    _expect("selectors", [read(number, 2) for number in SELECTORS], [q[index] & 0xFFFF for index in SELECTORS.values()])
    for number, index in BASES.items():
        q[index] = number << 32
    _expect("segment bases", [read(number) >> 32 for number in BASES], list(BASES))
    for number, (index, value) in CONTROL.items():
        _expect(f"CR{index}", (read(number), q[layout.CR // 8 + index]), (value, value))
    q[layout.CR // 8 + 2] = 0x1234_5678_9000
    _expect("CR2", read(52), 0x1234_5678_9000)
    efer = EFER_SCE | EFER_LME | EFER_LMA | EFER_NX
    _expect("EFER", q[layout.EFER // 8], efer)
    for number, index in DEBUG.items():
        _expect(f"DR{index}", q[layout.DR // 8 + index], read(number))
    for number, offset in TABLES.items():
        q[offset // 8 + 1], d[offset // 4 + 4] = number << 32, number
        table = ctypes.create_string_buffer(32)  # u16 selector, u64 base, u32 limit, u32 flags
        lib.check(lib.reg_read(uc, number, table), "reading a table register")
        _expect("table registers", (c_uint64.from_buffer(table, 8).value, c_uint32.from_buffer(table, 16).value),
                (number << 32, number))  # fmt: skip
        q[offset // 8 + 1], d[offset // 4 + 4] = 0, 0
    for number in (0, 15):
        place = layout.XMM + layout.XMM_STRIDE * number
        instance.b[place : place + 16] = bytes(range(number, number + 16))
        _expect(f"XMM{number}", read(XMM0 + number, 16), int.from_bytes(bytes(range(number, number + 16)), "little"))
    _expect("MXCSR", d[layout.MXCSR // 4], read(MXCSR, 4))
    _expect("the x87 control word", int.from_bytes(instance.b[layout.FPUC : layout.FPUC + 2], "little"), read(FPCW, 2))


class Guest:
    """A guest of a few pages, whose code is replaced for each probe."""

    def __init__(self, memory: MachineMemory, instance: Instance, cpu: UnicornCpu) -> None:
        self.memory, self.instance, self.cpu = memory, instance, cpu
        for l4, l3, l2, l1, page, code in (
            (KERNEL_L4, L3, L2, KERNEL_L1, KERNEL_PAGE, CODE),
            (USER_L4, USER_L3, USER_L2, USER_L1, USER_PAGE, USER_CODE),
        ):
            memory.table(l4)[0] = l3 << 12 | TABLE
            memory.table(l3)[0] = l2 << 12 | TABLE
            memory.table(l2)[CODE_VA >> 21] = l1 << 12 | TABLE
            for va, frame, flags in (
                (CODE_VA, code, TABLE),
                (DATA_VA, DATA, TABLE),
                (GDT_VA, GDT, PTE_P),  # supervisor only, as in Xen's own part
                (PAGE_VA, page, TABLE),
                (NX_VA, DATA, TABLE | PTE_NX),
            ):
                memory.table(l1)[va >> 12 & 511] = frame << 12 | flags
        memory.page(GDT)[: 8 * len(DESCRIPTORS)] = b"".join(DESCRIPTORS)
        memory.q[KERNEL_PAGE << 9], memory.q[USER_PAGE << 9] = 1, 2

    def load(self, user: bool = False, **registers: int) -> None:
        state = CpuState(l4_mfn=USER_L4 if user else KERNEL_L4, user=user, gdt_va=GDT_VA)
        for index, value in ((RIP, CODE_VA), (RSP, DATA_VA + 0x800), (CS, 0xE033), (SS, 0xE02B), (RFLAGS, 0x202)):
            state.regs[index] = value
        self.cpu.load(state)

    def write(self, *code: str) -> None:
        """Replace the guest kernel's code by these instructions (hexadecimal)."""
        text = bytes.fromhex(" ".join(code))
        self.memory.page(CODE)[: len(text)] = text
        self.cpu.code_written(CODE)

    def run(self, lengths: Sequence[int]) -> list[Trap]:
        """Run, and after each trap go on `length` bytes behind RIP; the traps."""
        traps: list[Trap] = []

        def on_trap(vector: int, error_code: int, address: int) -> bool:
            traps.append((vector, error_code, address, self.cpu.regs[RIP] - CODE_VA))
            self.cpu.regs[RIP] += lengths[len(traps) - 1]
            return len(traps) < len(lengths)

        self.cpu.run(on_trap)
        return traps


def _traps(guest: Guest) -> None:
    """Every kind of trap, with its error code, address and RIP."""
    unmapped, data = 0x50_0000, DATA_VA
    program: list[tuple[str, int, Trap]] = []  # code, length to skip, trap
    at = 0

    def expect(code: str, vector: int, error_code: int = 0, address: int = 0, after: bool = False) -> None:
        nonlocal at
        length = len(bytes.fromhex(code))
        program.append((code, 0 if after else length, (vector, error_code, address, at + (length if after else 0))))
        at += length

    expect("0f 05", TRAP_SYSCALL, after=True)
    expect("48 0f 05", TRAP_SYSCALL, after=True)  # with a prefix
    expect("0f 34", TRAP_SYSENTER, after=True)
    expect("0f a2", TRAP_CPUID, after=True)
    expect("8b 04 25 00 00 50 00", VECTOR_PF, 4, unmapped)  # mov eax, [0x500000]
    expect("89 04 25 00 00 50 00", VECTOR_PF, 6, unmapped)
    expect("8b 04 25 00 20 40 00", VECTOR_PF, 5, GDT_VA)  # a supervisor page
    expect("0f 0b", VECTOR_UD)
    expect("c5 e9 fe cb", VECTOR_UD)  # vpaddd xmm1, xmm2, xmm3
    expect("c4 e3 69 0f cb 04", VECTOR_UD)  # vpalignr xmm1, xmm2, xmm3, 4
    expect("f4", VECTOR_GP)  # hlt
    expect("fa", VECTOR_GP)  # cli
    expect("e4 60", VECTOR_GP)  # in al, 0x60
    expect("e6 60", VECTOR_GP)
    expect("0f 20 d8", VECTOR_GP)  # mov rax, cr3
    expect("cc", VECTOR_BP, after=True)
    expect("cd 80", VECTOR_GP, 0x80 << 3 | 2)
    expect("cd 0e", VECTOR_GP, VECTOR_PF << 3 | 2)
    expect("cd 06", VECTOR_GP, VECTOR_UD << 3 | 2)
    expect("48 89 04 25 00 10 40 00", VECTOR_PF, 7, data)  # after its page was made read-only
    guest.memory.table(KERNEL_L1)[DATA_VA >> 12 & 511] = DATA << 12 | PTE_P | PTE_US
    guest.write(*(code for code, _, _ in program))
    guest.load()
    found = guest.run([length for _, length, _ in program])
    guest.memory.table(KERNEL_L1)[DATA_VA >> 12 & 511] = DATA << 12 | TABLE
    guest.cpu.flush_page(DATA_VA)
    _expect("traps", found, [trap for _, _, trap in program])
    guest.write("68 00 40 40 00", "c3")  # push 0x404000; ret
    guest.load()
    _expect("execution protection", guest.run([0]), [(VECTOR_PF, 0x15, NX_VA, NX_VA - CODE_VA)])
    guest.write("d9 e8", "0f 05")  # fld1
    guest.load()
    guest.cpu.set_task_switched(True)
    _expect("CR0.TS", guest.run([0])[0][0], VECTOR_NM)
    guest.cpu.set_task_switched(False)
    _expect("CR0.TS", guest.run([0])[0][0], TRAP_SYSCALL)


def _descriptors(guest: Guest) -> None:
    """Segment registers hold what a native load leaves there; compatibility mode."""
    cpu = guest.cpu
    guest.write("b8 13 00 00 00", "8e d8", "0f 05")  # mov eax, BASED_SELECTOR; mov ds, ax
    guest.load()
    guest.run([0])
    native = cpu.regs[DS : DS + 3].tolist()
    _expect("the processor's own TLB", _system_used(guest.instance) > 0, True)
    cpu.switch_mode(KERNEL_L4, False)
    _expect("the processor's own TLB after a switch", _system_used(guest.instance), 0)
    cpu.set_segment(DS, BASED_SELECTOR)
    _expect("segment registers", cpu.regs[DS : DS + 3].tolist(), native)
    guest.load()
    cpu.set_code_stack(CODE32_SELECTOR, DATA_SELECTOR)
    guest.write("31 c0", "48", "cd 80")  # xor eax, eax; dec eax (in 64-bit code a prefix)
    _expect("compatibility mode", (guest.run([0]), cpu.regs[RAX]), ([(VECTOR_GP, 0x402, 0, 3)], 0xFFFF_FFFF))


def _modes(guest: Guest) -> None:
    """Each mode keeps its own translations, its own blocks; flushes reach both."""
    cpu, memory = guest.cpu, guest.memory
    guest.write("48 8b 04 25 00 30 40 00", "bb 01 00 00 00", "0f 05")  # mov rax, [PAGE_VA]; mov ebx, 1
    text = bytes.fromhex("48 8b 04 25 00 30 40 00 bb 02 00 00 00 0f 05")
    memory.page(USER_CODE)[: len(text)] = text
    cpu.code_written(USER_CODE)

    def look(user: bool) -> tuple[int, int]:
        cpu.switch_mode(USER_L4 if user else KERNEL_L4, user)
        cpu.regs[RIP] = CODE_VA
        guest.run([0])
        return cpu.regs[RAX], cpu.regs[RBX]

    guest.load()
    _expect("modes", [look(False), look(True), look(False), look(True)], [(1, 1), (2, 2)] * 2)
    entry = PAGE_VA >> 12 & 511
    flushes: tuple[Callable[[], None], ...] = (functools.partial(cpu.flush_page, PAGE_VA), cpu.flush_tlb)
    for flush in flushes:
        for table in (KERNEL_L1, USER_L1):
            memory.table(table)[entry] = memory.table(table)[entry] ^ ((KERNEL_PAGE ^ USER_PAGE) << 12)
        before = [look(False)[0], look(True)[0]]
        flush()
        after = [look(False)[0], look(True)[0]]
        _expect("kept and flushed translations", before, after[::-1])
    cpu.switch_mode(KERNEL_L4, False)
    cpu.switch_mode(USER_L4, False)
    cpu.regs[RIP] = CODE_VA
    guest.run([0])
    _expect("another page table in one mode", (cpu.regs[RAX], cpu.regs[RBX]), (2, 2))


def _stale_code(guest: Guest) -> None:
    """Blocks go when ring 0 says so, and only then."""
    cpu, memory = guest.cpu, guest.memory
    guest.write("b8 01 00 00 00", "0f 05")  # mov eax, 1

    def result() -> int:
        guest.load()
        guest.run([0])
        return cpu.regs[RAX]

    cpu.executable_mapped(CODE)
    found = [result()]
    memory.page(CODE)[1] = 2
    found.append(result())
    cpu.code_written(CODE)
    found.append(result())
    cpu.executable_mapped(CODE)
    memory.page(CODE)[1] = 3
    cpu.executable_mapped(CODE)
    found.append(result())
    _expect("translated blocks", found, [1, 1, 2, 3])


def _softmmu(guest: Guest) -> None:
    """The C code, if there is any, finds blocks, forgets them, and fills the TLB with what QEMU would."""
    instance, cpu = guest.instance, guest.cpu
    native, state = softmmu.install(instance.lib), instance.softmmu
    if native is None or state is None:
        return
    guest.write("48 89 04 25 00 10 40 00", "eb 00", "0f 05")  # mov [DATA_VA], rax; jmp to the next block
    guest.load()
    guest.run([0])
    flags = instance.d[layout.HFLAGS // 4]
    tb = state.code_of(CODE_VA, flags) - layout.TB_SIZE
    _expect("blocks that are found", c_uint64.from_address(tb + layout.TB_CODE).value, tb + layout.TB_SIZE)
    cpu.code_written(CODE)
    _expect("blocks that are forgotten", state.code_of(CODE_VA, flags), 0)
    arguments = c_void_p, c_uint64, c_int, c_int, c_int, ctypes.c_bool, c_uint64
    fills = [ctypes.PYFUNCTYPE(ctypes.c_bool, *arguments)(address) for address in native.fills]
    for access, va in enumerate((NX_VA, DATA_VA, CODE_VA)):  # read, write, execute
        found = []
        for fill in fills:
            cpu.flush_tlb()
            fill(instance.cpu, va, 1, access, layout.MMU_USER, False, 0)
            found.append(softmmu.translation(instance.env, va))
        _expect("TLB entries", found[0], found[1])


def _fpu(guest: Guest) -> None:
    """The x87 and SSE state is what FXSAVE stores and FXRSTOR loads."""
    guest.write(
        "d9 e8 d9 eb d9 ee",  # fld1; fldpi; fldz
        "dd c1",  # ffree st(1)
        "48 0f ae 04 25 00 10 40 00",  # fxsave64 [DATA_VA]
        "0f 05",
    )
    guest.load()
    for number in range(16):
        place = layout.XMM + layout.XMM_STRIDE * number
        guest.instance.b[place : place + 16] = bytes([number + 1] * 16)
    guest.run([0])
    image = bytearray(XSAVE_EXTENDED)
    xsave.save(guest.instance.b, image)
    native = bytes(guest.memory.page(DATA)[:416])
    _expect("the FPU's state", bytes(image[:416]), native)
    guest.write("48 0f ae 0c 25 00 10 40 00", "0f 05")  # fxrstor64 [DATA_VA]
    guest.load()
    guest.run([0])
    parts = slice(layout.FPSTT, layout.FPREGS + 128), slice(layout.MXCSR, layout.VCPU_BLOCK)
    by_processor = [bytes(guest.instance.b[part]) for part in parts]
    xsave.restore(image, guest.instance.b)
    _expect("the FPU's state, restored", [bytes(guest.instance.b[part]) for part in parts], by_processor)


def _debug(guest: Guest) -> None:
    """Single-stepping, breakpoints, flags."""
    cpu = guest.cpu
    guest.write("90 90", "0f 05")
    guest.load()
    cpu.set_rflags(cpu.get_rflags() | EFLAGS_TF)
    _expect("single-stepping", guest.run([0]), [(VECTOR_DB, 0, 0xFFFF_4FF0, 1)])
    guest.load()
    cpu.set_debug(6, 0)
    cpu.set_debug(1, CODE_VA + 1)
    cpu.set_debug(7, 0x404)  # local enable of breakpoint 1
    found = guest.run([0])
    cpu.set_debug(7, 0x400)
    _expect("breakpoints", found, [(VECTOR_DB, 0, 0xFFFF_0FF2, 1)])
    guest.write("50 58 90", "0f 05")  # push rax; pop rax; nop
    guest.load()
    cpu.set_debug(0, cpu.regs[RSP] - 8)
    cpu.set_debug(7, 0x402 | 0b1011 << 16)  # global enable of breakpoint 0: eight bytes, accessed
    found = guest.run([0, 0])
    cpu.set_debug(7, 0x400)
    _expect("breakpoints on data", found, [(VECTOR_DB, 0, 0xFFFF_0FF1, 1), (VECTOR_DB, 0, 0xFFFF_0FF1, 2)])
    cpu.set_rflags(0x246 | 3 << 12)
    _expect("flags", cpu.get_rflags(), 0x246)
    guest.write("9c 58", "0f 05")  # pushf; pop rax
    guest.load()
    guest.cpu.set_rflags(0x8D7)
    guest.run([0])
    _expect("flags in the guest", (cpu.regs[RAX], cpu.get_rflags()), (0x8D7, 0x8D7))


def _stops(lib: Library, memory: MachineMemory) -> None:
    """A stop takes effect between blocks only: with UC_NO_EXIT_REQUEST, and really because of it."""
    instance = Instance(lib, memory)
    instance.seal()
    stop_at_port = ctypes.CFUNCTYPE(c_uint32, c_void_p)(lambda uc: int(lib.emu_stop(uc)))
    handle, everywhere = c_void_p(), (1, 0)
    callback = ctypes.cast(stop_at_port, c_void_p)
    error = lib.hook_add(
        instance.uc, ctypes.byref(handle), library.UC_HOOK_INSN, callback, None, *everywhere, library.UC_X86_INS_IN
    )
    lib.check(error, "adding a hook")
    program = bytes.fromhex("ec 48 ff 04 25 00 10 40 00 eb 00")  # in al, dx; inc qword [DATA_VA]; jmp to the next block
    flag = ctypes.c_uint8.from_address(instance.uc + layout.UC_NO_EXIT_REQUEST)
    instance.q[layout.CR // 8 + 3] = KERNEL_L4 << 12
    instance.q[CS + 2] = layout.FLAT_CODE64 << 32 | 0xFFFF_FFFF
    instance.d[layout.HFLAGS // 4] |= layout.HF_CS64 | layout.HF_CS32 | layout.HF_SS32
    memory.q[DATA << 9] = 0
    ends = []
    for start, no_exit_request in ((CODE_VA, 1), (CODE_VA + 0x100, 0)):
        memory.page(CODE)[start & 0xFFF : (start & 0xFFF) + len(program)] = program
        flag.value = no_exit_request
        lib.check(lib.emu_start(instance.uc, start, 0, 0, 0), "running a probe")
        ends.append(instance.q[RIP] - start)
    instance.close()
    _expect("stops", (ends, memory.q[DATA << 9]), ([len(program), 1], 1))


def _system_used(instance: Instance) -> int:
    """How many translations the TLB of MMU_SYSTEM holds."""
    description = layout.TLB_DESCRIPTION + layout.MMU_SYSTEM * layout.TLB_DESCRIPTION_SIZE
    return c_uint64.from_address(instance.env + description + layout.TLB_DESCRIPTION_USED).value
