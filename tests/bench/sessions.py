"""`make bench-sessions`: many users on one box, held against the promises, printed and written to docs/SESSIONS.md.

What the planner did is looked at once more when all is known. Seconds to compute at a depth and seconds to load from each
tier are fitted, by least squares, to what every request of the run with tiers really took. A choice was wrong if by these
numbers it costs over 25 % more, and noticeably more (20 ms), than the best of its alternatives.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from appliance import config
from appliance.ops import synth
from kvctl import output
from kvctl.bench import sessions, workload
from tests.bench.__main__ import ROOT, Line, _cpu, _markdown, _verdict

DEARER, NOTICED_S = 1.25, 0.02
LOADED = ("dram", "nvme")


@dataclass(frozen=True)
class Taken:
    """One request of the run with tiers, in seconds and tokens."""

    prompt: int
    resident: int
    loaded: dict[str, int]
    """Tokens by tier."""
    load_s: float
    compute_s: float
    service_s: float
    estimated_service_s: float
    first_token_s: float
    estimated_first_token_s: float
    ways: dict[str, tuple[int, int]]
    """(load to, compute the front to) of each alternative."""
    chosen: str

    @classmethod
    def of(cls, asked: sessions.Asked) -> Taken:
        explained: dict[str, Any] = asked.explained
        times, tokens = explained["timings_ms"], explained["tokens"]
        (decision,) = explained["decisions"]
        chosen = decision["alternatives"][decision["reason"]]
        return cls(
            prompt=asked.prompt_tokens,
            resident=tokens["hbm"],
            loaded={tier: tokens[tier] for tier in LOADED},
            load_s=times["load"] / 1e3,
            compute_s=times["compute"] / 1e3,
            service_s=times["service"] / 1e3,
            estimated_service_s=(chosen["load_ms"] + chosen["compute_ms"]) / 1e3,
            first_token_s=times["prompt"] / 1e3,
            estimated_first_token_s=decision["estimated_ms"] / 1e3,
            ways={
                name: (way["load_to_tokens"], way["compute_first_tokens"])
                for name, way in decision["alternatives"].items()
            },
            chosen=decision["reason"],
        )


class Hindsight:
    """What things cost in this run, once all of it is known."""

    def __init__(self, taken: Sequence[Taken]) -> None:
        rows = [_work(each.prompt - _computed(each), each.prompt) for each in taken]
        self._compute = _fit(rows, [each.compute_s for each in taken])
        loads = [each for each in taken if sum(each.loaded.values())]
        rows = [[1.0, *(float(each.loaded[tier]) for tier in LOADED)] for each in loads]
        self._load = _fit(rows, [each.load_s for each in loads]) if loads else np.zeros(3)

    def service_s(self, each: Taken, load_to: int, front_to: int) -> float:
        """Of one way to serve it."""
        stored = sum(each.loaded.values())
        stop = max(load_to, each.resident)
        share = min(1.0, max(0, stop - max(front_to, each.resident)) / stored) if stored else 0.0
        load = [1.0 if share else 0.0, *(each.loaded[tier] * share for tier in LOADED)]
        load_s = float(np.dot(self._load, load))
        rest_s = float(np.dot(self._compute, _work(stop, each.prompt)))
        front_s = float(np.dot(self._compute, _work(each.resident, front_to))) if front_to else 0.0
        return max(load_s, front_s) + rest_s

    def wrong(self, taken: Sequence[Taken]) -> int:
        """Choices that cost more than the best of their alternatives."""
        count = 0
        for each in taken:
            costs = {name: self.service_s(each, *way) for name, way in each.ways.items()}
            best_s = min(costs.values())
            count += costs[each.chosen] > max(DEARER * best_s, best_s + NOTICED_S)
        return count


def _computed(each: Taken) -> int:
    return each.prompt - each.resident - sum(each.loaded.values())


def _work(start: int, stop: int) -> list[float]:
    """A call, tokens, and tokens times their depth: what computing [start, stop) is made of."""
    start = min(start, stop - 1)
    return [1.0, float(stop - start), (stop * stop - start * start) / 2]


def _fit(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> Any:
    """Coefficients >= 0, of relative errors: what would come out negative is left out."""
    matrix, target = np.array(rows), np.array(seconds)
    scale = 1 / np.maximum(target, 1e-6)
    used = list(range(matrix.shape[1]))
    while used:
        found, *_ = np.linalg.lstsq(matrix[:, used] * scale[:, None], target * scale, rcond=None)
        if (found >= 0).all():
            break
        used.remove(used[int(np.argmin(found))])
    coefficients = np.zeros(matrix.shape[1])
    if used:
        coefficients[used] = found
    return coefficients


def close(pairs: Sequence[tuple[float, float]]) -> float:
    """Share of (estimated, actual) that are within 25 %, or within what nobody notices."""
    return sum(abs(e - a) <= max(0.25 * a, NOTICED_S) for e, a in pairs) / len(pairs)


def lines(report: sessions.SessionsReport) -> Iterator[Line]:
    tiers, off, _ = report.runs
    taken = [Taken.of(asked) for asked in tiers.requests]
    ratio = tiers.requests_per_hour / off.requests_per_hour
    yield Line("requests per hour against hbm only", ">= 3x", f"{ratio:.1f}x", ratio >= 3)
    for name, least, ours, theirs in (
        ("p50", 10, tiers.later_ttft_p50_s, off.later_ttft_p50_s),
        ("p95", 5, tiers.later_ttft_p95_s, off.later_ttft_p95_s),
    ):
        ratio = theirs / ours
        yield Line(f"{name} TTFT of turns 2 and later, lower by", f">= {least}x", f"{ratio:.1f}x", ratio >= least)
    spread = tiers.tpot_p95_s / tiers.tpot_p50_s
    yield Line("p95/p50 of time per output token", "<= 1.5", f"{spread:.2f}", spread <= 1.5)
    share = tiers.cached_share
    yield Line("tokens from cache, of what an infinite one would serve", ">= 0.90", f"{share:.3f}", share >= 0.9)
    wrong = report.differing_beyond_rounding
    what = "answers other than without reuse, beyond the rounding of another batch"
    yield Line(what, "0", f"{wrong} (of {report.differing} that differ)", wrong == 0)
    bad = Hindsight(taken).wrong(taken) / len(taken)
    yield Line("planner's choices dearer by more than 25 % than the best", "<= 5 %", f"{100 * bad:.1f} %", bad <= 0.05)
    service = close([(each.estimated_service_s, each.service_s) for each in taken])
    yield Line("estimates of the request's own cost within 25 %", ">= 90 %", f"{100 * service:.0f} %", service >= 0.9)
    first = close([(each.estimated_first_token_s, each.first_token_s) for each in taken])
    yield Line("the same of the first token, others' work included", "shown", f"{100 * first:.0f} %", None)


def document(report: sessions.SessionsReport, seconds: float) -> str:
    """docs/SESSIONS.md."""
    rows = [
        (
            run.name,
            f"{run.requests_per_hour:,.0f}",
            output.duration(run.first_ttft_p50_s),
            output.duration(run.later_ttft_p50_s),
            output.duration(run.later_ttft_p95_s),
            f"{output.duration(run.tpot_p50_s)} / {output.duration(run.tpot_p95_s)}",
            f"{run.cached_share:.3f}",
        )
        for run in report.runs
    ]
    head = (
        "appliance",
        "requests/h",
        "TTFT p50, 1st turn",
        "p50, later",
        "p95, later",
        "TPOT p50 / p95",
        "of infinite",
    )
    promises = [(line.what, line.target, line.measured, _verdict(line)) for line in lines(report)]
    about = "\n\n".join((module.__doc__ or "").strip() for module in (sessions, workload, sys.modules[__name__]))
    return "\n\n".join(
        [
            "# Many users on one box",
            "Written by `make bench-sessions`. Every number comes from the run described here.",
            _markdown(("what", "at least / at most", "measured", ""), promises),
            f"{report.sessions} sessions of {report.turns} turns, {report.total_tokens:,} tokens together;"
            f" {report.cells:,} cells, a pool for {report.pool_tokens:,} tokens.",
            _markdown(head, rows),
            "## Method",
            f"Machine: {_cpu()}; {report.engine}; model {report.model}, synthetic. {time.strftime('%Y-%m-%d', time.gmtime())},"
            f" {seconds / 60:.0f} minutes in all.\n\n{about}\n",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.sessions", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="with the tiny model")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "SESSIONS.md", help="where the document goes")
    options = parser.parse_args()
    folder = config.home(None)
    folder.mkdir(parents=True, exist_ok=True)
    began_s = time.monotonic()
    with output.steps() as say:
        model = synth.synth("tiny", folder / "models" / "tiny.gguf") if options.quick else synth.default_model(folder)
        plan = workload.Workload(12, 5, (2048, 6144), 512, 24, 0.2 if options.quick else 2.0, 0)
        report = sessions.run(sessions.Options(model, plan, folder, "laptop-cpu", (), say))
    found = list(lines(report))
    rows = [
        (line.what, line.target, line.measured, "" if line.kept is None else "kept" if line.kept else "[red]missed[/]")
        for line in found
    ]
    output.stdout().print(output.table(["what", ">target", ">measured", ""], rows))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(document(report, time.monotonic() - began_s), encoding="utf-8")
    output.stderr().print(f"written to {options.out}")
    return 0 if all(line.kept is not False for line in found) else 1


if __name__ == "__main__":
    sys.exit(main())
