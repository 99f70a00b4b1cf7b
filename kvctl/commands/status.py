"""kvctl status: what runs, how fast, and how full."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from kvctl import output
from kvctl.options import Home, Json, locate

if TYPE_CHECKING:
    from rich.console import RenderableType

    from appliance.api.control import Loading, Process, Status


def status(ctx: typer.Context, home: Home = None, as_json: Json = False) -> None:
    """Show the running appliance: model, speed, tiers, totals."""
    from kvctl.client import AdminClient

    with AdminClient(locate(ctx, home)) as admin:
        found = admin.look()
    if as_json:
        output.print_json(found)
        return
    console = output.stdout()
    for part in _loading(found) if found.state == "loading" else _parts(found):
        console.print(part)


def _loading(now: Loading) -> Iterator[RenderableType]:
    yield output.fields(
        [
            ("state", f"[yellow]{output.plain(now.progress)}[/] for {_since(now)}"),
            ("address", output.plain(now.base_url)),
            ("home", output.plain(now.home)),
        ]
    )


def _since(process: Process) -> str:
    return f"{output.duration(process.uptime_s)}, pid {process.pid}, version {process.version}"


def _parts(status: Status) -> Iterator[RenderableType]:
    engine, totals = status.engine, status.totals
    colour = "green" if status.state == "ready" else "yellow"
    restarts = f", restarted {engine.restarts}x" if engine.restarts else ""
    cached = sum(totals.cached_tokens.values())
    by_tier = ", ".join(f"{tier} {output.count(n)}" for tier, n in totals.cached_tokens.items() if n)
    from_cache = f" ({output.share(cached, totals.prompt_tokens)} cached: {by_tier})" if cached else ""
    tenants = f" of {status.waiting_tenants} tenants" if status.waiting_tenants > 1 else ""
    pressure = [
        f"{output.count(n)} {what}"
        for n, what in (
            (totals.staged_ahead_tokens, "tokens staged while their request waited"),
            (totals.preemptions, "preemptions"),
            (totals.requeued_requests, "asked again after a crash"),
        )
        if n
    ]
    ahead = totals.prefetched
    prefetched = f"{output.count(ahead.moved)} blocks" + "".join(
        f", {output.count(n)} {what}"
        for n, what in ((ahead.hit, "in time"), (ahead.late, "late"), (ahead.wasted, "not needed"))
        if n
    )
    failures = [
        f"{output.count(n)} {what}"
        for n, what in ((totals.integrity_failures, "records did not verify"), (totals.tier_failures, "tier failures"))
        if n
    ]
    restored = [
        f"{tier} {output.size(n)}" + (f" at {output.size(rate)}/s" if rate else "")
        for (tier, n), rate in zip(totals.loaded_bytes.items(), totals.load_bytes_per_s.values(), strict=True)
        if n
    ]
    pinned = ", ".join(
        f"{tier.tier} {output.count(tier.pinned_blocks)} blocks, {output.size(tier.pinned_bytes)} of {output.size(tier.pin_budget_bytes)}"
        for tier in status.tiers
        if tier.pinned_blocks
    )
    yield output.fields(
        [
            (
                "state",
                f"[{colour}]{status.state}[/] for {_since(status)}",
            ),
            ("address", output.plain(status.base_url)),
            ("home", output.plain(status.home)),
            ("model", f"{output.plain(engine.model)}  [dim]{output.plain(engine.description)}[/]"),
            ("engine", f"{engine.engine}, pid {engine.pid or '-'}{restarts}"),
            (
                "context",
                f"{output.count(engine.context_tokens)} tokens, {output.size(engine.kv_bytes_per_token)} each, KV {engine.kv_mode}",
            ),
            (
                "threads",
                f"decode {engine.quiet_threads}, {engine.threads} beside others; prefill {engine.batch_threads}",
            ),
            ("measured", f"{engine.decode_step_ms:.1f} ms per token, {engine.prefill_tokens_per_s:,.0f} tok/s prefill"),
            (
                "memory",
                f"weights {output.size(engine.weight_bytes)}, cells {output.size(engine.cell_bytes)}, the rest {output.size(status.rss_bytes)}",
            ),
            (
                "requests",
                f"{status.running} running, {status.waiting} waiting{tenants}, {output.count(totals.requests)} since start",
            ),
            (
                "tokens",
                f"{output.count(totals.prompt_tokens)} prompt{from_cache}, {output.count(totals.completion_tokens)} completion",
            ),
            *([("restored", ", ".join(restored))] if restored else []),
            *([("prefetched", prefetched)] if ahead.moved else []),
            *([("pinned", pinned)] if pinned else []),
            *([("pressure", ", ".join(pressure))] if pressure else []),
            *([("failures", f"[red]{', '.join(failures)}[/]")] if failures else []),
        ]
    )
    yield ""
    yield output.table(
        ["tier", "state", ">used", ">of", ">full", ">blocks", ">tokens", ">pending"],
        (
            (
                f"[{output.TIER_STYLE[tier.tier]}]{tier.tier}[/]",
                tier.state if tier.state == "ok" else f"[yellow]{tier.state}[/]",
                output.size(tier.used_bytes),
                output.size(tier.capacity_bytes),
                output.share(tier.used_bytes, tier.capacity_bytes),
                output.count(tier.blocks),
                output.count(tier.tokens),
                output.count(tier.pending_blocks),
            )
            for tier in status.tiers
        ),
    )
    yield from output.notes([*engine.notes, *(f"{tier.tier}: {note}" for tier in status.tiers for note in tier.notes)])
