"""One request, from its first look-up to the release of its cells (ARCHITECTURE.md, request steps 4 to 10).

Invariant: what begin() pinned in the engine is released, whichever way the request ends. Threading: event loop only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass

from appliance.ahead import Ahead, StagedAhead
from appliance.clock import Clock
from appliance.engine.client import Computed, Done, EngineClient, NewTokens, Preempted, Prefilled
from appliance.errors import EngineDied, EngineError, Overloaded, RestoreError
from appliance.export import Exporter
from appliance.going import Going
from appliance.kv.base import Hit, KVStore
from appliance.load import Load
from appliance.plan.cost import CostModel
from appliance.plan.planner import Decision, decide
from appliance.request import Chunk, Finished, GenerateRequest
from appliance.sources import Sources
from appliance.types import Namespace, Tier, Tokens
from appliance.wanted import pieces_of, wanted


@dataclass(frozen=True)
class Parts:
    """What every request runs on."""

    engine: EngineClient
    store: KVStore
    cost: CostModel
    ahead: Ahead
    going: Going
    store_completions: bool


class RequestRun:
    """Call admit, load, generate in this order; then write_behind, or, if it was preempted, park and all of it again. In
    the end release, whatever happened."""

    def __init__(self, parts: Parts, request: GenerateRequest, arrived_s: float) -> None:
        """`arrived_s`: time.perf_counter() when the client asked."""
        self.request = request
        self._engine = parts.engine
        self._store = parts.store
        self._cost = parts.cost
        self._ahead = parts.ahead
        self._going = parts.going
        self._store_completions = parts.store_completions
        self._clock = Clock(arrived_s)
        self.generation: int | None = None
        """Of the engine process that knows it; None before begin."""
        self._staged_ahead = StagedAhead()
        self._sources = Sources(len(request.prompt))
        self._load = Load(self._engine, self._store, request, self._sources)
        self._exporter = Exporter(self._engine, self._store, request)
        self._decision: Decision | None = None
        self._generated: list[Tokens] = []
        self._prefilled: Prefilled | None = None
        self._done: Done | None = None
        self._kv_tokens = 0
        """Leading tokens of the sequence that were in cells when it stopped."""

    @property
    def _id(self) -> str:
        return self.request.request_id

    @property
    def sequence(self) -> Tokens:
        """The prompt and what was generated so far."""
        return Tokens(self.request.prompt.data + b"".join(part.data for part in self._generated))

    @property
    def _prompt_reach(self) -> int:
        """How much of the prompt can be stored for itself: a state is kept where the last token is still to be decoded."""
        return len(self.request.prompt) - (not self._engine.info.layout.divisible)

    async def admit(self) -> None:
        """Pin what is resident and wait until the engine has cells. Overloaded if cancelled there."""
        request = self.request
        if self.generation is None:
            root = self._store.root(request.ns)
            reserve_tokens = max(request.sampling.max_tokens, 1)
            owner = self._store.root(Namespace(request.ns.tenant))
            await self._engine.begin(self._id, root, request.prompt, reserve_tokens, owner)
            self.generation = self._engine.generation
        try:
            present = await self._engine.restore(self._id, 0, ())
        except RestoreError:
            raise Overloaded("cancelled while it waited for room", retry_after_s=2, status=503) from None
        self._clock.admitted()
        self._load.present = present
        self._sources.reached(present, Tier.HBM)

    async def load(self) -> int:
        """Stage and restore what the planner chose, computing the front meanwhile if it chose that; returns the tokens
        that are left to compute."""
        tokens, present = self.sequence, self._load.present
        traffic = self._going.beside(self._id)
        hits = self._store.lookup(self.request.ns, tokens).hits
        self._store.touch(hits)  # what is resident, or computed anew, is not staged and yet used
        decision = decide(
            len(tokens), present, pieces_of(hits), self._cost, traffic, both_ends=self._engine.info.layout.divisible
        )
        if self._decision is None:
            self._decision = decision
        to_stage = wanted(hits, present, decision)
        for tier in {hit.tier for hit in hits if hit.start >= max(decision.load_to, present)}:
            self._cost.passed_over(tier)
        staged_ahead = self._ahead.leave(self._id)  # the load pins what was held before anything else runs
        self._staged_ahead += staged_ahead
        if to_stage:
            self._going.computes(self._id, decision.front_to - present if decision.front_to else 1)
            front_s, load_s = await _both(
                self._compute_front(decision.front_to),
                self._bring(tokens, to_stage, staged_ahead, shared=traffic.shared or bool(decision.front_to)),
            )
            self._clock.load_s += load_s
            self._clock.beside_s += min(front_s, load_s)
        left = max(len(tokens) - self._load.present, 1)
        self._going.computes(self._id, left)
        return left

    async def _bring(self, tokens: Tokens, hits: list[Hit], staged_ahead: StagedAhead, *, shared: bool) -> float:
        """Seconds it took."""
        self._load.by_tier, started_s = {}, time.perf_counter()
        await self._load.bring(tokens, hits, staged_ahead.tiers)
        seconds = time.perf_counter() - started_s
        shared = shared or self._going.beside(self._id).shared
        if self._load.by_tier:
            self._cost.saw_load(self._load.by_tier, seconds, shared=shared)
        return seconds

    async def _compute_front(self, stop: int) -> float:
        """The prompt up to `stop`, while the blocks behind it load; seconds it took. What cannot be done is left to run()."""
        if not stop:
            return 0.0
        started_s = time.perf_counter()
        self._sources.reached(stop, None)
        try:
            present = await self._engine.prefill(self._id, stop)
        except EngineDied:
            raise
        except EngineError:
            return 0.0
        self._load.present = max(self._load.present, present)
        return time.perf_counter() - started_s

    async def generate(self, emit: Callable[[Chunk | Finished], None], alone: Callable[[], bool]) -> bool:
        """Run to the last token. False if it was preempted before. `alone` says whether no other request runs."""
        was_alone = alone()
        preempted: Preempted | None = None
        self._clock.computing()
        async for event in self._engine.run(self._id, self.request.sampling):
            if isinstance(event, NewTokens):
                self._clock.token()
                self._generated.append(event.tokens)
                emit(Chunk(event.text, event.tokens, event.logprobs))
            elif isinstance(event, Computed):
                self._export_blocks(event.tokens)
            elif isinstance(event, Prefilled):
                self._prefilled = self._prefilled or event
                self._going.decodes(self._id)
                self._exporter.export(self.request.prompt[: self._prompt_reach])
            elif isinstance(event, Preempted):
                preempted = event
            else:
                self._done = event
        self._going.leaves(self._id)
        if preempted is not None:
            self._clock.paused()
            self._kv_tokens = preempted.kv_tokens
            self._sources.reached(preempted.kv_tokens, None)
            return False
        if self._done is None:
            raise EngineError("the engine ended the request without saying why")
        self._clock.token()
        self._kv_tokens = self._done.kv_tokens
        if self._prefilled and not self._clock.paused_s:
            self._clock.compute_s = self._prefilled.prefill_s
            self._learn(self._prefilled, self._done, alone=was_alone and alone())
        emit(self._finished(self._done))
        return True

    def _export_blocks(self, computed: int) -> None:
        """The prompt is computed so far: what is whole is stored already, for the case that the engine dies."""
        block_tokens = self._engine.info.layout.block_tokens
        self._exporter.export(self.sequence[: computed - computed % block_tokens])

    def _learn(self, prefilled: Prefilled, done: Done, *, alone: bool) -> None:
        """A prefill tells the same beside others, since only the steps it took part in count; a decode step does not."""
        n = len(self.request.prompt)
        present = min(self._load.present, n - 1)
        if prefilled.prefill_tokens == n - present:  # in one piece, and none of it taken over from others
            self._cost.saw_prefill(present, n, prefilled.prefill_s)
        if not alone:
            return
        if prefilled.prefill_tokens == 1 and prefilled.prefill_s > 0:
            self._cost.saw_decode(n, prefilled.prefill_s)
        if done.completion_tokens > 1:
            self._cost.saw_decode(n + done.completion_tokens // 2, done.decode_s / (done.completion_tokens - 1))

    def _finished(self, done: Done) -> Finished:
        assert self._decision is not None, "load() comes before generate()"
        prefilled = self._prefilled
        computed = prefilled.prefill_tokens if prefilled and not self._clock.paused_s else None  # some of it twice
        return Finished(
            reason=done.reason,
            completion_tokens=done.completion_tokens,
            sources=self._sources.total(computed, complete=prefilled is not None),
            timings=self._clock.timings(done.decode_s, self._staged_ahead.seconds),
            decision=self._decision,
            loaded_bytes=self._load.nbytes,
            staged_ahead=self._staged_ahead.tokens,
            stop=done.stop,
        )

    async def park(self) -> None:
        """After it was preempted: store what is new, then give up its cells."""
        await self._store_all()
        await self._engine.park(self._id)

    async def write_behind(self) -> None:
        """Export what is new. The caller's answer was complete before this began."""
        await self._store_all()

    async def _store_all(self) -> None:
        keep = self._kv_tokens if self._store_completions else min(self._kv_tokens, self._prompt_reach)
        await self._exporter.settled()
        self._exporter.export(self.sequence[:keep])
        await self._exporter.settled()

    async def release(self) -> None:
        """The engine first: it answers what it is still exporting."""
        self._going.leaves(self._id)
        try:
            with suppress(EngineDied):
                await self._engine.release(self._id)
        finally:
            await self._exporter.close()


async def _both(first: Coroutine[None, None, float], second: Coroutine[None, None, float]) -> tuple[float, float]:
    """What both return. If one fails the other has ended too: nothing of a request outlives the engine it was meant for."""
    tasks = asyncio.ensure_future(first), asyncio.ensure_future(second)
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
