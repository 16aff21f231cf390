"""The processor that a guest was told of, in its domain's record; whether this host has as much."""

from __future__ import annotations

from typing import Final

from xenolith.hypervisor import cpuid
from xenolith.hypervisor.domain import Domain
from xenolith.hypervisor.domain_record.kinds import U32, Number, Plain, Record, RecordError

# What a guest may have found in CPUID and rely on: registers (0: EAX ... 3: EDX) of leaves in which bits are features.
_FEATURE_LEAVES: Final = {
    (1, 0): (2, 3),
    (7, 0): (1, 2, 3),
    (0xD, 1): (0,),
    (0x8000_0001, 0): (2, 3),
    (0x8000_0007, 0): (3,),
    (0x8000_0021, 0): (0,),
}
INVARIANT_TSC: Final = 1 << 8  # CPUID 8000_0007 EDX
TSC_TOLERANCE: Final = 200  # one part in this many: the rate is measured anew by each process
_REGISTER_NAMES: Final = ("eax", "ebx", "ecx", "edx")


def features(domain: Domain) -> dict[str, Plain]:
    """What the domain may have found."""
    engine = domain.engine
    assert engine is not None
    return {"xcr0": engine.xcr0_mask, "tsc_hz": domain.hypervisor.tsc_hz, **_feature_words(domain)}


def _feature_words(domain: Domain) -> dict[str, int]:
    return {
        f"{leaf:x}.{subleaf}.{_REGISTER_NAMES[register]}": cpuid.answer(domain.vcpus[0], leaf, subleaf)[register]
        for (leaf, subleaf), registers in _FEATURE_LEAVES.items()
        for register in registers
    }


def check_features(record: Record, domain: Domain) -> None:
    """The engine must be able to do all that the guest was told where it comes from. Raises RecordError.

    A guest that knows of an invariant TSC may tell time by it, and by the rate that it was told.
    """
    theirs = record.record("features")
    rate, rate_here = theirs.get("tsc_hz", Number(1 << 40)), domain.hypervisor.tsc_hz
    if theirs.get("80000007.0.edx", U32) & INVARIANT_TSC and abs(rate - rate_here) * TSC_TOLERANCE > rate:
        raise RecordError(
            f"the domain may tell time by an invariant TSC of {rate / 1e6:.1f} MHz, and this host's has "
            f"{rate_here / 1e6:.1f} MHz"
        )
    for name, here in _feature_words(domain).items():
        lacking = theirs.get(name, U32) & ~here
        if lacking:
            raise RecordError(
                f"the domain has seen processor features that the engine {domain.engine and domain.engine.name} lacks "
                f"here: CPUID {name}, bits {lacking:#x}"
            )
