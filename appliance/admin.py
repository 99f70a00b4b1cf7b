"""What the admin socket can ask, answered from runtime, store and keyring.

Invariant: nothing here holds state of its own; a tenant's prompt is read to look it up and not kept. Event loop only;
verification and keyring changes run in a thread.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path

from appliance import __version__
from appliance.anticipate import Anticipation
from appliance.api.control import (
    EngineStatus,
    EvictRequest,
    EvictResult,
    Loading,
    PrefetchProgress,
    PrefetchRequest,
    PrefetchTotals,
    PromptInspection,
    PromptRef,
    RequestList,
    SessionInfo,
    SessionList,
    Span,
    Status,
    StoreOverview,
    TenantAdd,
    TenantAdded,
    TenantList,
    TierStatus,
    TierStore,
    Totals,
    VerifyProgress,
    VerifyRequest,
)
from appliance.api.serve import StartProgress
from appliance.api.trace import TraceEvent, TraceHeader
from appliance.engine.client import EngineClient
from appliance.engine.protocol import EngineStats
from appliance.errors import EngineError, RequestError
from appliance.explain import accuracy_counters, estimates, requests
from appliance.kv.base import KVStore
from appliance.look import inspect
from appliance.ops.tenants import tenants_of
from appliance.prefetch import Prefetches
from appliance.runtime import Runtime
from appliance.security.keyring import Keyring
from appliance.server.base import Admin
from appliance.server.metrics import Snapshot
from appliance.types import Namespace, Tier, TierUsage, Tokens

OPERATOR_PREFETCHES = 16
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


class ApplianceAdmin(Admin):
    def __init__(self, runtime: Runtime, anticipation: Anticipation, keyring: Keyring, place: Place) -> None:
        self._runtime = runtime
        self._anticipation = anticipation
        self._prefetches = Prefetches(runtime, at_once=OPERATOR_PREFETCHES)
        self._engine: EngineClient = runtime.engine
        self._store: KVStore = runtime.store
        self._keyring = keyring
        self._place = place
        self._stats = EngineStats(self._engine.info.context_tokens, 0, 0, 0, 0, 0, 0, 0)

    # --- state ---------------------------------------------------------------------------------------------------

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

    # --- prompts -------------------------------------------------------------------------------------------------

    async def requests(self, call_id: str | None) -> RequestList:
        return requests(self._runtime.history, call_id)

    async def inspect(self, prompt: PromptRef) -> PromptInspection:
        tokens = await self._tokens(prompt)
        inspection = await inspect(self._runtime, self._namespace(prompt), tokens)
        spans = [
            Span(start=start, stop=stop, tier=tier.value if tier else "none") for start, stop, tier in inspection.spans
        ]
        return PromptInspection(
            prompt_tokens=len(tokens),
            cached_tokens=sum(span.stop - span.start for span in spans if span.tier != "none"),
            spans=spans,
            estimated_ttft_warm_s=inspection.estimated_warm_s,
            estimated_ttft_cold_s=inspection.estimated_cold_s,
        )

    async def prefetch(self, request: PrefetchRequest) -> AsyncGenerator[PrefetchProgress, None]:
        ns = self._namespace(request)
        if request.session is None:
            tokens = await self._tokens(request)
        else:
            tokens = self._prefetches.session(ns, request.session)
        steps = self._prefetches.run(ns, tokens, to=Tier(request.to), compute=request.compute)
        async with aclosing(steps):
            async for step in steps:
                yield step

    async def sessions(self) -> SessionList:
        known = self._runtime.sessions
        return SessionList(
            sessions=[
                SessionInfo(
                    tenant=session.ns.tenant,
                    name=session.name,
                    turns=session.turns,
                    tokens=len(session.tokens),
                    idle_s=known.idle_s(session),
                    think_s=session.think_time.typical_s,
                    chance=known.chance(session),
                    running=session.running,
                )
                for session in known.recent()
            ]
        )

    async def _tokens(self, prompt: PromptRef) -> Tokens:
        if prompt.messages is not None:
            tokens = await self._runtime.render(prompt.messages, prompt.tools)
        else:
            tokens = await self._runtime.tokenize(prompt.prompt or "")
        if not tokens:
            raise RequestError("the prompt is empty", param="prompt", code="empty_prompt")
        limit = self._engine.info.context_tokens
        if len(tokens) >= limit:  # one place is for the first token of an answer
            raise RequestError(
                f"the prompt has {len(tokens)} tokens, the context holds {limit}",
                param="prompt",
                code="context_length_exceeded",
            )
        return tokens

    def _namespace(self, prompt: PromptRef) -> Namespace:
        self._keyring.tenant(prompt.tenant)  # StateError names an unknown tenant
        return Namespace(prompt.tenant, salt=(prompt.cache_salt or "").encode())

    # --- upkeep --------------------------------------------------------------------------------------------------

    async def verify(self, request: VerifyRequest) -> AsyncGenerator[VerifyProgress, None]:
        async with aclosing(self._store.verify(repair=request.repair)) as steps:
            async for step in steps:
                yield step

    async def evict(self, request: EvictRequest) -> EvictResult:
        self._anticipation.forget()  # else it would bring it all back
        hbm = Tier(request.tier) is Tier.HBM
        return EvictResult(freed=await self._engine.evict() if hbm else self._store.evict_dram())

    def trace(self) -> AsyncGenerator[TraceHeader | TraceEvent | None, None]:
        return self._runtime.recorder.listen()

    async def erase(self, prompt: PromptRef) -> EvictResult:
        """A resident sequence cannot be told from another, so hbm forgets all that does not run."""
        tokens = await self._tokens(prompt)
        freed = await self._store.erase(self._namespace(prompt), tokens)
        await self._engine.evict()
        return EvictResult(freed=freed)

    async def tenants(self) -> TenantList:
        return tenants_of(self._keyring)

    async def add_tenant(self, request: TenantAdd) -> TenantAdded:
        api_key = await asyncio.to_thread(self._keyring.add_tenant, request.name)
        return TenantAdded(tenant=request.name, api_key=api_key)


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
        notes=list(usage.notes),
    )


def _by_tier(counters: Mapping[str, float], name: str) -> dict[str, float]:
    prefix = f'{name}{{tier="'
    return {key[len(prefix) : -2]: value for key, value in counters.items() if key.startswith(prefix)}


def _sum(counters: Mapping[str, float], name: str) -> int:
    return int(sum(value for key, value in counters.items() if key.partition("{")[0] == name))


def _resident_bytes(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    fields = dict(line.split(":", 1) for line in text.splitlines() if line.startswith(("RssAnon", "RssFile")))
    return sum(int(value.split()[0]) * 1024 for value in fields.values())
