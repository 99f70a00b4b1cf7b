"""One request, from its first look-up to the release of its cells (ARCHITECTURE.md, request steps 4 to 10).

Invariant: what begin() pinned in the engine is released, whichever way the request ends. Threading: event loop only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from appliance.ahead import Ahead, StagedAhead
from appliance.engine.client import Done, EngineClient, NewTokens, Prefilled
from appliance.errors import EngineDied, EngineError, Overloaded, RestoreError
from appliance.export import Exporter
from appliance.kv.base import KVStore
from appliance.load import Load
from appliance.plan.cost import CostModel
from appliance.plan.planner import Decision, decide
from appliance.request import Chunk, Finished, GenerateRequest, Timings
from appliance.sources import Sources
from appliance.types import Tier, Tokens
from appliance.wanted import pieces_of, wanted


@dataclass(frozen=True)
class Parts:
    """What every request runs on."""

    engine: EngineClient
    store: KVStore
    cost: CostModel
    ahead: Ahead


class RequestRun:
    """Call admit, load, generate, write_behind in this order, and release whatever happened."""

    def __init__(self, parts: Parts, request: GenerateRequest, arrived_s: float) -> None:
        """`arrived_s`: time.perf_counter() when the client asked."""
        self.request = request
        self._engine = parts.engine
        self._store = parts.store
        self._cost = parts.cost
        self._ahead = parts.ahead
        self._arrived_s = arrived_s
        self._admitted_s = arrived_s
        self._load_s = 0.0
        self._staged_ahead = StagedAhead()
        self._sources = Sources(len(request.prompt))
        self._load = Load(self._engine, self._store, request, self._sources)
        self._exporter = Exporter(self._engine, self._store, request)
        self._decision: Decision | None = None
        self._generated: list[Tokens] = []
        self._done: Done | None = None

    @property
    def _id(self) -> str:
        return self.request.request_id

    async def admit(self) -> None:
        """Pin what is resident and wait until the engine has cells for the whole request. Overloaded if cancelled there."""
        request = self.request
        root = self._store.root(request.ns)
        reserve_tokens = max(request.sampling.max_tokens, 1)
        await self._engine.begin(self._id, root, request.prompt, reserve_tokens)
        try:
            present = await self._engine.restore(self._id, 0, ())
        except RestoreError:
            raise Overloaded("cancelled while it waited for room", retry_after_s=2, status=503) from None
        self._admitted_s = time.perf_counter()
        self._load.present = present
        self._sources.reached(present, Tier.HBM)

    async def load(self, alone: Callable[[], bool]) -> int:
        """Stage and restore what the planner chose; returns the prompt tokens that are left to compute.

        `alone` says whether no other request runs: else the time it took says nothing about the tier.
        """
        request, present = self.request, self._load.present
        was_alone = alone()
        hits = self._store.lookup(request.ns, request.prompt).hits
        self._store.touch(hits)  # what is resident, or computed anew, is not staged and yet used
        self._decision = decide(len(request.prompt), present, pieces_of(hits), self._cost)
        to_stage = wanted(hits, present, self._decision)
        for tier in {hit.tier for hit in hits if hit.start >= max(self._decision.load_to, present)}:
            self._cost.passed_over(tier)
        self._staged_ahead = self._ahead.leave(self._id)  # the load pins what was held before anything else runs
        if to_stage:
            started_s = time.perf_counter()
            await self._load.bring(request.prompt, to_stage, self._staged_ahead.tiers)
            self._load_s = time.perf_counter() - started_s
            tiers = {hit.tier for hit in to_stage}
            if len(tiers) == 1 and self._load.nbytes and was_alone and alone():
                self._cost.saw_load(tiers.pop(), self._load.nbytes, self._load_s)
        return max(len(request.prompt) - self._load.present, 1)

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
                self._exporter.export(request.prompt)
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
        present, n = self._load.present, len(self.request.prompt)
        if prefilled.prefill_tokens > 1:
            self._cost.saw_prefill(min(present, n - 1), n, prefilled.prefill_s)
        elif prefilled.prefill_s > 0:
            self._cost.saw_decode(n, prefilled.prefill_s)
        if done.completion_tokens > 1:
            self._cost.saw_decode(n + done.completion_tokens // 2, done.decode_s / (done.completion_tokens - 1))

    def _finished(self, done: Done, prefilled: Prefilled | None, first_s: float) -> Finished:
        assert self._decision is not None, "load() comes before generate()"
        computed = prefilled.prefill_tokens if prefilled else 0
        timings = Timings(
            queue_ms=(self._admitted_s - self._arrived_s) * 1e3,
            load_ms=self._load_s * 1e3,
            prompt_ms=(first_s - self._admitted_s) * 1e3,
            predicted_ms=done.decode_s * 1e3,
            ttft_ms=(first_s - self._arrived_s) * 1e3,
            staged_ahead_ms=self._staged_ahead.seconds * 1e3,
        )
        return Finished(
            reason=done.reason,
            completion_tokens=done.completion_tokens,
            sources=self._sources.total(computed, complete=prefilled is not None),
            timings=timings,
            decision=self._decision,
            loaded_bytes=self._load.nbytes,
            staged_ahead=self._staged_ahead.tokens,
        )

    async def write_behind(self, *, completions: bool) -> None:
        """Export what is new. The caller's answer was complete before this began."""
        await self._exporter.settled()
        if self._done is None:
            return
        sequence = Tokens(self.request.prompt.data + b"".join(part.data for part in self._generated))
        keep = self._done.kv_tokens if completions else min(self._done.kv_tokens, len(self.request.prompt))
        self._exporter.export(sequence[:keep])
        await self._exporter.settled()

    async def release(self) -> None:
        """The engine first: it answers what it is still exporting."""
        try:
            with suppress(EngineDied):
                await self._engine.release(self._id)
        finally:
            await self._exporter.close()
