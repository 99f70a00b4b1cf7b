"""One request, from its first look-up to the release of its cells (ARCHITECTURE.md, request steps 3 to 9).

Invariant: what begin() pinned in the engine is released, every staged run is unpinned and every reservation is committed
or aborted, whichever way the request ends, and never while the engine may still read or write their slots. Threading:
event loop only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from appliance.engine.client import Done, EngineClient, NewTokens, Prefilled
from appliance.errors import EngineDied, EngineError, Overloaded, RestoreError, StoreBusy
from appliance.kv.base import Hit, KVStore, Staged
from appliance.plan.cost import CostModel
from appliance.plan.planner import Decision, Piece, decide
from appliance.types import FinishReason, Namespace, SamplingParams, Tier, TokenLogprob, Tokens, TokensBySource

log = logging.getLogger(__name__)
T = TypeVar("T")

RESTORE_RUNS = 4
"""Staged runs that may be on their way into cells while the next one is read: the engine takes them in order."""
EXPORT_RUN = 16
"""Blocks per export call: bounds the slots one request holds while they fill."""


@dataclass(frozen=True)
class GenerateRequest:
    request_id: str
    ns: Namespace
    prompt: Tokens
    sampling: SamplingParams
    session: str | None = None
    """What the client calls the conversation (`prompt_cache_key`)."""
    retention_s: float | None = None
    """How long its blocks are worth keeping after their last use. None: as the profile says; 0: in memory only."""


@dataclass(frozen=True)
class Chunk:
    """Newly generated text (whole characters) and its tokens. Either may be empty."""

    text: str
    tokens: Tokens
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Timings:
    """Milliseconds. prompt_ms covers stage, restore and prefill: from admission to the first token."""

    queue_ms: float
    load_ms: float
    prompt_ms: float
    predicted_ms: float
    ttft_ms: float


@dataclass(frozen=True)
class Finished:
    """Always the last event."""

    reason: FinishReason
    completion_tokens: int
    sources: TokensBySource
    timings: Timings
    decision: Decision
    loaded_bytes: int
    """KV bytes restored from lower tiers."""


@dataclass
class Loaded:
    """What staging and restoring achieved."""

    present: int
    by_tier: dict[Tier, int] = field(default_factory=dict)
    nbytes: int = 0
    seconds: float = 0.0


def pieces_of(hits: Sequence[Hit]) -> list[Piece]:
    return [Piece(hit.start, hit.start + hit.use_tokens, hit.tier, hit.payload_bytes) for hit in hits]


class RequestRun:
    """Call admit, load, generate, write_behind in this order, and release whatever happened."""

    def __init__(self, engine: EngineClient, store: KVStore, cost: CostModel, request: GenerateRequest) -> None:
        self.request = request
        self._engine = engine
        self._store = store
        self._cost = cost
        self._created_s = time.perf_counter()
        self._admitted_s = self._created_s
        self._begun = False
        self._loaded = Loaded(0)
        self._decision: Decision | None = None
        self._prompt_export: asyncio.Task[None] | None = None
        self._generated: list[Tokens] = []
        self._done: Done | None = None

    @property
    def _id(self) -> str:
        return self.request.request_id

    @property
    def begun(self) -> bool:
        """Whether an engine process has seen it."""
        return self._begun

    async def admit(self) -> None:
        """Pin what is resident and wait until the engine has cells for the whole request. Overloaded if cancelled there."""
        request = self.request
        root = self._store.root(request.ns)
        reserve_tokens = max(request.sampling.max_tokens, 1)
        await self._engine.begin(self._id, root, request.prompt, reserve_tokens)
        self._begun = True
        try:
            present = await self._engine.restore(self._id, 0, ())
        except RestoreError:
            raise Overloaded("cancelled while it waited for room", retry_after_s=2, status=503) from None
        self._admitted_s = time.perf_counter()
        self._loaded = Loaded(present, {Tier.HBM: present})

    async def load(self, alone: Callable[[], bool]) -> None:
        """Stage and restore what the planner chose. A tier or restore failure only means more to compute.

        `alone` says whether no other request runs: else the time it took says nothing about the tier.
        """
        request, loaded = self.request, self._loaded
        was_alone = alone()
        hits = self._store.lookup(request.ns, request.prompt).hits
        self._store.touch(hits)  # what is resident, or computed anew, is not staged and yet used
        self._decision = decide(len(request.prompt), loaded.present, pieces_of(hits), self._cost)
        wanted = [
            hit for hit in hits if hit.start + hit.use_tokens > loaded.present and hit.start < self._decision.load_to
        ]
        for tier in {hit.tier for hit in hits if hit.start >= max(self._decision.load_to, loaded.present)}:
            self._cost.passed_over(tier)
        if not wanted:
            return
        started_s = time.perf_counter()
        restoring: deque[asyncio.Task[bool]] = deque()
        try:
            async with aclosing(self._store.stage(request.ns, request.prompt, wanted)) as runs:
                async for staged in runs:
                    restoring.append(asyncio.ensure_future(self._restore(staged)))
                    if len(restoring) > RESTORE_RUNS and not await restoring.popleft():
                        break
            await asyncio.gather(*restoring)
        finally:
            for task in restoring:
                task.cancel()
            await asyncio.gather(*restoring, return_exceptions=True)
        loaded.seconds = time.perf_counter() - started_s
        tiers = {hit.tier for hit in wanted}
        if len(tiers) == 1 and loaded.nbytes and was_alone and alone():
            self._cost.saw_load(tiers.pop(), loaded.nbytes, loaded.seconds)

    async def _restore(self, staged: Staged) -> bool:
        loaded = self._loaded
        try:
            blocks = [(slot, hit.n_tokens, hit.use_tokens) for slot, hit in zip(staged.slots, staged.hits, strict=True)]
            present = await _answered(self._engine.restore(self._id, staged.hits[0].start, blocks))
        except RestoreError as error:
            log.warning("restore failed, computing instead: %s", error)
            return False
        finally:
            self._store.unpin(staged)
        for hit in staged.hits:
            gained = hit.start + hit.use_tokens - max(hit.start, loaded.present)
            if gained > 0:
                loaded.by_tier[hit.tier] = loaded.by_tier.get(hit.tier, 0) + gained
        loaded.present = present
        loaded.nbytes += staged.nbytes
        return True

    async def generate(self, emit: Callable[[Chunk | Finished], None], alone: Callable[[], bool]) -> None:
        """Run to the last token. `alone` as for load()."""
        request = self.request
        was_alone = alone()
        first_s: float | None = None
        prefilled: Prefilled | None = None
        async for event in self._engine.run(self._id, request.sampling):
            if isinstance(event, NewTokens):
                if first_s is None:
                    first_s = time.perf_counter()
                self._generated.append(event.tokens)
                emit(Chunk(event.text, event.tokens, event.logprobs))
            elif isinstance(event, Prefilled):
                prefilled = event
                self._prompt_export = asyncio.create_task(self._export(request.prompt))
            else:
                self._done = event
        if self._done is None:
            raise EngineError("the engine ended the request without saying why")
        if first_s is None:
            first_s = time.perf_counter()
        if prefilled and was_alone and alone():
            self._learn(prefilled, self._done)
        emit(self._finished(self._done, prefilled, first_s))

    def _learn(self, prefilled: Prefilled, done: Done) -> None:
        present, n = self._loaded.present, len(self.request.prompt)
        if prefilled.prefill_tokens > 1:
            self._cost.saw_prefill(min(present, n - 1), n, prefilled.prefill_s)
        elif prefilled.prefill_s > 0:
            self._cost.saw_decode(n, prefilled.prefill_s)
        if done.completion_tokens > 1:
            self._cost.saw_decode(n + done.completion_tokens // 2, done.decode_s / (done.completion_tokens - 1))

    def _finished(self, done: Done, prefilled: Prefilled | None, first_s: float) -> Finished:
        assert self._decision is not None, "load() comes before generate()"
        loaded, n = self._loaded, len(self.request.prompt)
        computed = prefilled.prefill_tokens if prefilled else 0
        surplus = sum(loaded.by_tier.values()) + computed - n  # the last token is computed again for its logits
        by_tier = dict(loaded.by_tier)
        if prefilled and surplus < 0:  # taken over, in cells, from requests that computed it meanwhile
            by_tier[Tier.HBM] -= surplus
        for tier in reversed(list(by_tier)):
            taken = min(max(surplus, 0), by_tier[tier])
            by_tier[tier] -= taken
            surplus -= taken
        sources = TokensBySource(**{tier.value: count for tier, count in by_tier.items()}, computed=computed)
        timings = Timings(
            queue_ms=(self._admitted_s - self._created_s) * 1e3,
            load_ms=loaded.seconds * 1e3,
            prompt_ms=(first_s - self._admitted_s) * 1e3,
            predicted_ms=done.decode_s * 1e3,
            ttft_ms=(first_s - self._created_s) * 1e3,
        )
        return Finished(done.reason, done.completion_tokens, sources, timings, self._decision, loaded.nbytes)

    async def write_behind(self, *, completions: bool) -> None:
        """Export what is new. The caller's answer was complete before this began."""
        if self._prompt_export is not None:
            await self._prompt_export
        if self._done is None:
            return
        sequence = Tokens(self.request.prompt.data + b"".join(part.data for part in self._generated))
        keep = self._done.kv_tokens if completions else min(self._done.kv_tokens, len(self.request.prompt))
        await self._export(sequence[:keep])

    async def _export(self, tokens: Tokens) -> None:
        missing = self._store.missing(self.request.ns, tokens)
        while missing:
            try:
                reserved = await self._store.reserve(self.request.ns, missing[:EXPORT_RUN])
            except StoreBusy as error:
                log.warning("%d blocks are not stored: %s", len(missing), error)
                return
            if not reserved:  # others store all of these
                missing = missing[EXPORT_RUN:]
                continue
            missing = missing[missing.index(reserved[-1].new) + 1 :]
            try:
                blocks = [(r.new.start, len(r.new.tokens), r.slot) for r in reserved]
                await _answered(self._engine.export(self._id, blocks))
            except EngineError as error:
                self._store.abort(reserved)
                log.warning("export failed, %d blocks are not stored: %s", len(reserved) + len(missing), error)
                return
            except BaseException:
                self._store.abort(reserved)
                raise
            self._store.commit(reserved)

    async def release(self) -> None:
        """The engine first: it answers what it is still exporting."""
        try:
            with suppress(EngineDied):
                await self._engine.release(self._id)
        finally:
            if self._prompt_export is not None:
                self._prompt_export.cancel()
                await asyncio.gather(self._prompt_export, return_exceptions=True)


async def _answered(call: Coroutine[Any, Any, T]) -> T:
    """An engine call that moves bytes of slots: a cancellation takes effect when the engine has answered."""
    task = asyncio.ensure_future(call)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        with suppress(EngineError):
            task.result()
        raise
