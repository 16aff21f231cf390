"""The `cpuid` key: which CPUID bits a guest shall see.

Two forms. A string "host,flag=value,..." starts from the host and sets flags by name; a list holds lines of the form
"leaf[,subleaf]:ebx=<32 characters>,..." with one character per bit, the highest first. The characters of a value:
0 and 1 force the bit, x leaves it to the default policy, k keeps the host's, s keeps it also over a migration.

Source: xl.cfg(5), key `cpuid`. Names and bits: what xl 4.17 made of each name; the bits are those of the Intel SDM
(CPUID) and AMD APM volume 3, appendix E; 0x10a is IA32_ARCH_CAPABILITIES.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from xenolith.hypervisor.control import CpuidChange
from xenolith.toolstack.config.grammar import ConfigFile

# One paragraph per register: `leaf[/subleaf].register bit[+length]:name ...`
_TABLE = """
0.eax 0+32:maxleaf
1.eax 0+4:stepping 4+8:model 8+8:family
1.ebx 0+8:brandid 8+8:clflush 16+8:proccount 24+8:localapicid
1.ecx 0:sse3 1:pclmulqdq 2:dtes64 3:monitor 4:dscpl 5:vmx 6:smx 7:est 8:tm2 9:ssse3 10:cntxid 12:fma
    13:cmpxchg16 14:xtpr 15:pdcm 17:pcid 18:dca 19:sse4.1 19:sse4_1 20:sse4.2 20:sse4_2 21:x2apic 22:movbe
    23:popcnt 24:tsc-deadline 25:aes 26:xsave 27:osxsave 28:avx 29:f16c 30:rdrand 31:hypervisor
1.edx 0:fpu 1:vme 2:de 3:pse 4:tsc 5:msr 6:pae 7:mce 8:cmpxchg8 9:apic 11:sysenter 12:mtrr 13:pge 14:mca 15:cmov
    16:pat 17:pse36 18:psn 19:clfsh 21:ds 22:acpi 23:mmx 24:fxsr 25:sse 26:sse2 27:ss 28:htt 29:tm 30:ia64
    31:pbe
4/0.eax 26+6:procpkg
6.eax 2:arat
7/0.ebx 0:fsgsbase 1:tsc_adjust 2:sgx 3:bmi1 4:hle 5:avx2 7:smep 8:bmi2 9:erms 10:invpcid 11:rtm 12:cmt 14:mpx
    16:avx512f 17:avx512dq 18:rdseed 19:adx 20:smap 21:avx512-ifma 23:clflushopt 24:clwb 25:proc-trace
    26:avx512pf 27:avx512er 28:avx512cd 29:sha 30:avx512bw 31:avx512vl
7/0.ecx 0:prefetchwt1 1:avx512-vbmi 2:umip 3:pku 4:ospke 6:avx512-vbmi2 7:cet-ss 8:gfni 9:vaes 10:vpclmulqdq
    11:avx512-vnni 12:avx512-bitalg 14:avx512-vpopcntdq 22:rdpid 25:cldemote 27:movdiri 28:movdir64b 29:enqcmd
7/0.edx 2:avx512-4vnniw 3:avx512-4fmaps 4:fsrm 8:avx512-vp2intersect 9:srbds-ctrl 10:md-clear
    11:rtm-always-abort 13:tsx-force-abort 14:serialize 15:hybrid 16:tsxldtrk 20:cet-ibt 23:avx512-fp16 26:ibrsb
    27:stibp 28:l1d-flush 29:arch-caps 30:core-caps 31:ssbd
7/1.eax 4:avx-vnni 5:avx512-bf16 10:fzrm 11:fsrs 12:fsrcs
7/1.edx 18:cet-sss
7/2.edx 0:intel-psfd 2:rrsba-ctrl 4:bhi-ctrl 5:mcdt-no
0xd/1.eax 0:xsaveopt 1:xsavec 2:xgetbv1 3:xsaves
0x40000000.eax 0+8:maxhvleaf
0x80000001.ecx 0:lahfsahf 1:cmplegacy 2:svm 3:extapic 4:altmovcr8 5:abm 6:sse4a 7:misalignsse 8:3dnowprefetch
    9:osvw 10:ibs 11:xop 12:skinit 13:wdt 15:lwp 16:fma4 19:nodeid 21:tbm 22:topoext 23:perfctr_core
    24:perfctr_nb
0x80000001.edx 11:syscall 20:nx 22:mmxext 25:ffxsr 26:page1gb 27:rdtscp 29:lm 30:3dnowext 31:3dnow
0x80000007.edx 8:invtsc
0x80000008.ebx 0:clzero 2:rstr-fp-err-ptrs 9:wbnoinvd 12:ibpb 14:ibrs 15:amd-stibp 16:ibrs-always
    17:stibp-always 18:ibrs-fast 19:ibrs-same-mode 20:no-lmsl 23:ppin 24:amd-ssbd 25:virt-ssbd 26:ssb-no 28:psfd
    29:btc-no 30:ibpb-ret
0x80000008.ecx 0+8:nc 12+4:apicidsize
0x8000000a.edx 0:svm_npt 1:svm_lbrv 3:svm_nrips 4:svm_tscrate 5:svm_vmcbclean 7:svm_decode 10:svm_pausefilt
0x80000021.eax 2:lfence+ 5:verw-clear 6:nscb 8:auto-ibrs 27:sbpb 28:ibpb-brtype 29:srso-no
msr.0x10a 0:rdcl-no 1:eibrs 2:rsba 3:skip-l1dfl 5:mds-no 6:if-pschange-mc-no 7:tsx-ctrl 8:taa-no
    10:misc-pkg-ctrl 12:doitm 13:sbdr-ssdp-no 14:fbsdp-no 15:psdp-no 17:fb-clear 18:fb-clear-ctrl 19:rrsba
    20:bhi-no 21:xapic-status 24:pbrsb-no 25:gds-ctrl 26:gds-no 27:rfds-no 28:rfds-clear 62:its-no
"""

REGISTERS = ("eax", "ebx", "ecx", "edx")


@dataclass(slots=True)
class CpuidLeaf:
    """What the configuration says about one leaf: per register 32 characters, the highest bit first."""

    leaf: int
    subleaf: int | None
    policy: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class MsrPolicy:
    """What the configuration says about one feature MSR: 64 characters, the highest bit first."""

    index: int
    policy: str = "x" * 64


@dataclass(slots=True)
class CpuidPolicy:
    """All leaves and MSRs that the configuration names, in the order of their first mention."""

    leaves: list[CpuidLeaf] = field(default_factory=list)
    msrs: list[MsrPolicy] = field(default_factory=list)

    def leaf(self, leaf: int, subleaf: int | None) -> CpuidLeaf:
        for known in self.leaves:
            if (known.leaf, known.subleaf) == (leaf, subleaf):
                return known
        self.leaves.append(CpuidLeaf(leaf, subleaf))
        return self.leaves[-1]

    def msr(self, index: int) -> MsrPolicy:
        for known in self.msrs:
            if known.index == index:
                return known
        self.msrs.append(MsrPolicy(index))
        return self.msrs[-1]


def changes(policy: CpuidPolicy) -> tuple[CpuidChange, ...]:
    """The same for the hypervisor. What is said of MSRs is not among it."""
    return tuple(
        CpuidChange(
            leaf.leaf,
            leaf.subleaf,
            REGISTERS.index(register),
            *(sum(1 << bit for bit, given in enumerate(reversed(bits)) if given in kind) for kind in ("0", "1", "ks")),
        )
        for leaf in policy.leaves
        for register, bits in leaf.policy.items()
    )


@dataclass(frozen=True, slots=True)
class _Flag:
    leaf: int | None  # None: `register` is an MSR
    subleaf: int | None
    register: str
    bit: int
    length: int


def _read_table() -> dict[str, _Flag]:
    flags: dict[str, _Flag] = {}
    leaf: int | None = None
    subleaf: int | None = None
    register = ""
    for word in _TABLE.split():
        place, colon, name = word.partition(":")
        if colon:
            bit, _, length = place.partition("+")
            flags[name] = _Flag(leaf, subleaf, register, int(bit), int(length or "1"))
        else:
            leaf_text, register = word.split(".")
            number, _, subleaf_text = leaf_text.partition("/")
            leaf = None if number == "msr" else int(number, 0)
            subleaf = int(subleaf_text) if subleaf_text else None
    return flags


_FLAGS = _read_table()

_FLAG_ERRORS = {
    1: 'missing "=" in key=value',
    2: "unknown CPUID flag name",
    3: "illegal CPUID value (must be: [0|1|x|k|s])",
}

_LINE_ERRORS = {
    1: "illegal leaf number",
    2: "illegal subleaf number",
    3: "missing colon",
    4: "invalid register name (must be e[abcd]x)",
    5: "policy string must be exactly 32 characters long",
}


def read_cpuid(file: ConfigFile) -> CpuidPolicy:
    """The policy of the key `cpuid`; what cannot be read is reported and left out, as xl does."""
    policy = CpuidPolicy()
    if file.is_list("cpuid"):
        for line in file.strings("cpuid"):
            if error := _read_line(policy, line):
                file.warn(f'while parsing CPUID line: "{line}":')
                file.warn(f"  error #{error}: {_LINE_ERRORS[error]}")
        return policy
    text = file.string("cpuid")
    words = [word for word in (text or "").split(",") if word]
    if not words:
        return policy
    if words[0] != "host":
        file.warn(f'while parsing CPUID string: "{text}":')
        file.warn('  error: first word must be "host"')
        return policy
    for word in words[1:]:
        if error := _read_flag(policy, word):
            file.warn(f'while parsing CPUID flag: "{word}":')
            file.warn(f"  error #{error}: {_FLAG_ERRORS[error]}")
    return policy


def _read_flag(policy: CpuidPolicy, word: str) -> int:
    """Apply one flag=value; 0, or the number of an error in _FLAG_ERRORS."""
    name, equals, value = word.partition("=")
    if not equals:
        return 1
    flag = _FLAGS.get(name)
    if flag is None:
        return 2
    number = re.match(r"0[xX][0-9a-fA-F]{1,16}|0[0-7]{0,22}|[1-9][0-9]{0,19}", value)
    if flag.leaf is None:
        msr = policy.msr(int(flag.register, 0))
        if number is None and value[:1] not in ("x", "k", "s"):
            return 3
        msr.policy = _replace(msr.policy, flag.bit, _bits(number, value, flag.length))
        return 0
    leaf = policy.leaf(flag.leaf, flag.subleaf)
    if number is None and value[:1] not in ("x", "k", "s"):
        return 3
    bits = _bits(number, value, flag.length)
    previous = leaf.policy.get(flag.register, "x" * 32)
    if name == "family":
        bits = _bits(number, value, flag.length)
        leaf.policy["eax"] = _family(previous, _c_number(number[0]) if number else 0, bits)
    elif name == "model":
        leaf.policy["eax"] = _replace(_replace(previous, 16, bits[:4]), 4, bits[4:])
    else:
        leaf.policy[flag.register] = _replace(previous, flag.bit, bits)
    return 0


def _bits(number: re.Match[str] | None, value: str, length: int) -> str:
    """The characters of a value for a field of `length` bits."""
    if number is None:
        return value[0] * length
    return format(_c_number(number[0]) % 2**length, f"0{length}b")


def _c_number(digits: str) -> int:
    if digits[:2] in ("0x", "0X"):
        return int(digits, 16)
    return int(digits, 8) if digits.startswith("0") else int(digits)


def _family(previous: str, family: int, bits: str) -> str:
    """The family is split: bits 8-11 up to 15, and what goes beyond in bits 20-27 (CPUID.1:EAX)."""
    if family < 16:
        return _replace(_replace(previous, 8, bits[4:]), 20, "0" * 8)
    return _replace(_replace(previous, 8, "1111"), 20, format((family - 15) % 128, "08b"))


def _replace(policy: str, bit: int, bits: str) -> str:
    """`policy` with `bits` in the place of as many bits from `bit` up."""
    end = len(policy) - bit
    return policy[: end - len(bits)] + bits + policy[end:]


def _read_line(policy: CpuidPolicy, line: str) -> int:
    """Apply one "leaf[,subleaf]:reg=bits,..." line; 0, or the number of an error in _LINE_ERRORS."""
    number = r"[ \t]*((?:0[xX])?[0-9a-fA-F]+)"
    leaf = re.match(number, line)
    if leaf is None or not _is_c_number(leaf[1]):
        return 1
    rest, subleaf = line[leaf.end() :], None
    if rest.startswith(","):
        match = re.match(number, rest[1:])
        if match is None or not _is_c_number(match[1]):
            return 2
        subleaf, rest = _c_number(match[1]), rest[1 + match.end() :]
    if not rest.startswith(":"):
        return 3
    entry = policy.leaf(_c_number(leaf[1]) % 2**32, subleaf)
    rest = rest[1:]
    while rest:
        register, equals, after = rest.partition("=")
        if register not in REGISTERS or not equals:
            return 4
        bits, _, rest = after.partition(",")
        if len(bits) != 32:
            return 5
        entry.policy[register] = bits
        rest = rest.lstrip(" \n")
    return 0


def _is_c_number(text: str) -> bool:
    return re.fullmatch(r"0[xX][0-9a-fA-F]{1,16}|0[0-7]{0,20}|[1-9][0-9]{0,18}", text) is not None
