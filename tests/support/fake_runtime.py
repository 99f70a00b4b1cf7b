"""A Runtime without engine and store: tokens are code points, completions are fixed, and tests can hold or break it."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

from appliance.api.control import (
    EngineStatus,
    EvictRequest,
    EvictResult,
    Loading,
    PinResult,
    PrefetchProgress,
    PrefetchRequest,
    PromptInspection,
    PromptRef,
    RequestList,
    SessionList,
    Status,
    StoreOverview,
    TenantAdd,
    TenantAdded,
    TenantInfo,
    TenantList,
    TenantQuota,
    Totals,
    VerifyProgress,
    VerifyReport,
    VerifyRequest,
)
from appliance.api.trace import TraceHeader
from appliance.chat.tools import ToolFormat
from appliance.errors import Overloaded, RequestError, StateError
from appliance.plan.planner import Alternative, Decision
from appliance.prefetch import Prefetches
from appliance.runtime import Chunk, Finished, GenerateRequest, Timings
from appliance.server.base import Admin, ServedModel, Service
from appliance.server.metrics import Metrics, Snapshot
from appliance.types import FinishReason, Namespace, Tier, TierUsage, TokenLogprob, Tokens, TokensBySource

COMPLETION = "Hello wörld!"
HALF_A_CHARACTER = 999
LOADED = Alternative(8, 0.002, 0.008)
KEYS = {"key-of-alice": "alice", "key-of-bob": "bob"}
MODEL = ServedModel(
    id="fake-1b",
    created=1_700_000_000,
    vocab_tokens=1000,
    context_tokens=4096,
    default_max_tokens=64,
    system_fingerprint="fp_0123456789ab",
    description="fake 1B F32",
    build="fake 1.0",
    slots=16,
    tool_format=ToolFormat.HERMES,
    grammars=True,
    embedding_width=2,
)

LOADING = Loading(
    version="0.1.0",
    pid=1,
    uptime_s=1.0,
    home="/h",
    base_url="http://127.0.0.1:1/v1",
    doing="loading fake",
    fraction=0.42,
)


class FakeRuntime:
    """Answers COMPLETION, one token a chunk; with a seed, the seed follows.

    `error` is raised after `error_after` chunks. `hold_after` chunks are sent before generation waits for ever.
    `interfere` is awaited before every event.
    """

    def __init__(self) -> None:
        self.requests: list[GenerateRequest] = []
        self.messages: list[Sequence[dict[str, Any]]] = []
        self.tools: list[Sequence[dict[str, Any]] | None] = []
        self.options: list[Mapping[str, Any]] = []
        self.embedded: list[Tokens] = []
        self.closed: list[str] = []
        self.begun = asyncio.Event()
        self.ended = asyncio.Event()
        self.error: Exception | None = None
        self.error_after = 0
        self.hold_after: int | None = None
        self.errors_left: int | None = None
        """How often `error` is raised; None: always."""
        self.reason: FinishReason | None = None
        self.stop: str | None = None
        self.completion = COMPLETION
        self.interfere: Callable[[], Awaitable[object]] = partial(asyncio.sleep, 0)

    async def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> Tokens:
        return Tokens.of([1] * add_special + [min(ord(c), HALF_A_CHARACTER) for c in text])

    async def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> Tokens:
        self.messages.append(messages)
        self.tools.append(tools)
        self.options.append(options)
        return await self.tokenize("\n".join(f"{m['role']}: {m['content']}" for m in messages))

    async def detokenize(self, tokens: Tokens) -> str:
        return "".join("\ufffd" if token == HALF_A_CHARACTER else chr(token) for token in tokens)

    async def embed(self, tenant: str, tokens: Tokens) -> bytes:
        self.embedded.append(tokens)
        await self.interfere()
        return struct.pack("<2f", len(tokens), 0.5)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk | Finished]:
        first = all(request.prompt != earlier.prompt for earlier in self.requests)
        self.requests.append(request)
        self.begun.set()
        ended = False
        try:
            sampling = request.sampling
            text = self.completion + ("" if sampling.seed is None else f" {sampling.seed}")
            sent = min(len(text), sampling.max_tokens)
            for n, character in enumerate(text[:sent]):
                await self._interfere(n)
                yield self._chunk(character, sampling.logprobs)
            await self._interfere(sent)
            ended = True
            yield Finished(
                self.reason or (FinishReason.LENGTH if sent < len(text) else FinishReason.STOP),
                sent,
                self._sources(len(request.prompt), first),
                Timings(queue_ms=1.0, load_ms=2.0, prompt_ms=10.0, predicted_ms=20.0, ttft_ms=11.0),
                Decision(8, "load", LOADED, Alternative(0, 0.0, 0.5), {"load": LOADED}),
                loaded_bytes=64,
                stop=self.stop,
            )
        finally:
            self.ended.set()
            if not ended:
                self.closed.append(request.request_id)

    async def _interfere(self, n: int) -> None:
        if self.error is not None and n >= self.error_after and self.errors_left != 0:
            self.errors_left = None if self.errors_left is None else self.errors_left - 1
            raise self.error
        if n == self.hold_after:
            await asyncio.Event().wait()
        await self.interfere()

    def _chunk(self, character: str, logprobs: int | None) -> Chunk:
        token = ord(character)
        scores: tuple[TokenLogprob, ...] = ()
        if logprobs is not None:
            others = ((token, -0.5), (HALF_A_CHARACTER, float("-inf")))
            scores = (TokenLogprob(token, -0.5, others[:logprobs]),)
        return Chunk(character, Tokens.of([token]), scores)

    def _sources(self, n: int, first: bool) -> TokensBySource:
        if first:
            return TokensBySource(nvme=n // 2, computed=n - n // 2)
        return TokensBySource(hbm=n - 1, computed=1)


TIERS = (
    TierUsage(Tier.HBM, 4096, 1024, 4, 1024),
    TierUsage(Tier.DRAM, 2**30, 2**20, 16, 4096, pending_blocks=2),
    TierUsage(Tier.NVME, 2**34, 2**24, 64, 16384, state="degraded"),
)


async def snapshot() -> Snapshot:
    counters = {
        'tier_read_bytes_total{tier="nvme"}': 4096.0,
        'tier_read_bytes_total{tier="dram"}': 512.0,
        'integrity_failures{reason="tag"}': 1.0,
        "evicted_blocks_total": 3.0,
    }
    return Snapshot(TIERS, counters, {"running_requests": 2, "waiting_requests": 1})


class FakePrefetches(Prefetches):
    """Two steps; `hold` waits for ever after the first. Alice has a session "hers"."""

    def __init__(self) -> None:
        self.asked: list[tuple[Namespace, Tokens, Tier, bool]] = []
        self.closed = 0
        self.hold = False
        self.busy = False

    def session(self, ns: Namespace, name: str) -> Tokens:
        if (ns, name) != (Namespace("alice"), "hers"):
            raise RequestError("no session", param="prompt_cache_key", code="session_not_found", status=404)
        return Tokens.of([1, 2, 3])

    async def run(  # type: ignore[override]
        self, ns: Namespace, tokens: Tokens, *, to: Tier, compute: bool
    ) -> AsyncIterator[PrefetchProgress]:
        self.asked.append((ns, tokens, to, compute))
        if self.busy:
            raise Overloaded("running already", retry_after_s=2)
        try:
            for done in (False, True):
                yield PrefetchProgress(
                    prompt_tokens=len(tokens), found={"nvme": len(tokens)}, moved_tokens=len(tokens) * done,
                    computed_tokens=0, moved_bytes=8 * len(tokens) * done, seconds=0.1, done=done,
                )  # fmt: skip
                if self.hold:
                    await asyncio.Event().wait()
        finally:
            self.closed += 1


def service(runtime: FakeRuntime, *, state: str = "ready", max_body_bytes: int = 2**20) -> Service:
    return Service(
        runtime=runtime,  # type: ignore[arg-type]
        prefetches=FakePrefetches(),
        model=MODEL,
        authenticate=KEYS.get,
        operator="alice",
        metrics=Metrics(snapshot),
        state=lambda: state,
        max_body_bytes=max_body_bytes,
    )


class FakeAdmin(Admin):
    def __init__(self) -> None:
        self.prompts: list[PromptRef] = []
        self.closed: list[str] = []
        self.fail_verify_after: int | None = None

    async def status(self) -> Status:
        engine = EngineStatus(
            engine="fake 1.0", pid=2, restarts=0, model=MODEL.id, description=MODEL.description, kv_mode="rows",
            context_tokens=4096, threads=1, quiet_threads=2, batch_threads=2, decode_step_ms=1.0, prefill_tokens_per_s=100.0,
            kv_bytes_per_token=8, weight_bytes=16, cell_bytes=32, sequences_resident=0, notes=[],
        )  # fmt: skip
        totals = Totals(
            requests=0, prompt_tokens=0, cached_tokens={}, computed_tokens=0, completion_tokens=0, loaded_bytes={},
            load_bytes_per_s={}, stored_bytes={}, evicted_blocks={}, quarantined_blocks=0, integrity_failures=0,
            tier_failures=0,
        )  # fmt: skip
        return Status(
            state="ready", version="0.1.0", pid=1, uptime_s=1.0, home="/h", base_url="http://127.0.0.1:1/v1",
            running=0, waiting=0, rss_bytes=1, engine=engine, tiers=[], totals=totals,
        )  # fmt: skip

    async def store(self) -> StoreOverview:
        return StoreOverview(model=MODEL.id, kv_mode="rows", block_tokens=256, kv_bytes_per_token=8, tiers=[], notes=[])

    async def trace(self) -> AsyncIterator[TraceHeader | None]:  # type: ignore[override]
        yield TraceHeader(
            started="now", block_tokens=4, block_bytes=8, prefill_token_s=1.0, prefill_depth_s=0.0, bytes_per_s={}
        )
        yield None

    async def requests(self, call_id: str | None) -> RequestList:
        if call_id is not None:
            raise RequestError("no such request", status=404)
        return RequestList(requests=[])

    async def sessions(self) -> SessionList:
        return SessionList(sessions=[])

    async def inspect(self, prompt: PromptRef) -> PromptInspection:
        self.prompts.append(prompt)
        return PromptInspection(
            prompt_tokens=3, cached_tokens=0, spans=[], estimated_ttft_warm_s=0.1, estimated_ttft_cold_s=1.0
        )

    async def prefetch(self, request: PrefetchRequest) -> AsyncIterator[PrefetchProgress]:  # type: ignore[override]
        self.prompts.append(request)
        for n in range(3):
            yield PrefetchProgress(
                prompt_tokens=2, found={}, moved_tokens=n, computed_tokens=0, moved_bytes=n, seconds=0.1, done=n == 2
            )

    async def verify(self, request: VerifyRequest) -> AsyncIterator[VerifyProgress]:  # type: ignore[override]
        try:
            for n in range(2):
                if n == self.fail_verify_after:
                    raise StateError("the store went away")
                yield VerifyProgress(records_done=n, records_total=2)
            report = VerifyReport(
                segments=1,
                records=2,
                bytes_read=8,
                ok=2,
                bad={},
                index_missing=0,
                index_dangling=0,
                repaired=0,
                seconds=0.1,
            )
            yield VerifyProgress(records_done=2, records_total=2, report=report)
        finally:
            self.closed.append("verify")

    async def erase(self, prompt: PromptRef) -> EvictResult:
        self.prompts.append(prompt)
        return EvictResult(freed=3)

    async def pin(self, prompt: PromptRef) -> PinResult:
        self.prompts.append(prompt)
        return PinResult(prompt_tokens=3, tokens=2, blocks=1, pinned_bytes=8, budget_bytes=64)

    async def unpin(self, prompt: PromptRef) -> PinResult:
        self.prompts.append(prompt)
        return PinResult(prompt_tokens=3, tokens=0, blocks=1, pinned_bytes=0, budget_bytes=64)

    async def evict(self, request: EvictRequest) -> EvictResult:
        return EvictResult(freed=7)

    async def tenants(self) -> TenantList:
        return TenantList(tenants=[TenantInfo(tenant="alice", api_keys=1, created="2026-01-01T00:00:00Z")])

    async def add_tenant(self, request: TenantAdd) -> TenantAdded:
        if request.name == "alice":
            raise StateError('tenant "alice" exists already')
        return TenantAdded(tenant=request.name, api_key="kvctl-new")

    async def set_quota(self, asked: TenantQuota) -> TenantInfo:
        return TenantInfo(tenant=asked.tenant, api_keys=1, created="now", dram_quota_bytes=asked.dram_bytes)
