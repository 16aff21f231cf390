"""The small hypercalls: what each answers, and that no argument at all raises in the host."""

from __future__ import annotations

from collections.abc import Iterator
from struct import pack, unpack
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenolith.abi import errno
from xenolith.abi import hypercalls as abi
from xenolith.abi.errno import E2BIG, EFAULT, EINVAL, ENOENT, ENOSPC, ENOSYS, EPERM, ESRCH
from xenolith.abi.layout import MULTICALL_ENTRY
from xenolith.abi.x86 import PAGE_SIZE, RAX, RDI, RIP, RSI
from xenolith.hypervisor.domain import LOG_BYTES, Vcpu
from xenolith.hypervisor.hypercalls.console_io import MOST_AT_ONCE, do_console_io
from xenolith.hypervisor.hypercalls.multicall import do_multicall
from xenolith.hypervisor.hypercalls.physdev import do_physdev_op
from xenolith.hypervisor.hypercalls.sched_op import do_sched_op, do_sched_op_compat
from xenolith.hypervisor.hypercalls.table import HYPERCALL_TABLE
from xenolith.hypervisor.hypercalls.vcpu_op import do_vcpu_op
from xenolith.hypervisor.hypercalls.version import do_xen_version
from xenolith.hypervisor.hypercalls.vm_assist import do_vm_assist

from .bare import DATA, PAGES, BareMachine, read, write

WILD = 0x7000_0000_0000
XENS = 0xFFFF_8000_0000_0000


@pytest.fixture
def machine() -> Iterator[BareMachine]:
    machine = BareMachine()
    yield machine
    machine.close()


@pytest.fixture
def vcpu(machine: BareMachine) -> Vcpu:
    vcpu = machine.domain(vcpus=2).vcpus[0]
    vcpu.may_run = True
    return vcpu


def test_console_output_goes_to_the_domains_log_and_to_whoever_listens(vcpu: Vcpu) -> None:
    heard: list[bytes] = []
    vcpu.domain.emergency_console.hook = heard.append
    write(vcpu, DATA, b"early boot message\n")
    assert do_console_io(vcpu, abi.CONSOLEIO_write, 19, DATA) == 0
    assert vcpu.domain.emergency_console.text == b"early boot message\n"
    assert heard == [b"early boot message\n"]
    assert do_console_io(vcpu, abi.CONSOLEIO_write, 5, WILD) == -EFAULT
    assert do_console_io(vcpu, abi.CONSOLEIO_write, 5, XENS) == -EFAULT
    assert do_console_io(vcpu, abi.CONSOLEIO_read, 5, DATA) == 0
    assert do_console_io(vcpu, abi.CONSOLEIO_read, 1 << 31, DATA) == -E2BIG
    assert do_console_io(vcpu, 7, 5, DATA) == -ENOSYS


def test_console_output_without_end_keeps_the_last_of_it_and_no_more(vcpu: Vcpu) -> None:
    page = bytes(range(256)) * 16
    for number in range(PAGES):
        write(vcpu, DATA + number * PAGE_SIZE, page)
    for _ in range(3 * LOG_BYTES // (PAGES * PAGE_SIZE)):
        assert do_console_io(vcpu, abi.CONSOLEIO_write, PAGES * PAGE_SIZE, DATA) == 0
    text = vcpu.domain.emergency_console.text
    assert len(text) == LOG_BYTES
    assert text.endswith(page)
    assert MOST_AT_ONCE < 1 << 32


def test_version_names_us_and_keeps_the_build_to_itself(vcpu: Vcpu) -> None:
    assert do_xen_version(vcpu, abi.XENVER_version, 0) == 4 << 16 | 17
    assert do_xen_version(vcpu, abi.XENVER_extraversion, DATA) == 0
    assert read(vcpu, DATA, 16).rstrip(b"\0") == b".0-xenolith"
    assert do_xen_version(vcpu, abi.XENVER_capabilities, DATA) == 0
    assert read(vcpu, DATA, 1024).rstrip(b"\0") == b"xen-3.0-x86_64 "
    assert do_xen_version(vcpu, abi.XENVER_commandline, DATA) == 0
    assert read(vcpu, DATA, 1024).rstrip(b"\0") == b"<denied>"
    assert do_xen_version(vcpu, abi.XENVER_platform_parameters, DATA) == 0
    assert unpack("<Q", read(vcpu, DATA, 8))[0] == XENS
    write(vcpu, DATA, pack("<II", 0, 0))
    assert do_xen_version(vcpu, abi.XENVER_get_features, DATA) == 0
    assert unpack("<II", read(vcpu, DATA, 8)) == (0, 1 << 4 | 1 << 5 | 1 << 7)
    assert do_xen_version(vcpu, abi.XENVER_pagesize, 0) == 4096
    assert do_xen_version(vcpu, abi.XENVER_pagesize, DATA) == -EINVAL
    assert do_xen_version(vcpu, abi.XENVER_build_id, 0) == -EPERM
    assert do_xen_version(vcpu, abi.XENVER_extraversion, WILD) == -EFAULT
    assert do_xen_version(vcpu, 77, 0) == -ENOSYS


def test_assists_that_exist_can_be_switched(vcpu: Vcpu) -> None:
    assert do_vm_assist(vcpu, abi.VMASST_CMD_enable, abi.VMASST_TYPE_runstate_update_flag) == 0
    assert vcpu.domain.vm_assist == 1 << abi.VMASST_TYPE_runstate_update_flag
    assert do_vm_assist(vcpu, abi.VMASST_CMD_disable, abi.VMASST_TYPE_runstate_update_flag) == 0
    assert vcpu.domain.vm_assist == 0
    assert do_vm_assist(vcpu, abi.VMASST_CMD_enable, 6) == -EINVAL
    assert do_vm_assist(vcpu, 2, abi.VMASST_TYPE_m2p_strict) == -ENOSYS


def test_sched_op_refuses_what_it_cannot_do(machine: BareMachine, vcpu: Vcpu) -> None:
    other = machine.domain()
    assert do_sched_op(vcpu, abi.SCHEDOP_shutdown, WILD) == -EFAULT
    assert do_sched_op(vcpu, abi.SCHEDOP_poll, WILD) == -EFAULT
    write(vcpu, DATA, pack("<QIIQ", DATA, 129, 0, 0))
    assert do_sched_op(vcpu, abi.SCHEDOP_poll, DATA) == -EINVAL
    write(vcpu, DATA, pack("<QIIQ", WILD, 1, 0, 0))
    assert do_sched_op(vcpu, abi.SCHEDOP_poll, DATA) == -EFAULT
    write(vcpu, DATA, pack("<QIIQI", DATA + 24, 1, 0, 0, 5000))
    assert do_sched_op(vcpu, abi.SCHEDOP_poll, DATA) == -EINVAL
    write(vcpu, DATA, pack("<HHI", other.domid, 0, 0))
    assert do_sched_op(vcpu, abi.SCHEDOP_remote_shutdown, DATA) == -EPERM
    write(vcpu, DATA, pack("<HHI", 999, 0, 0))
    assert do_sched_op(vcpu, abi.SCHEDOP_remote_shutdown, DATA) == -ESRCH
    assert do_sched_op(vcpu, abi.SCHEDOP_pin_override, DATA) == -EPERM
    assert do_sched_op(vcpu, 99, DATA) == -ENOSYS
    assert do_sched_op_compat(vcpu, abi.SCHEDOP_poll, DATA) == -ENOSYS
    assert not vcpu.blocked
    assert vcpu.domain.shutdown_reason is None


def test_a_shutdown_code_set_beforehand_wins(vcpu: Vcpu) -> None:
    write(vcpu, DATA, pack("<I", abi.SHUTDOWN_crash))
    assert do_sched_op(vcpu, abi.SCHEDOP_shutdown_code, DATA) == 0
    write(vcpu, DATA, pack("<I", abi.SHUTDOWN_reboot))
    assert do_sched_op(vcpu, abi.SCHEDOP_shutdown, DATA) == 0
    assert vcpu.domain.shutdown_reason == abi.SHUTDOWN_crash


def test_there_are_two_watchdogs(vcpu: Vcpu) -> None:
    def watchdog(number: int, timeout: int) -> int:
        write(vcpu, DATA, pack("<II", number, timeout))
        return do_sched_op(vcpu, abi.SCHEDOP_watchdog, DATA)

    assert [watchdog(0, 100), watchdog(0, 100), watchdog(0, 100)] == [1, 2, -ENOSPC]
    assert watchdog(3, 5) == -EINVAL
    assert watchdog(1, 0) == 0
    assert watchdog(1, 5) == -EINVAL
    assert watchdog(0, 5) == 1


def test_vcpu_op_refuses_what_it_cannot_do(vcpu: Vcpu) -> None:
    assert do_vcpu_op(vcpu, abi.VCPUOP_is_up, 2, 0) == -ENOENT
    assert do_vcpu_op(vcpu, abi.VCPUOP_is_up, 1, 0) == 0
    assert do_vcpu_op(vcpu, abi.VCPUOP_set_singleshot_timer, 1, DATA) == -EINVAL
    assert do_vcpu_op(vcpu, abi.VCPUOP_stop_singleshot_timer, 1, 0) == -EINVAL
    assert do_vcpu_op(vcpu, abi.VCPUOP_register_runstate_memory_area, 0, WILD) == -EFAULT
    write(vcpu, DATA, pack("<Q", XENS))
    assert do_vcpu_op(vcpu, abi.VCPUOP_register_runstate_memory_area, 0, DATA) == -EFAULT
    assert do_vcpu_op(vcpu, abi.VCPUOP_register_vcpu_time_memory_area, 0, DATA) == -EFAULT
    assert do_vcpu_op(vcpu, abi.VCPUOP_send_nmi, 0, 1) == -EINVAL
    assert do_vcpu_op(vcpu, abi.VCPUOP_get_physid, 0, DATA) == -EINVAL
    assert do_vcpu_op(vcpu, 99, 0, DATA) == -ENOSYS


def test_physdev_op_leaves_a_domu_its_iopl_and_no_hardware(vcpu: Vcpu) -> None:
    write(vcpu, DATA, pack("<I", 1))
    assert do_physdev_op(vcpu, 6, DATA) == 0
    assert vcpu.iopl == 1
    write(vcpu, DATA, pack("<I", 4))
    assert do_physdev_op(vcpu, 6, DATA) == -EINVAL
    assert do_physdev_op(vcpu, 15, DATA) == -EPERM
    assert do_physdev_op(vcpu, 6, WILD) == -EFAULT
    assert do_physdev_op(vcpu, 200, DATA) == -ENOSYS


# --- multicall ---------------------------------------------------------------------------------------


def entries(vcpu: Vcpu, *calls: tuple[int, ...]) -> None:
    data = b"".join(MULTICALL_ENTRY.pack(call[0], 99, *call[1:], *[0] * (7 - len(call))) for call in calls)
    write(vcpu, DATA, data)


def results(vcpu: Vcpu, count: int) -> list[int]:
    return [int(MULTICALL_ENTRY.unpack(read(vcpu, DATA + 64 * index, 64))[1]) for index in range(count)]


def test_a_batch_answers_each_call_in_its_entry(vcpu: Vcpu) -> None:
    entries(vcpu, (17, 0), (63, 1), (13, DATA, 1), (1000, 0), (17, 7))
    assert do_multicall(vcpu, DATA, 5) == 0
    assert results(vcpu, 5) == [4 << 16 | 17, -ENOSYS, -EINVAL, -ENOSYS, 4096]


def test_a_batch_stops_where_an_entry_cannot_be_read(vcpu: Vcpu) -> None:
    last = DATA + PAGES * PAGE_SIZE - 64
    write(vcpu, last, MULTICALL_ENTRY.pack(17, 99, *[0] * 6))
    assert do_multicall(vcpu, last, 2) == -EFAULT
    assert MULTICALL_ENTRY.unpack(read(vcpu, last, 64))[1] == 4 << 16 | 17
    assert do_multicall(vcpu, XENS, 1) == -EFAULT


def test_a_batch_goes_on_after_a_call_that_blocks(vcpu: Vcpu) -> None:
    entries(vcpu, (29, 1, 0), (17, 0))
    vcpu.regs[RIP] = 0x1002
    vcpu.restarted = False
    do_multicall(vcpu, DATA, 2)
    assert vcpu.blocked
    assert vcpu.restarted
    assert results(vcpu, 2) == [0, 99]
    regs = vcpu.regs
    assert (regs[RAX], regs[RDI], regs[RSI], regs[RIP]) == (13, DATA + 64, 1, 0x1000)
    vcpu.blocked, vcpu.may_run = False, True
    assert do_multicall(vcpu, regs[RDI], regs[RSI]) == 0
    assert results(vcpu, 2) == [0, 4 << 16 | 17]


# --- anything at all -----------------------------------------------------------------------------------

POINTERS = st.sampled_from(
    [DATA, DATA + 1, DATA + PAGE_SIZE - 3, DATA + PAGES * PAGE_SIZE - 1, WILD, XENS, (1 << 64) - 1]
)
ARGUMENT = st.integers(0, 15) | st.integers(0, (1 << 64) - 1) | POINTERS
MINE = [6, 13, 15, 16, 17, 18, 19, 20, 21, 24, 29, 32, 33]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(MINE), st.lists(ARGUMENT, min_size=5, max_size=5), ARGUMENT), max_size=80))
def test_no_argument_raises_in_the_host(calls: list[tuple[int, list[int], int]]) -> None:
    machine = BareMachine()
    vcpu = machine.domain(vcpus=2).vcpus[0]
    known = {-number for name, number in vars(errno).items() if name.startswith("E") and isinstance(number, int)}
    for number, arguments, content in calls:
        vcpu.may_run, vcpu.blocked, vcpu.domain.shutdown_reason = True, False, None
        write(vcpu, DATA, pack("<Q", content) * 20)
        function: Any
        function, count = HYPERCALL_TABLE[number]
        result = function(vcpu, *arguments[:count])
        assert isinstance(result, int)
        assert result >= 0 or result in known
