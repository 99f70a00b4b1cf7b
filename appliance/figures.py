"""What an operator reads of a running appliance: status, tiers and counters, gathered from runtime, engine and store.

Invariant: nothing here changes anything, nor holds state of its own but the last numbers a busy engine gave. Event loop only.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from appliance import __version__
from appliance.api.control import (
    EngineStatus,
    Loading,
    PrefetchTotals,
    Status,
    StoreOverview,
    TierStatus,
    TierStore,
    Totals,
)
from appliance.api.serve import StartProgress
from appliance.engine.protocol import EngineStats
from appliance.errors import EngineError
from appliance.explain import accuracy_counters, estimates
from appliance.runtime import Runtime
from appliance.server.metrics import Snapshot
from appliance.types import Tier, TierUsage

STATS_S = 1.0
"""Longest wait for a busy engine before the last known numbers are shown."""


@dataclass(frozen=True)
class Place:
    """Where this appliance is."""

    home: Path
    base_url: str
    started_s: float
    """time.monotonic() at start."""
    notes: tuple[str, ...]


def loading_status(place: Place, step: StartProgress) -> Loading:
    """Status before there is a runtime."""
    return Loading(
        version=__version__,
        pid=os.getpid(),
        uptime_s=time.monotonic() - place.started_s,
        home=str(place.home),
        base_url=place.base_url,
        doing=step.text,
        fraction=step.fraction,
    )


class Figures:
    def __init__(self, runtime: Runtime, place: Place) -> None:
        self._runtime = runtime
        self._engine = runtime.engine
        self._store = runtime.store
        self._place = place
        self._stats = EngineStats(self._engine.info.context_tokens, 0, 0, 0, 0, 0, 0, 0)

    def state(self) -> str:
        if self._runtime.draining:
            return "draining"
        return "ready" if self._engine.pid is not None else "engine-restarting"

    async def status(self) -> Status:
        stats, info = await self._engine_stats(), self._engine.info
        return Status(
            state=self.state(),
            version=__version__,
            pid=os.getpid(),
            uptime_s=time.monotonic() - self._place.started_s,
            home=str(self._place.home),
            base_url=self._place.base_url,
            running=self._runtime.running,
            waiting=self._runtime.waiting,
            waiting_tenants=self._runtime.turns.waiting_tenants,
            rss_bytes=self._rss_bytes(),
            engine=EngineStatus(
                engine=info.engine,
                pid=self._engine.pid,
                restarts=self._engine.generation - 1,
                model=info.model_name,
                description=info.description,
                kv_mode=info.kv_mode.value,
                context_tokens=info.context_tokens,
                threads=info.threads,
                quiet_threads=info.quiet_threads,
                batch_threads=info.batch_threads,
                decode_step_ms=info.decode_step_s * 1e3,
                prefill_tokens_per_s=info.prefill_tokens_per_s,
                kv_bytes_per_token=sum(info.layout.token_bytes),
                weight_bytes=info.weight_bytes,
                cell_bytes=info.cell_bytes,
                sequences_resident=stats.sequences_resident,
                notes=[*info.notes, *self._place.notes],
            ),
            tiers=[_tier_status(usage) for usage in self._tiers(stats)],
            totals=self._totals(),
            estimates=estimates(self._runtime.history),
        )

    def _totals(self) -> Totals:
        counters, totals = self._store.counters(), self._runtime.totals
        prefetched = self._runtime.prefetched.totals()
        seconds = _by_tier(counters, "load_seconds_total")
        loaded = _by_tier(counters, "load_bytes_total")
        return Totals(
            requests=totals.requests,
            prompt_tokens=totals.prompt_tokens,
            cached_tokens={tier.value: totals.cached.get(tier, 0) for tier in Tier},
            computed_tokens=totals.computed_tokens,
            completion_tokens=totals.completion_tokens,
            staged_ahead_tokens=totals.staged_ahead_tokens,
            preemptions=totals.preemptions,
            requeued_requests=totals.requeued,
            prefetched=PrefetchTotals(
                moved=prefetched.moved, hit=prefetched.hit, late=prefetched.late, wasted=prefetched.wasted
            ),
            loaded_bytes={tier: int(count) for tier, count in loaded.items()},
            load_bytes_per_s={
                tier: count / seconds[tier] if seconds.get(tier) else 0.0 for tier, count in loaded.items()
            },
            stored_bytes={tier: int(count) for tier, count in _by_tier(counters, "store_bytes_total").items()},
            evicted_blocks={tier: int(count) for tier, count in _by_tier(counters, "evicted_blocks_total").items()},
            quarantined_blocks=_sum(counters, "quarantined_total"),
            integrity_failures=_sum(counters, "integrity_failures_total"),
            tier_failures=_sum(counters, "tier_failures_total"),
        )

    async def snapshot(self) -> Snapshot:
        """For /metrics."""
        stats = await self._engine_stats()
        totals = self._runtime.totals
        counters = {
            "prompt_tokens_total": float(totals.prompt_tokens),
            **{f'cached_tokens_total{{tier="{tier.value}"}}': float(totals.cached.get(tier, 0)) for tier in Tier},
            "computed_tokens_total": float(totals.computed_tokens),
            "completion_tokens_total": float(totals.completion_tokens),
            "staged_ahead_tokens_total": float(totals.staged_ahead_tokens),
            "preemptions_total": float(totals.preemptions),
            "requeued_requests_total": float(totals.requeued),
            **accuracy_counters(self._runtime.history),
            **self._store.counters(),
            **self._runtime.prefetched.counters(),
            "engine_restarts_total": float(self._engine.generation - 1),
            "resident_evictions_total": float(stats.resident_evictions),
        }
        gauges = {
            "running_requests": float(self._runtime.running),
            "waiting_requests": float(self._runtime.waiting),
            "waiting_tenants": float(self._runtime.turns.waiting_tenants),
            "resident_sequences": float(stats.sequences_resident),
            "pinned_cells": float(stats.cells_pinned),
        }
        return Snapshot(self._tiers(stats), counters, gauges)

    async def store(self) -> StoreOverview:
        info = self._engine.info
        tiers = [
            TierStore(
                tier=usage.tier.value,
                state=usage.state,
                blocks=usage.blocks,
                tokens=usage.tokens,
                used_bytes=usage.used_bytes,
                capacity_bytes=usage.capacity_bytes,
                oldest_s=usage.oldest_s,
                newest_s=usage.newest_s,
                pinned_blocks=usage.pinned_blocks,
                pinned_bytes=usage.pinned_bytes,
            )
            for usage in self._tiers(await self._engine_stats())
        ]
        return StoreOverview(
            model=info.model_name,
            kv_mode=info.kv_mode.value,
            block_tokens=info.layout.block_tokens,
            kv_bytes_per_token=sum(info.layout.token_bytes),
            tiers=tiers,
            notes=[*info.notes, *(note for usage in self._store.usage() for note in usage.notes)],
        )

    async def _engine_stats(self) -> EngineStats:
        with suppress(EngineError, asyncio.TimeoutError):  # restarting or busy: the last known numbers will do
            self._stats = await asyncio.wait_for(self._engine.stats(), STATS_S)
        return self._stats

    def _tiers(self, stats: EngineStats) -> list[TierUsage]:
        info = self._engine.info
        per_token = info.cell_bytes // max(info.context_tokens, 1)
        hbm = TierUsage(
            tier=Tier.HBM,
            capacity_bytes=info.cell_bytes,
            used_bytes=stats.cells_used * per_token,
            blocks=-(-stats.cells_used // info.layout.block_tokens),
            tokens=stats.cells_used,
        )
        return [hbm, *self._store.usage()]

    def _rss_bytes(self) -> int:
        """Private and file-backed memory of both processes, less weights and cells; the pool is shared memory."""
        info = self._engine.info
        resident = sum(_resident_bytes(pid) for pid in (os.getpid(), self._engine.pid) if pid is not None)
        return max(0, resident - info.weight_bytes - info.cell_bytes)


def _tier_status(usage: TierUsage) -> TierStatus:
    return TierStatus(
        tier=usage.tier.value,
        state=usage.state,
        capacity_bytes=usage.capacity_bytes,
        used_bytes=usage.used_bytes,
        blocks=usage.blocks,
        tokens=usage.tokens,
        pending_blocks=usage.pending_blocks,
        pending_bytes=usage.pending_bytes,
        pinned_blocks=usage.pinned_blocks,
        pinned_bytes=usage.pinned_bytes,
        pin_budget_bytes=usage.pin_budget_bytes,
        notes=list(usage.notes),
    )


def _by_tier(counters: Mapping[str, float], name: str) -> dict[str, float]:
    """Sums over other labels: the tier is the first."""
    prefix, sums = f'{name}{{tier="', Counter[str]()
    for key, value in counters.items():
        if key.startswith(prefix):
            sums[key[len(prefix) :].partition('"')[0]] += value  # type: ignore[assignment]
    return dict(sums)


def _sum(counters: Mapping[str, float], name: str) -> int:
    return int(sum(value for key, value in counters.items() if key.partition("{")[0] == name))


def _resident_bytes(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    fields = dict(line.split(":", 1) for line in text.splitlines() if line.startswith(("RssAnon", "RssFile")))
    return sum(int(value.split()[0]) * 1024 for value in fields.values())
