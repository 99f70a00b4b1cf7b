"""One request, from its first look-up to the release of its cells (ARCHITECTURE.md, request steps 3 to 9).

Invariant: what begin() pinned in the engine is released, whichever way the request ends. Threading: event loop only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from appliance.engine.client import Done, EngineClient, NewTokens, Prefilled
from appliance.errors import EngineDied, EngineError, Overloaded, RestoreError
from appliance.export import Exporter
from appliance.kv.base import Hit, KVStore
from appliance.load import Load
from appliance.plan.cost import CostModel
from appliance.plan.planner import Decision, Piece, decide
from appliance.request import Chunk, Finished, GenerateRequest, Timings
from appliance.sources import Sources
from appliance.types import Tier, Tokens


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
        self._load_s = 0.0
        self._begun = False
        self._sources = Sources(len(request.prompt))
        self._load = Load(engine, store, request, self._sources)
        self._exporter = Exporter(engine, store, request)
        self._decision: Decision | None = None
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
        self._load.present = present
        self._sources.reached(present, Tier.HBM)

    async def load(self, alone: Callable[[], bool]) -> None:
        """Stage and restore what the planner chose.

        `alone` says whether no other request runs: else the time it took says nothing about the tier.
        """
        request, present = self.request, self._load.present
        was_alone = alone()
        hits = self._store.lookup(request.ns, request.prompt).hits
        self._store.touch(hits)  # what is resident, or computed anew, is not staged and yet used
        self._decision = decide(len(request.prompt), present, pieces_of(hits), self._cost)
        wanted = [hit for hit in hits if hit.start + hit.use_tokens > present and hit.start < self._decision.load_to]
        for tier in {hit.tier for hit in hits if hit.start >= max(self._decision.load_to, present)}:
            self._cost.passed_over(tier)
        if not wanted:
            return
        started_s = time.perf_counter()
        await self._load.bring(request.prompt, wanted)
        self._load_s = time.perf_counter() - started_s
        tiers = {hit.tier for hit in wanted}
        if len(tiers) == 1 and self._load.nbytes and was_alone and alone():
            self._cost.saw_load(tiers.pop(), self._load.nbytes, self._load_s)

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
        sources = self._sources.total(computed, complete=prefilled is not None)
        timings = Timings(
            queue_ms=(self._admitted_s - self._created_s) * 1e3,
            load_ms=self._load_s * 1e3,
            prompt_ms=(first_s - self._admitted_s) * 1e3,
            predicted_ms=done.decode_s * 1e3,
            ttft_ms=(first_s - self._created_s) * 1e3,
        )
        return Finished(done.reason, done.completion_tokens, sources, timings, self._decision, self._load.nbytes)

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
