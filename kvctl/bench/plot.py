"""One picture of a TTFT report: bars per tier and context on a log scale, readable in grey."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from appliance.errors import KvctlError

# Okabe-Ito colours, told apart by hatching too
STYLES = {
    "cold": ("#999999", ""),
    "hbm": ("#009E73", "//"),
    "dram": ("#56B4E9", ".."),
    "nvme": ("#E69F00", "xx"),
}


def save(path: Path, title: str, groups: Sequence[tuple[str, Sequence[tuple[str, float]]]]) -> None:
    """groups: (label, [(tier, ttft seconds), ...]). KvctlError when matplotlib is missing or the file cannot be written."""
    try:
        import matplotlib
    except ImportError:
        raise KvctlError("a plot needs matplotlib: pip install 'kvctl[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=150)
    width = 0.8 / max(len(bars) for _, bars in groups)
    seen: set[str] = set()
    for at, (_, bars) in enumerate(groups):
        cold_s = bars[0][1]
        for i, (tier, seconds) in enumerate(bars):
            colour, hatch = STYLES[tier]
            x = at + (i - (len(bars) - 1) / 2) * width
            label = None if tier in seen else tier
            seen.add(tier)
            axes.bar(x, seconds, width * 0.92, color=colour, hatch=hatch, edgecolor="black", linewidth=0.6, label=label)
            said = f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"
            ratio = "" if tier == "cold" else f"\n{cold_s / seconds:,.0f}x"
            axes.text(x, seconds * 1.08, said + ratio, ha="center", va="bottom", fontsize=8)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * 4)
    axes.set_xticks(range(len(groups)), [label for label, _ in groups])
    axes.set_ylabel("time to first token, seconds (log)")
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, ncols=4, loc="upper left", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    try:
        figure.savefig(path)
    except OSError as error:
        raise KvctlError(f"{path}: {error.strerror}") from None
    finally:
        plt.close(figure)
