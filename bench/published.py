"""The figures of the papers, to stand beside ours.

"Xen and the Art of Virtualization" (Barham et al., SOSP 2003), on a dual 2.4 GHz Xeon: native Linux on one
CPU (L-UP), Xen's XenoLinux, VMware Workstation 3.2 and User-Mode Linux.  Context switches and
latencies are in microseconds, in the order L-UP, Xen, VMware, UML.
"""

from __future__ import annotations

from dataclasses import dataclass

SYSTEMS = ("Linux", "Xen", "VMware", "UML")

LMBENCH: dict[str, tuple[float, float, float, float]] = {
    # Table 3: processes
    "null_syscall": (0.45, 0.46, 0.73, 24.7),
    "stat": (1.28, 1.22, 1.88, 36.1),
    "open_close": (1.92, 1.88, 2.99, 62.8),
    "select_tcp": (5.70, 5.69, 11.1, 39.9),
    "signal_install": (0.68, 0.69, 1.02, 26.0),
    "signal_handle": (2.49, 1.75, 4.63, 46.0),
    "fork_exit": (110, 198, 874, 21_000),
    "fork_exec": (530, 768, 2_300, 33_000),
    "fork_sh": (4_000, 4_800, 10_000, 58_000),
    # Table 4: context switches
    "ctx_2p_0k": (0.77, 1.97, 18.1, 15.5),
    "ctx_2p_16k": (0.91, 2.22, 17.6, 14.6),
    "ctx_2p_64k": (1.06, 2.67, 21.3, 14.4),
    "ctx_8p_16k": (1.03, 3.07, 22.4, 16.3),
    "ctx_8p_64k": (24.3, 28.7, 51.6, 36.8),
    "ctx_16p_16k": (3.61, 7.08, 41.7, 23.6),
    "ctx_16p_64k": (37.6, 39.4, 72.2, 52.0),
    # Table 5: files and virtual memory
    "create_0k": (32.1, 32.5, 35.3, 130),
    "delete_0k": (6.08, 5.86, 9.3, 65.7),
    "create_10k": (66.0, 68.2, 85.6, 250),
    "delete_10k": (12.5, 13.6, 21.4, 113),
    "mmap_munmap": (68.0, 139, 620, 1_400),
    "protection_fault": (1.06, 1.40, 7.53, 21.8),
    "page_fault": (1.42, 2.73, 12.4, 26.3),
}
"""Rows of ours that the paper has too. Its mmap row maps a file and touches it; ours maps only."""


@dataclass(frozen=True)
class Published:
    """One group of bars of figure 3, with the values that the paper prints on them."""

    title: str
    values: tuple[float, float, float, float]
    higher_is_better: bool

    def relative(self) -> tuple[float, ...]:
        """Performance in relation to Linux."""
        linux = self.values[0]
        return tuple(value / linux if self.higher_is_better else linux / value for value in self.values)


FIGURE_3 = (
    Published("SPEC INT2000", (567, 567, 554, 550), True),
    Published("Linux build", (263, 271, 334, 535), False),
    Published("OSDB-IR", (172, 158, 80, 65), True),
    Published("OSDB-OLTP", (1714, 1633, 199, 306), True),
    Published("dbench", (418, 400, 310, 111), True),
    Published("SPECweb99", (518, 514, 150, 172), True),
)

FIGURE_5 = (
    "isolation: two domains run benchmarks (PostgreSQL's OSDB-IR, SPECweb99) while two others misbehave (a disk hog, "
    "a fork bomb with a memory hog): the first lost 4 %, the second 2 %"
)
FIGURE_6 = "scalability: 128 domains running SPEC CINT2000 at once lose 7.5 % of the throughput of Linux processes"
