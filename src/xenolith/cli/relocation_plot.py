"""A relocation drawn as in its paper (Clark et al., NSDI 2005): rounds, bandwidth, dirtying rate, downtime."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from xenolith.toolstack.client import RelocationInfo

MIB = 1 << 20
PAGE = 4096
NS = 1e9


def plot(took: RelocationInfo, path: Path) -> None:
    """Draw into a file, whose name says the format. Raises OSError and ValueError."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("seconds")
    axes.set_ylabel("MiB/s")
    for number, each in enumerate(took.rounds):
        began, length = each.began_ns / NS, max(each.ended_ns - each.began_ns, 1) / NS
        sent, written = each.pages * PAGE / MIB, each.written * PAGE / MIB
        axes.bar(
            began, sent / length, length, align="edge", color="0.75", edgecolor="black",
            label=None if number else "sent while it ran",
        )  # fmt: skip
        axes.plot(
            [began, began + length], [written / length] * 2, color="tab:red", linewidth=2,
            label=None if number else "written meanwhile",
        )  # fmt: skip
        axes.text(began + length / 2, sent / length, f"{sent:.1f}", ha="center", va="bottom", fontsize="small")
    end = took.took_ns / NS
    down = took.down_ns / NS
    last = took.last_pages * PAGE / MIB
    axes.axvspan(
        end - down, end, color="tab:blue", alpha=0.3, label=f"stands still: {down * 1000:.0f} ms, {last:.1f} MiB"
    )
    axes.legend()
    figure.savefig(path)
