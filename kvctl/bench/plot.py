"""Pictures of bench reports, readable in grey."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from appliance.errors import KvctlError, UsageError

# Okabe-Ito colours, told apart by hatching too
STYLES = {
    "cold": ("#999999", ""),
    "hbm": ("#009E73", "//"),
    "dram": ("#56B4E9", ".."),
    "nvme": ("#E69F00", "xx"),
}

COLOURS = ("#009E73", "#E69F00", "#999999")
"""Of an appliance with tiers, with hbm only, and without reuse."""


def check(path: Path) -> None:
    """KvctlError, or UsageError, if nothing could be drawn there: said before a measurement of an hour, not after it."""
    _pyplot()
    from matplotlib.backend_bases import FigureCanvasBase

    if not path.parent.is_dir():
        raise UsageError(f"{path.parent}: no such folder for the plot")
    if path.suffix.lstrip(".") not in FigureCanvasBase.filetypes:
        raise UsageError(f"{path}: a plot cannot be written in this format; name it like plot.png or plot.svg")


def save(path: Path, title: str, groups: Sequence[tuple[str, Sequence[tuple[str, float]]]]) -> None:
    """groups: (label, [(tier, ttft seconds), ...]). KvctlError when matplotlib is missing or the file cannot be written."""
    plt = _pyplot()
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
    _write(plt, figure, path)


def save_sessions(
    path: Path, title: str, curves: Sequence[tuple[str, Sequence[float]]], rates: Sequence[tuple[str, float]]
) -> None:
    """curves: (appliance, TTFT seconds of each request); rates: (appliance, requests per hour). KvctlError as for save()."""
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), dpi=150, width_ratios=(3, 1))
    for (name, seconds), line, colour in zip(curves, ("-", "--", ":"), COLOURS, strict=False):
        ordered = sorted(seconds)
        shares = [(n + 1) / len(ordered) for n in range(len(ordered))]
        left.step(ordered, shares, where="post", label=name, linestyle=line, color=colour, linewidth=1.8)
    left.set_xscale("log")
    left.set_ylim(0, 1)
    left.set_xlabel("time to first token of turns 2 and later, seconds (log)")
    left.set_ylabel("share of requests")
    left.legend(frameon=False, loc="lower right", fontsize=8)
    for at, ((_, rate), colour) in enumerate(zip(rates, COLOURS, strict=False)):
        right.bar(at, rate, color=colour, edgecolor="black", linewidth=0.6)
        right.text(at, rate, f"{rate:,.0f}", ha="center", va="bottom", fontsize=8)
    right.set_xticks(range(len(rates)), [name for name, _ in rates], fontsize=8)
    right.set_ylabel("requests per hour")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    _write(plt, figure, path)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise KvctlError("a plot needs matplotlib: pip install 'kvctl[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _write(plt: Any, figure: Any, path: Path) -> None:
    figure.tight_layout()
    try:
        figure.savefig(path)
    except OSError as error:
        raise KvctlError(f"{path}: {error.strerror}") from None
    finally:
        plt.close(figure)
