"""Programs that put the engines to the test: vector registers over task switches, and 32-bit code."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from machines import missing, unicorn_with_stubs

from .conftest import Run

pytestmark = pytest.mark.slow

STUBS = "stubs"  # Unicorn, with programs in stub processes
PROCESSES = 4
ROUNDS = 300

# argv[1] seeds the pattern. Exit status: 0 if every register came back as it was in every round. The registers are
# loaded, the other processes get their turn by a bare system call, the registers are stored and compared.
VECTORS = r"""
#include <string.h>
#include <stdio.h>

#define SCHED_YIELD 24
#define EACH(OP, R) OP(R, 0) OP(R, 1) OP(R, 2) OP(R, 3) OP(R, 4) OP(R, 5) OP(R, 6) OP(R, 7) \
    OP(R, 8) OP(R, 9) OP(R, 10) OP(R, 11) OP(R, 12) OP(R, 13) OP(R, 14) OP(R, 15)
#define LOAD_Y(R, n) "vmovdqu " #n "*32(%0), %%ymm" #n "\n"
#define STORE_Y(R, n) "vmovdqu %%ymm" #n ", " #n "*32(%1)\n"
#define LOAD_X(R, n) "movdqu " #n "*32(%0), %%xmm" #n "\n"
#define STORE_X(R, n) "movdqu %%xmm" #n ", " #n "*32(%1)\n"
#define YIELD "mov $24, %%eax\nsyscall\n"
#define CLOBBERED "rax", "rcx", "r11", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", \
    "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"

static unsigned char pattern[16][32], found[16][32];

static int has_avx(void) {
    unsigned eax = 1, ebx, ecx = 0, edx;
    __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    if ((ecx & 3u << 27) != 3u << 27) return 0;
    __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    return (eax & 6) == 6;
}

int main(int argc, char **argv) {
    unsigned state = 1;
    for (char *c = argv[1]; *c; c++) state = state * 31 + *c;
    int avx = has_avx();
    for (int round = 0; round < ROUNDS; round++) {
        memset(found, 0, sizeof found);
        for (int i = 0; i < (int)sizeof pattern; i++) {
            state = state * 1664525 + 1013904223;
            ((unsigned char *)pattern)[i] = avx || i % 32 < 16 ? state >> 24 : 0;
        }
        if (avx)
            __asm__ volatile(EACH(LOAD_Y, ) YIELD EACH(STORE_Y, ) "vzeroupper"
                             : : "r"(pattern), "r"(found) : CLOBBERED);
        else
            __asm__ volatile(EACH(LOAD_X, ) YIELD EACH(STORE_X, ) : : "r"(pattern), "r"(found) : CLOBBERED);
        if (memcmp(pattern, found, sizeof pattern)) {
            printf("%s: round %d differs\n", argv[1], round);
            return 1;
        }
    }
    printf("%s: ok\n", argv[1]);
    return 0;
}
"""

# A 32-bit program without a C library: thread-local storage through GS, an FNV hash over its own computation, and its
# result as exit status. Several of them at once have several descriptors in the same place of the GDT.
I386 = r"""
struct user_desc { unsigned number, base, limit, flags; };

static int call(int number, int a, int b, int c) {
    int result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "b"(a), "c"(b), "d"(c) : "memory");
    return result;
}

static unsigned block[4];

__attribute__((noreturn)) void start(unsigned seed) {
    struct user_desc segment = { -1, (unsigned)block, 0xfffff, 0x51 };  /* 32-bit, limit in pages, useable */
    if (call(243, (int)&segment, 0, 0)) call(1, 255, 0, 0);  /* set_thread_area */
    __asm__ volatile("mov %0, %%gs" : : "r"(segment.number << 3 | 3));
    block[1] = seed;
    unsigned hash = 2166136261u;
    for (unsigned i = 0; i < 20000; i++) {
        unsigned own;
        __asm__ volatile("mov %%gs:4, %0" : "=r"(own));
        hash = (hash ^ (own + i)) * 16777619u;
        if (i % 100 == 0) call(158, 0, 0, 0);  /* sched_yield */
    }
    call(1, (hash ^ hash >> 16) & 127, 0, 0);
    __builtin_unreachable();
}

__asm__(".globl _start\n_start: mov 8(%esp), %eax\nmovzbl (%eax), %eax\npush %eax\ncall start\n");
"""


# A 64-bit program that goes on in 32-bit code and comes back, as those do that run Windows' programs.
BOTH = r"""
#include <stdio.h>

unsigned long stack, other[64];
unsigned done;
#define AROUND "1: incl done\n ljmp $0x33, $2f\n .code64\n2: mov stack, %%rsp\n"
#define CLOBBERS : : : "rax", "rcx", "rdx", "memory", "cc"

int main(void) {
    __asm__ volatile("mov %0, %%ds" : : "r"(0x2b));
    for (int i = 0; i < 500; i++) {
        __asm__ volatile("mov %%rsp, stack\n push $0x2b\n push $other + 256\n pushfq\n push $0x23\n push $1f\n iretq\n"
                         ".code32\n" AROUND CLOBBERS);
        __asm__ volatile("mov %%rsp, stack\n mov $other + 256, %%esp\n push $0x23\n push $1f\n lretq\n"
                         ".code32\n" AROUND CLOBBERS);
    }
    printf("%u\n", done);
}
"""


def expected_status(seed: str) -> int:
    """What the 32-bit program exits with."""
    value = 2166136261
    for i in range(20_000):
        value = (value ^ (ord(seed) + i)) * 16777619 & 0xFFFF_FFFF
    return (value ^ value >> 16) & 127


@pytest.fixture(params=["unicorn", "kvm", "adaptive", STUBS])
def engine_name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    engine = str(request.param)
    if engine == STUBS:
        return unicorn_with_stubs(monkeypatch)
    if reason := missing(engine):
        pytest.skip(f"no {engine} engine here: {reason}")
    return engine


def build(source: str, to: Path, *options: str) -> Path:
    """Compile a static program with the host's compiler; skips where it has none."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc on this host")
    (to.parent / f"{to.name}.c").write_text(source)
    line = [compiler, "-O1", "-static", *options, "-o", str(to), f"{to}.c"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"gcc cannot build it here: {done.stderr.strip().splitlines()[-1]}")
    return to


def test_vector_registers_are_each_processes_own(xenolith_run: Run, tmp_path: Path) -> None:
    program = build(VECTORS, tmp_path / "vectors", f"-DROUNDS={ROUNDS}")
    job = "/usr/bin/vectors $job || echo failed $job"
    script = f"for job in $(seq 1 {PROCESSES}); do ({job}) & done; wait"
    done = xenolith_run("--file", f"{program}:/usr/bin/vectors", "--", "sh", "-c", script)
    assert sorted(done.stdout.decode().splitlines()) == [f"{job}: ok" for job in range(1, PROCESSES + 1)]


def test_32_bit_programs_with_thread_local_storage_run_side_by_side(xenolith_run: Run, tmp_path: Path) -> None:
    program = build(I386, tmp_path / "i386", "-m32", "-nostdlib", "-ffreestanding", "-fno-pie", "-fno-stack-protector")
    job = "/usr/bin/i386 $job; echo $job $?"
    script = f"for job in a b c d; do ({job}) & done; wait"
    done = xenolith_run("--file", f"{program}:/usr/bin/i386", "--", "sh", "-c", script)
    assert sorted(done.stdout.decode().splitlines()) == [f"{job} {expected_status(job)}" for job in "abcd"]


def test_a_program_goes_from_64_bit_code_to_32_bit_code_and_back(xenolith_run: Run, tmp_path: Path) -> None:
    program = build(BOTH, tmp_path / "both", "-no-pie", "-fno-pie")
    done = xenolith_run("--file", f"{program}:/usr/bin/both", "--", "/usr/bin/both")
    assert done.stdout == b"1000\n"


# No system call for some 20,000 rounds, then a look for the file. The first line of /proc/interrupts is the timer's.
COMPUTES = """
(sleep 1; echo woke; >/woke) &
read uptime rest </proc/uptime
read line cpu ticks rest <<END
$(head -2 /proc/interrupts | tail -1) -
END
before=$cpu start=$((${uptime%.*} * 100 + 1${uptime#*.} - 100))
i=0
while [ $((i % 20000)) -ne 0 ] || [ ! -e /woke ] || [ $i -lt 200000 ]; do i=$((i+1)); done
read uptime rest </proc/uptime
read line cpu rest <<END
$(head -2 /proc/interrupts | tail -1) -
END
echo $((cpu - before)) ticks in $(($((${uptime%.*} * 100 + 1${uptime#*.} - 100)) - start))
"""


@pytest.mark.parametrize("fifo", [False, True], ids=["bitmaps", "fifo"])
def test_a_program_that_computes_is_interrupted_by_ticks(xenolith_run: Run, fifo: bool) -> None:
    """They count its time, and let another program run when it is time for that."""
    done = xenolith_run("--cmdline", f"xen.fifo_events={int(fifo)}", "--", "sh", "-c", COMPUTES)
    woke, (ticks, *_, hundredths) = (line.split() for line in done.stdout.decode().splitlines())
    assert woke == ["woke"]
    assert int(hundredths) >= 30
    assert int(hundredths) * 2.5 * 0.02 < int(ticks) < int(hundredths) * 2.5 * 1.2  # 250 a second, if the host has time
