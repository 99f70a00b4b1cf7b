"""What the admin socket can ask, answered from runtime, store and keyring.

Invariant: nothing here holds state of its own; a tenant's prompt is read to look it up and not kept. Event loop only;
verification and keyring changes run in a thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from appliance.anticipate import Anticipation
from appliance.api.control import (
    EvictRequest,
    EvictResult,
    PinResult,
    PrefetchProgress,
    PrefetchRequest,
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
    TenantInfo,
    TenantList,
    TenantQuota,
    VerifyProgress,
    VerifyRequest,
)
from appliance.api.trace import TraceEvent, TraceHeader
from appliance.engine.client import EngineClient
from appliance.errors import RequestError
from appliance.explain import requests
from appliance.figures import Figures, Place
from appliance.kv.base import KVStore
from appliance.look import inspect
from appliance.ops.tenants import info_of, tenants_of
from appliance.prefetch import Prefetches
from appliance.runtime import Runtime
from appliance.security.keyring import Keyring
from appliance.server.base import Admin
from appliance.server.metrics import Snapshot
from appliance.types import Namespace, Tier, TierUsage, Tokens

OPERATOR_PREFETCHES = 16


class ApplianceAdmin(Admin):
    def __init__(self, runtime: Runtime, anticipation: Anticipation, keyring: Keyring, place: Place) -> None:
        self._figures = Figures(runtime, place)
        self._runtime = runtime
        self._anticipation = anticipation
        self._prefetches = Prefetches(runtime, at_once=OPERATOR_PREFETCHES)
        self._engine: EngineClient = runtime.engine
        self._store: KVStore = runtime.store
        self._keyring = keyring

    # --- state ---------------------------------------------------------------------------------------------------

    def state(self) -> str:
        return self._figures.state()

    async def status(self) -> Status:
        return await self._figures.status()

    async def snapshot(self) -> Snapshot:
        """For /metrics."""
        return await self._figures.snapshot()

    async def store(self) -> StoreOverview:
        return await self._figures.store()

    async def requests(self, call_id: str | None) -> RequestList:
        return requests(self._runtime.history, call_id)

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

    # --- prompts -------------------------------------------------------------------------------------------------

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
        self._anticipation.forget()  # what it holds would stay
        freed = await self._store.erase(self._namespace(prompt), tokens)
        await self._engine.evict()
        return EvictResult(freed=freed)

    async def pin(self, prompt: PromptRef) -> PinResult:
        tokens = await self._tokens(prompt)
        before = self._lowest().pinned_blocks
        reach = await self._store.pin_prompt(self._namespace(prompt), tokens)
        if not reach:
            raise RequestError(
                "no tier has this prompt; read it first with: kvctl prefetch --compute", code="not_stored", status=409
            )
        lowest = self._lowest()
        return PinResult(
            prompt_tokens=len(tokens),
            tokens=reach,
            blocks=lowest.pinned_blocks - before,
            pinned_bytes=lowest.pinned_bytes,
            budget_bytes=lowest.pin_budget_bytes,
        )

    async def unpin(self, prompt: PromptRef) -> PinResult:
        tokens = await self._tokens(prompt)
        released = await self._store.unpin_prompt(self._namespace(prompt), tokens)
        lowest = self._lowest()
        return PinResult(
            prompt_tokens=len(tokens),
            tokens=0,
            blocks=released,
            pinned_bytes=lowest.pinned_bytes,
            budget_bytes=lowest.pin_budget_bytes,
        )

    def _lowest(self) -> TierUsage:
        """The tier that pins hold."""
        return max(self._store.usage(), key=lambda usage: usage.pin_budget_bytes)

    async def tenants(self) -> TenantList:
        return tenants_of(self._keyring)

    async def add_tenant(self, request: TenantAdd) -> TenantAdded:
        api_key = await asyncio.to_thread(self._keyring.add_tenant, request.name)
        return TenantAdded(tenant=request.name, api_key=api_key)

    async def set_quota(self, asked: TenantQuota) -> TenantInfo:
        await asyncio.to_thread(self._keyring.set_quota, asked.tenant, asked.dram_bytes, asked.nvme_bytes)
        await self._store.enforce_quotas()
        return info_of(self._keyring, asked.tenant)
