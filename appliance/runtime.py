"""The request path as the server calls it: queue, quarantine, prefetch, inspection, drain. `request.py` is one request.

Only these two modules know both halves, the engine and the store. A request is a task of its own, from its place in the
queue to the release of its cells; what a caller iterates over is only a view of it, so a client that goes away never
leaves blocks unexported or cells held. Threading: event loop only.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from appliance.engine.client import EngineClient
from appliance.errors import EngineDied, EngineError, KvctlError, Overloaded, RequestError, frames_of
from appliance.kv.base import KVStore, Lookup
from appliance.plan.cost import CostModel
from appliance.plan.planner import decide
from appliance.request import Chunk, Finished, GenerateRequest, RequestRun, Timings, pieces_of
from appliance.types import Namespace, SamplingParams, Tier, Tokens

__all__ = [
    "Chunk",
    "Finished",
    "GenerateRequest",
    "Inspection",
    "Limits",
    "PrefetchStep",
    "Runtime",
    "Timings",
    "Totals",
]

log = logging.getLogger(__name__)
T = TypeVar("T")

CRASHES_TO_QUARANTINE = 2
QUARANTINE_ENTRIES = 1024


@dataclass(frozen=True)
class Inspection:
    """Spans [start, stop) of the prompt with the fastest tier that holds them; None = must be computed."""

    spans: tuple[tuple[int, int, Tier | None], ...]
    estimated_warm_s: float
    estimated_cold_s: float


@dataclass(frozen=True)
class PrefetchStep:
    found: dict[Tier | None, int]
    """Tokens by tier before anything moved; None for what no tier had."""
    moved_tokens: int
    computed_tokens: int
    moved_bytes: int
    done: bool


@dataclass(frozen=True)
class Limits:
    max_running: int
    max_queue: int
    store_completions: bool


@dataclass
class Totals:
    """Since start."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: dict[Tier, int] = field(default_factory=dict)

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - sum(self.cached.values())

    def add(self, prompt_tokens: int, finished: Finished) -> None:
        self.requests += 1
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += finished.completion_tokens
        for tier in Tier:
            self.cached[tier] = self.cached.get(tier, 0) + int(getattr(finished.sources, tier.value))


class Runtime:
    def __init__(self, engine: EngineClient, store: KVStore, cost: CostModel, limits: Limits) -> None:
        self.engine = engine
        self.store = store
        self.cost = cost
        self.totals = Totals()
        self._limits = limits
        self._slots = asyncio.Semaphore(limits.max_running)
        self._queue: set[str] = set()
        """Requests without a slot yet; a new one is here before anybody else can look."""
        self._running = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._live: dict[str, asyncio.Task[None]] = {}
        self._draining = False
        self._crash_key = os.urandom(32)
        self._crashes: dict[bytes, int] = {}

    @property
    def running(self) -> int:
        return self._running

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def draining(self) -> bool:
        return self._draining

    # --- text --------------------------------------------------------------------------------------------------

    async def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> Tokens:
        """Of a whole prompt: its author decides where special tokens are. Messages go through render()."""
        call = self.engine.tokenize(text, add_special=add_special, parse_special=parse_special)
        return await self._guarded(lambda: text.encode("utf-8", "surrogatepass"), call)

    async def render(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None) -> Tokens:
        call = self.engine.render(messages, tools)
        return await self._guarded(lambda: json.dumps([messages, tools]).encode(), call)

    async def detokenize(self, tokens: Tokens) -> str:
        return await self.engine.detokenize(tokens)

    # --- generate ----------------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk | Finished]:
        """Events until Finished. Closing the iterator early cancels the request.

        Raises RequestError, Overloaded or EngineError, at the first step or between events.
        """
        digest = self._admissible(request)
        self._queue.add(request.request_id)
        events: asyncio.Queue[Chunk | Finished | KvctlError] = asyncio.Queue()
        task = self._spawn(self._drive(request, digest, events.put_nowait))
        self._live[request.request_id] = task
        task.add_done_callback(lambda _: self._live.pop(request.request_id, None))
        ended = False
        try:
            while not ended:
                event = await events.get()
                ended = not isinstance(event, Chunk)
                if isinstance(event, KvctlError):
                    raise event
                yield event
        finally:
            if not ended:
                self._spawn(self._cancel(request.request_id, task))

    def _admissible(self, request: GenerateRequest) -> bytes:
        if self._draining:
            raise Overloaded("the appliance is stopping", retry_after_s=10, status=503)
        if self._running + len(self._queue) >= self._limits.max_running + self._limits.max_queue:
            raise Overloaded(f"{len(self._queue)} requests are waiting already; try again later", retry_after_s=2)
        return self._not_quarantined(self.store.root(request.ns) + request.prompt.data)

    async def _drive(
        self, request: GenerateRequest, digest: bytes, emit: Callable[[Chunk | Finished | KvctlError], None]
    ) -> None:
        """One request's life: exactly one Finished or error is emitted, and its cells are released."""
        run = RequestRun(self.engine, self.store, self.cost, request)
        answered = False

        def answer(event: Chunk | Finished | KvctlError) -> None:
            nonlocal answered
            answered = answered or not isinstance(event, Chunk)
            if isinstance(event, Finished) and request.sampling.max_tokens:
                self.totals.add(len(request.prompt), event)
            emit(event)

        try:
            await self._answer(run, answer)
            await run.write_behind(completions=self._limits.store_completions)
        except KvctlError as error:
            if isinstance(error, EngineDied) and run.begun and not answered:
                self._count_crash(digest)
            if not answered:
                answer(error)
            else:
                log.warning("after the answer: %s", error)
        except Exception as error:  # noqa: BLE001 - a bug of ours must not leave a client waiting
            log.error("request failed: %s", frames_of(error))
            if not answered:
                answer(EngineError("internal error"))
        finally:
            await run.release()

    async def _answer(self, run: RequestRun, emit: Callable[[Chunk | Finished], None]) -> None:
        def alone() -> bool:
            return self._running == 1

        try:
            await self._slots.acquire()
        finally:
            self._queue.discard(run.request.request_id)
        self._running += 1
        try:
            await run.admit()
            await run.load(alone)
            await run.generate(emit, alone)
        finally:
            self._running -= 1
            self._slots.release()

    async def _cancel(self, request_id: str, task: asyncio.Task[None]) -> None:
        """Leave the queue; or stop decoding and let the task export what was computed. Repeated: the engine may not know it yet."""
        if request_id in self._queue:
            task.cancel()
        while not task.done():
            with suppress(EngineError):
                await self.engine.cancel(request_id)
            await asyncio.wait({task}, timeout=0.25)

    async def _guarded(self, content: Callable[[], bytes], call: Coroutine[Any, Any, T]) -> T:
        """A text call whose input is quarantined like a request; `content` is read only where something has crashed."""
        try:
            if self._crashes:
                self._not_quarantined(content())
        except RequestError:
            call.close()
            raise
        try:
            return await call
        except EngineDied:
            self._count_crash(self._digest(content()))
            raise

    def _not_quarantined(self, content: bytes) -> bytes:
        """The content's digest. RequestError if it crashed the engine before."""
        digest = self._digest(content)
        if self._crashes.get(digest, 0) >= CRASHES_TO_QUARANTINE:
            raise RequestError("this request crashed the engine twice and is refused", code="quarantined", status=422)
        return digest

    def _digest(self, content: bytes) -> bytes:
        return hashlib.blake2b(content, key=self._crash_key, digest_size=16).digest()

    def _count_crash(self, digest: bytes) -> None:
        if len(self._crashes) >= QUARANTINE_ENTRIES:
            self._crashes.pop(next(iter(self._crashes)))
        self._crashes[digest] = self._crashes.get(digest, 0) + 1

    # --- look, prefetch, evict ---------------------------------------------------------------------------------

    async def inspect(self, ns: Namespace, tokens: Tokens) -> Inspection:
        """Where each token of this prompt is, and what a first token would cost. Changes nothing."""
        resident, lookup = await self._where(ns, tokens)
        spans: list[tuple[int, int, Tier | None]] = []

        def add(start: int, stop: int, tier: Tier | None) -> None:
            if stop > start:
                if spans and spans[-1][2] == tier:
                    start = spans.pop()[0]
                spans.append((start, stop, tier))

        add(0, resident, Tier.HBM)
        for hit in lookup.hits:
            add(max(hit.start, resident), hit.start + hit.use_tokens, hit.tier)
        add(spans[-1][1] if spans else 0, len(tokens), None)
        warm = decide(len(tokens), resident, pieces_of(lookup.hits), self.cost)
        cold = decide(len(tokens), 0, (), self.cost)
        return Inspection(tuple(spans), warm.chosen.total_s, cold.chosen.total_s)

    async def _where(self, ns: Namespace, tokens: Tokens) -> tuple[int, Lookup]:
        resident = await self.engine.resident(self.store.root(ns), tokens)
        return resident, self.store.lookup(ns, tokens)

    async def prefetch(self, ns: Namespace, tokens: Tokens, *, to: Tier, compute: bool) -> AsyncIterator[PrefetchStep]:
        """Bring what is stored up to `to` (dram or hbm); with `compute`, prefill what no tier has. The last step is done."""
        resident, lookup = await self._where(ns, tokens)
        found: dict[Tier | None, int] = {Tier.HBM: resident} if resident else {}
        found |= {tier: count for tier, count in lookup.by_tier(resident).items()}
        if rest := len(tokens) - sum(found.values()):
            found[None] = rest
        moved_tokens = moved_bytes = computed = 0
        yield PrefetchStep(found, 0, 0, 0, done=False)
        if to is Tier.DRAM:
            async for staged in self.store.stage(ns, tokens, lookup.hits):
                self.store.unpin(staged)
                if staged.seconds:  # it was not in DRAM yet
                    moved_tokens += sum(hit.use_tokens for hit in staged.hits)
                    moved_bytes += staged.nbytes
                    yield PrefetchStep(found, moved_tokens, 0, moved_bytes, done=False)
        part = tokens if compute else tokens[: len(tokens) - rest]
        if part and (to is Tier.HBM or (compute and rest)):
            request = GenerateRequest(f"prefetch-{os.urandom(8).hex()}", ns, part, SamplingParams(max_tokens=0))
            async for event in self.generate(request):
                if isinstance(event, Finished):
                    computed, moved_bytes = event.sources.computed, moved_bytes + event.loaded_bytes
                    moved_tokens += event.sources.dram + event.sources.nvme + event.sources.remote
        yield PrefetchStep(found, moved_tokens, computed, moved_bytes, done=True)

    async def evict(self, tier: Tier) -> int:
        """Forget what `tier` (hbm or dram) holds and nobody uses; returns the cells or blocks freed."""
        return await self.engine.evict() if tier is Tier.HBM else self.store.evict_dram()

    # --- end ---------------------------------------------------------------------------------------------------

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, let running ones finish up to timeout_s, cancel the rest; their KV is still exported."""
        self._draining = True
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        for request_id, task in list(self._live.items()):
            self._spawn(self._cancel(request_id, task))
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5.0)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
