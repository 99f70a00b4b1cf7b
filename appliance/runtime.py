"""The request path as the server calls it: queue, run, cancel, drain. `run.py` is one request.

Only the request path knows both halves, the engine and the store. A request is a task of its own, from its place in the
queue to the release of its cells; what a caller iterates over is only a view of it, so a client that goes away never
leaves blocks unexported or cells held. Threading: event loop only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from appliance.engine.client import EngineClient
from appliance.errors import EngineDied, EngineError, KvctlError, Overloaded, frames_of
from appliance.kv.base import KVStore
from appliance.plan.cost import CostModel
from appliance.quarantine import Quarantine
from appliance.request import Chunk, Finished, GenerateRequest, Timings
from appliance.run import RequestRun
from appliance.text import TextCalls
from appliance.types import Tier, Tokens

__all__ = ["Chunk", "Finished", "GenerateRequest", "Limits", "Runtime", "Timings", "Totals"]

log = logging.getLogger(__name__)


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
        self._quarantine = Quarantine()
        self._text = TextCalls(engine, self._quarantine)

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
        return await self._text.tokenize(text, add_special=add_special, parse_special=parse_special)

    async def render(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None) -> Tokens:
        return await self._text.render(messages, tools)

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
        return self._quarantine.check(self.store.root(request.ns) + request.prompt.data)

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
                self._quarantine.crashed(digest)
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
