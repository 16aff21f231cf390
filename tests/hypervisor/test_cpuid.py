"""CPUID as a domain is told it: the policy of all, and a domain's own changes to that."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from xenolith.abi.x86 import CR4_FSGSBASE, CR4_TSD
from xenolith.hypervisor import cpuid, emulate
from xenolith.hypervisor.cpuid import AVX, FSGSBASE, HYPERVISOR, OSXSAVE, XSAVE
from xenolith.hypervisor.domain import CpuidChange as Change

EAX, EBX, ECX, EDX = range(4)
SSE3, MONITOR, AVX2, SMEP = 1, 1 << 3, 1 << 5, 1 << 7
HOST = {
    (0, 0): (0x16, 1, 2, 3),
    (1, 0): (0x12345, 0, SSE3 | MONITOR | XSAVE | OSXSAVE | AVX, 1),
    (7, 0): (0, FSGSBASE | AVX2 | SMEP, 0, 0),
    (0xD, 0): (7, 832, 832, 0),
    (0xD, 2): (256, 576, 0, 0),
    (0x8000_0000, 0): (0x8000_0008, 0, 0, 0),
    (0x8000_0002, 0): (1, 2, 3, 4),
}


class _Engine:
    xcr0_mask = 7

    def host_cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        with_subleaves = leaf in cpuid.WITH_SUBLEAVES
        return HOST.get((leaf, subleaf if with_subleaves else 0), (0, 0, 0, 0))


def vcpu(*changes: Change) -> Any:
    domain = SimpleNamespace(engine=_Engine(), cpuid_changes=changes)
    return SimpleNamespace(domain=domain, vcpu_id=0, cr4=0, state=SimpleNamespace(xcr0=7))


def test_a_domain_without_changes_is_told_what_all_are() -> None:
    assert cpuid.answer(vcpu(), 1, 0)[ECX] == SSE3 | XSAVE | OSXSAVE | AVX | HYPERVISOR
    assert cpuid.answer(vcpu(), 7, 0)[EBX] == AVX2


def test_features_are_taken_away_and_none_is_given_that_guests_cannot_have() -> None:
    changed = vcpu(Change(1, None, ECX, SSE3, MONITOR | 1 << 5, 0), Change(7, 0, EBX, 0, SMEP, 0))
    assert cpuid.answer(changed, 1, 0)[ECX] == XSAVE | OSXSAVE | AVX | HYPERVISOR
    assert cpuid.answer(changed, 1, 99)[ECX] == XSAVE | OSXSAVE | AVX | HYPERVISOR
    assert cpuid.answer(changed, 7, 0)[EBX] == AVX2
    assert cpuid.answer(changed, 7, 1) == (0, 0, 0, 0)
    assert cpuid.answer(vcpu(Change(1, None, ECX, 0, 0, MONITOR | SSE3)), 1, 0)[ECX] & (MONITOR | SSE3) == SSE3


def test_what_needs_a_feature_goes_with_it() -> None:
    without_avx, without_xsave = (vcpu(Change(1, None, ECX, bit, 0, 0)) for bit in (AVX, XSAVE))
    assert cpuid.answer(without_avx, 1, 0)[ECX] == SSE3 | XSAVE | OSXSAVE | HYPERVISOR
    assert cpuid.answer(without_avx, 7, 0)[EBX] == 0
    assert cpuid.answer(without_xsave, 1, 0)[ECX] == SSE3 | HYPERVISOR
    assert cpuid.answer(without_xsave, 0xD, 0) == (0, 0, 0, 0)
    assert cpuid.answer(vcpu(), 0xD, 0)[EAX] == 7


def test_names_and_versions_may_be_anything() -> None:
    changed = vcpu(Change(1, None, EAX, 0xF, 0xF0, 0), Change(0x8000_0002, None, EDX, 0xFFFF_FFFF, 0, 0))
    assert cpuid.answer(changed, 1, 0)[EAX] == 0x123F0
    assert cpuid.answer(changed, 0x8000_0002, 0) == (1, 2, 3, 0)


@pytest.mark.parametrize(("ones", "hosts"), [(FSGSBASE, 0), (0, FSGSBASE)])
def test_fsgsbase_is_given_to_whom_it_is_given(ones: int, hosts: int) -> None:
    """As Xen has it: a bit of CR4 that the guest finds clear, and may set if CPUID tells of it."""
    given, not_given = vcpu(Change(7, 0, EBX, 0, ones, hosts)), vcpu()
    assert cpuid.answer(given, 7, 0)[EBX] == AVX2 | FSGSBASE
    for one, kept in ((given, CR4_FSGSBASE), (not_given, 0)):
        assert emulate.read_cr(one, 4) == emulate.CR4_BASE
        assert emulate.write_cr(one, None, 4, emulate.CR4_BASE | CR4_FSGSBASE | CR4_TSD)  # type: ignore[arg-type]
        assert emulate.read_cr(one, 4) == emulate.CR4_BASE | CR4_TSD | kept
        assert emulate.write_cr(one, None, 4, emulate.CR4_BASE)  # type: ignore[arg-type]
        assert emulate.read_cr(one, 4) == emulate.CR4_BASE
