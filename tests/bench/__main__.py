"""`make bench`: every number the project promises, measured on this box, printed and written to docs/BENCHMARKS.md.

Takes half an hour on two cores, most of it the two cold prompts. Nothing else should run on the box.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from appliance import config
from appliance.ops import synth
from kvctl import output
from kvctl.bench import ttft
from tests.bench import disk_cache, interference, lookup

ROOT = Path(__file__).resolve().parents[2]
SHORT, LONG = 8192, 32768


@dataclass(frozen=True)
class Line:
    """One promise."""

    what: str
    target: str
    measured: str
    kept: bool | None
    """None: shown, without a bound."""


@dataclass(frozen=True)
class Results:
    ttft: ttft.TtftReport
    disk_cache: disk_cache.DiskCacheTimes
    interference: interference.Interference
    lookup: lookup.LookupTimes
    seconds: float


def measure(folder: Path, long: int) -> Results:
    began_s = time.monotonic()
    with output.steps() as say:
        model = synth.default_model(folder, lambda done: say("writing random weights", done))
        say("index lookup: 1M tokens among 1M blocks")
        looked_up = lookup.measure(folder)
        report = ttft.run(
            ttft.Options(
                model=model, contexts=(SHORT, long), repeat=3, folder=folder, profile="default", overrides=(), say=say
            )
        )
        say("LlamaDiskCache: cold, then restarted")
        cached = disk_cache.measure(model, folder, SHORT, report.quiet_threads, report.batch_threads)
        beside = interference.measure(model, folder, say)
    return Results(report, cached, beside, looked_up, time.monotonic() - began_s)


def lines(results: Results) -> Iterator[Line]:
    contexts = [(context, {each.tier: each for each in context.measured}) for context in results.ttft.contexts]
    for (context, tiers), least in zip(contexts, (300, 500), strict=True):
        n = f"{context.prompt_tokens:,}"
        speedup = tiers["nvme"].speedup
        yield Line(
            f"TTFT from NVMe after SIGKILL, {n} tokens, against cold",
            f">= {least}x",
            f"{speedup:,.0f}x",
            speedup >= least,
        )
        over = tiers["nvme"].over_floor
        yield Line(f"that TTFT over its floor, {n} tokens", "<= 1.5", f"{over:.2f}", over <= 1.5)
    (short, short_tiers), (long, long_tiers) = contexts
    speedup = short_tiers["dram"].speedup
    yield Line(f"TTFT from DRAM, {SHORT:,} tokens, against cold", ">= 400x", f"{speedup:,.0f}x", speedup >= 400)
    ratio = results.disk_cache.warm_s / short_tiers["nvme"].ttft_s
    yield Line(f"TTFT after restart against LlamaDiskCache, {SHORT:,} tokens", ">= 2x", f"{ratio:.1f}x", ratio >= 2)
    share = long_tiers["nvme"].restored_bytes_per_s / long.device_read_bytes_per_s
    what = f"restore rate over the device's O_DIRECT rate, {long.prompt_tokens:,} tokens"
    yield Line(what, ">= 0.6", f"{share:.2f}", share >= 0.6)
    report = results.ttft
    threads = f"decode {report.quiet_threads}, {report.threads} beside others; prefill {report.batch_threads}"
    yield Line("threads calibrated at start", "shown", threads, None)
    for name, added in (("written behind", results.interference.written), ("restored", results.interference.restored)):
        what = f"added TPOT of a stream while {SHORT:,} tokens are {name}"
        yield Line(what, "<= 10 %", f"{100 * added.share:.1f} %", added.share <= 0.1)
    looked_up = results.lookup
    what = f"index lookup of {looked_up.prompt_tokens:,} tokens among {looked_up.blocks:,} blocks"
    yield Line(what, "<= 30 ms", f"{looked_up.median_s * 1e3:.1f} ms", looked_up.median_s <= 0.03)
    over_s = short_tiers["hbm"].ttft_s - short.decode_step_s
    what = f"overhead on TTFT, all in HBM, {SHORT:,} tokens, over one decode step"
    yield Line(what, "<= 15 ms", f"{over_s * 1e3:.1f} ms", over_s <= 0.015)
    rss = report.rss_bytes / 2**20
    yield Line("resident memory beyond weights, cells and pool", "<= 400 MB", f"{rss:.0f} MiB", rss <= 400)
    same = all(each.same_completion for _, tiers in contexts for each in tiers.values())
    yield Line("greedy completions from every tier", "equal to cold", "equal" if same else "different", same)


def document(results: Results) -> str:
    """docs/BENCHMARKS.md."""
    parts = [
        "# Benchmarks",
        "Written by `make bench`. Every number comes from the run described here; nothing is retried or left out.",
        "## Promises",
        _markdown(
            ("what", "at least / at most", "measured", ""),
            [(line.what, line.target, line.measured, _verdict(line)) for line in lines(results)],
        ),
        "## Time to first token",
    ]
    for context in results.ttft.contexts:
        rows = [
            (
                each.tier,
                output.duration(each.ttft_s),
                ", ".join(output.duration(run) for run in each.runs),
                f"{each.speedup:,.0f}x",
                f"{each.cached_tokens:,}",
                f"{each.restored_bytes / 1e6:,.0f} MB" if each.restored_bytes else "",
                f"{each.restored_bytes_per_s / 1e9:.2f} GB/s" if each.restored_bytes_per_s else "",
                f"{output.duration(each.floor_s)} / {each.over_floor:.2f}" if each.tier != "cold" else "",
            )
            for each in context.measured
        ]
        head = ("tier", "TTFT", "runs", "speed-up", "cached", "restored", "rate", "floor / over it")
        device = f"{context.device_read_bytes_per_s / 1e9:.2f} GB/s"
        step = output.duration(context.decode_step_s)
        cold_s = context.measured[0].ttft_s
        floor_s = next(each.floor_s for each in context.measured if each.tier == "nvme")
        most = f"{cold_s / context.decode_step_s:,.0f}x", f"{cold_s / floor_s:,.0f}x"
        parts += [
            f"{context.prompt_tokens:,} tokens; the device reads {device} past the page cache; a decode step takes {step}."
            f" The first token costs a decode step at this depth wherever its context comes from, so the most that can be"
            f" had here is {most[0]} from memory and {most[1]} from the device.",
            _markdown(head, rows),
        ]
    cached, beside = results.disk_cache, results.interference
    parts += [
        f"LlamaDiskCache, {SHORT:,} tokens: cold {output.duration(cached.cold_s)}, after a restart"
        f" {output.duration(cached.warm_s)} ({', '.join(output.duration(run) for run in cached.runs)}),"
        f" {cached.stored_bytes / 1e6:,.0f} MB stored.",
        "## A running stream beside another request's context",
        _markdown(
            ("the other context is", "TPOT before", "during", "after", "tokens during"),
            [
                (
                    name,
                    *(f"{s * 1e3:.1f} ms" for s in (added.before_s, added.during_s, added.after_s)),
                    str(added.tokens),
                )
                for name, added in (("written behind", beside.written), ("restored", beside.restored))
            ],
        ),
        "## Method",
        _method(results),
    ]
    return "\n\n".join(parts) + "\n"


def _method(results: Results) -> str:
    modules = (ttft, disk_cache, interference, lookup)
    about = "\n\n".join((module.__doc__ or "").strip() for module in modules)
    machine = f"{_cpu()}, {len(os.sched_getaffinity(0))} cores, {_memory_gib():.0f} GiB, {platform.system()} {platform.release()}"
    return (
        f"Machine: {machine}; Python {platform.python_version()}; {results.ttft.engine}; model {results.ttft.model}, synthetic,"
        f" {results.ttft.kv_bytes_per_token:,} bytes of KV per token. {time.strftime('%Y-%m-%d', time.gmtime())},"
        f" {results.seconds / 60:.0f} minutes in all. Absolute times are those of this machine; ratios are from one run.\n\n{about}"
    )


def _verdict(line: Line) -> str:
    return "" if line.kept is None else "kept" if line.kept else "**missed**"


def _markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))


def _cpu() -> str:
    found = [line for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if "model name" in line]
    return found[0].partition(":")[2].strip() if found else platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--long", type=int, default=LONG, help=f"tokens of the longer prompt (default {LONG:,})")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "BENCHMARKS.md", help="where the document goes")
    options = parser.parse_args()
    folder = config.home(None)
    folder.mkdir(parents=True, exist_ok=True)
    results = measure(folder, options.long)
    console = output.stdout()
    rows = [
        (line.what, line.target, line.measured, "" if line.kept is None else "kept" if line.kept else "[red]missed[/]")
        for line in lines(results)
    ]
    console.print(output.table(["what", ">target", ">measured", ""], rows))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(document(results), encoding="utf-8")
    output.stderr().print(f"written to {options.out}")
    return 0 if all(line.kept is not False for line in lines(results)) else 1


if __name__ == "__main__":
    sys.exit(main())
