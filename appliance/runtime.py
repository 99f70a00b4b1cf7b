"""The request path as the server calls it: queue, run, cancel, drain. `run.py` is one request, `turns.py` the queue.

Only the request path knows both halves, the engine and the store. A request is a task of its own, from its place in the
queue to the release of its cells; what a caller iterates over is only a view of it, so a client that goes away never
leaves blocks unexported or cells held. Threading: event loop only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from types import MappingProxyType
from typing import Any

from appliance.ahead import Ahead
from appliance.embed import embed
from appliance.engine.client import EngineClient
from appliance.errors import EngineDied, EngineError, KvctlError, Overloaded, frames_of
from appliance.going import Going
from appliance.history import History
from appliance.kv.base import KVStore
from appliance.plan.cost import CostModel
from appliance.prefetched import Prefetched
from appliance.pressure import Pressure
from appliance.quarantine import Content, Quarantine
from appliance.reply import Reply
from appliance.request import Chunk, Finished, GenerateRequest, Timings
from appliance.run import Parts, RequestRun
from appliance.sessions import Sessions
from appliance.text import TextCalls
from appliance.totals import Totals
from appliance.trace import Recorder
from appliance.turn import Turn
from appliance.turns import GENERATED, Turns
from appliance.types import Namespace, Tokens

__all__ = ["Chunk", "Finished", "GenerateRequest", "Limits", "Runtime", "Timings"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    max_running: int
    max_queue: int
    store_completions: bool
    prefill_share: float = 1.0
    """Of the engine's time, for prompts, while streams decode."""


class _Outcome(Enum):
    """Of one turn."""

    COMPLETE = "complete"
    PREEMPTED = "preempted"
    """What it computed is stored; it goes on in its next turn."""
    CRASHED = "crashed"
    """The engine died, and is started again."""


@dataclass(frozen=True)
class _Live:
    request: GenerateRequest
    turn: Turn
    task: asyncio.Task[None]


class Runtime:
    def __init__(self, engine: EngineClient, store: KVStore, cost: CostModel, limits: Limits) -> None:
        self.recorder = Recorder(store, engine.info.layout, cost)
        self.engine = engine
        self.store = store
        self.cost = cost
        self.totals = Totals()
        self.history = History()
        self.turns = Turns(limits.max_running, limits.max_queue)
        self.sessions = Sessions(store.names)
        self.prefetched = Prefetched(store)
        self._ahead = Ahead(engine, store, cost, lambda: (turn.request_id for turn in self.turns.line()))
        self._parts = Parts(engine, store, cost, self._ahead, Going(limits.prefill_share), limits.store_completions)
        self._pressure = Pressure(self.turns, lambda request_id: self._spawn(self._preempt(request_id)))
        self._quarantine = Quarantine(engine)
        self._text = TextCalls(engine, self._quarantine)
        self._tasks: set[asyncio.Task[None]] = set()
        self._live: dict[str, _Live] = {}
        self._draining = False

    @property
    def running(self) -> int:
        return self.turns.running

    @property
    def waiting(self) -> int:
        return self.turns.waiting

    @property
    def draining(self) -> bool:
        return self._draining

    def in_use(self) -> list[tuple[Namespace, Tokens]]:
        """Prompts of the requests that run or wait."""
        return [(live.request.ns, live.request.prompt) for live in self._live.values()]

    # --- text --------------------------------------------------------------------------------------------------

    async def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> Tokens:
        """Of a whole prompt: its author decides where special tokens are. Messages go through render()."""
        return await self._text.tokenize(text, add_special=add_special, parse_special=parse_special)

    async def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> Tokens:
        return await self._text.render(messages, tools, options)

    async def detokenize(self, tokens: Tokens) -> str:
        return await self.engine.detokenize(tokens)

    async def embed(self, tenant: str, tokens: Tokens) -> bytes:
        """The unit vector of these tokens, f32le."""
        if self._draining:
            raise Overloaded("the appliance is stopping", retry_after_s=self.turns.retry_after_s(), status=503)
        owner = self.store.root(Namespace(tenant))
        return await embed(self.engine, self.turns, self._quarantine, tenant, owner, tokens)

    # --- generate ----------------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk | Finished]:
        """Events until Finished. Closing the iterator early cancels the request.

        Raises RequestError, Overloaded or EngineError, at the first step or between events.
        """
        turn = self._enter(request)
        events: asyncio.Queue[Chunk | Finished | KvctlError] = asyncio.Queue()
        reply = Reply(events.put_nowait, in_pieces=request.in_pieces)
        live = self._live[request.request_id] = _Live(request, turn, self._spawn(self._drive(request, turn, reply)))
        live.task.add_done_callback(lambda _: self._live.pop(request.request_id, None))
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
                self._spawn(self._cancel(live))

    def _enter(self, request: GenerateRequest) -> Turn:
        """A place in the queue, before anybody else can look."""
        if self._draining:
            raise Overloaded("the appliance is stopping", retry_after_s=self.turns.retry_after_s(), status=503)
        content = self._content(request)
        self._quarantine.check(content)
        alone = self._quarantine.suspects(content)
        turn = self.turns.enter(request.request_id, request.ns.tenant, self._to_compute(request), alone=alone)
        self._waits(request, request.prompt)
        if request.sampling.max_tokens:
            self.sessions.arrived(request)
            self.prefetched.asked(request.ns, request.prompt)
        return turn

    def _to_compute(self, request: GenerateRequest) -> int:
        """Tokens of its prompt, as far as can be told before it has cells: what is in hbm is mostly stored too."""
        return max(1, len(request.prompt) - self.store.lookup(request.ns, request.prompt).tokens)

    def _waits(self, request: GenerateRequest, tokens: Tokens) -> None:
        """It has a place in the queue; `tokens` are what it will need in cells."""
        self._ahead.join(request.request_id, request.ns, tokens)
        self._pressure.watch()

    async def _drive(self, request: GenerateRequest, turn: Turn, reply: Reply) -> None:
        """One request's life: it is answered, its turn ends, and its cells are released."""
        arrived_s = time.perf_counter()
        run = RequestRun(self._parts, request, arrived_s)
        try:
            while (outcome := await self._compute(run, turn, reply)) is not _Outcome.COMPLETE:
                if outcome is _Outcome.CRASHED:
                    self._begin_anew(request, reply)
                    await run.release()
                    run = RequestRun(self._parts, request, arrived_s)
                alone = self._quarantine.suspects(self._content(request))
                left = self._to_compute(request) if outcome is _Outcome.CRASHED else 1
                self.turns.put_back(turn, left, alone=alone)
                self._waits(request, run.sequence)
            self.turns.leave(turn)
            await run.write_behind()
            self.recorder.finished(request, run.sequence)
        except KvctlError as error:
            if reply.ended:
                log.warning("after the answer: %s", error)
            else:
                reply.put(error)
        except Exception as error:  # noqa: BLE001 - a bug of ours must not leave a client waiting
            log.error("request failed: %s", frames_of(error))
            if not reply.ended:
                reply.put(EngineError("internal error"))
        finally:
            self.turns.leave(turn)
            self._ahead.leave(request.request_id)
            self.sessions.left(request.request_id)
            await run.release()

    def _begin_anew(self, request: GenerateRequest, reply: Reply) -> None:
        """After a crash. EngineDied if the client has a part of the answer, RequestError if the request is to blame."""
        if reply.begun:
            raise EngineDied("the engine process died", retry_after_s=self.turns.retry_after_s())
        self._quarantine.check(self._content(request))
        reply.begin_anew()
        self.totals.requeued += 1

    async def _compute(self, run: RequestRun, turn: Turn, reply: Reply) -> _Outcome:
        """One turn, from its grant to its end."""
        request = run.request

        def alone() -> bool:
            return self.turns.running == 1

        def emit(event: Chunk | Finished) -> None:
            if isinstance(event, Chunk):
                self.turns.has_read(turn)
                self.turns.charge(turn, GENERATED * len(event.tokens))
            elif request.sampling.max_tokens:
                self.totals.add(len(request.prompt), event)
                self.history.add(request.request_id, request.ns.tenant, len(request.prompt), event)
                self.sessions.finished(request.request_id, run.sequence)
            reply.put(event)

        content = self._content(request)
        await self.turns.wait(turn)
        async with self._quarantine.inside(content, run.generation) as stay:
            try:
                await run.admit()
                self.turns.has_cells(turn)
                self.turns.expect(turn, await run.load())
                self.turns.computes(turn)
                if not await run.generate(emit, alone):
                    await run.park()
                    self.totals.preemptions += 1
                    return _Outcome.PREEMPTED
            except EngineDied:
                if not self._quarantine.crashed(stay):
                    raise
                return _Outcome.CRASHED
        self._quarantine.clear(content)
        return _Outcome.COMPLETE

    def _content(self, request: GenerateRequest) -> Content:
        """The prompt and what is asked of it, a grammar above all. Who asks again with another seed asks for the same."""

        def content() -> bytes:
            sampling = replace(request.sampling, seed=None)
            return self.store.root(request.ns) + request.prompt.data + repr(sampling).encode()

        return content

    async def _preempt(self, request_id: str) -> None:
        with suppress(EngineError):
            await self.engine.preempt(request_id)

    async def _cancel(self, live: _Live) -> None:
        """Leave the queue; or stop decoding and let the task export what was computed. Repeated: the engine may not know it yet."""
        self.turns.cancel(live.turn)
        while not live.task.done():
            with suppress(EngineError):
                await self.engine.cancel(live.turn.request_id)
            await asyncio.wait({live.task}, timeout=0.25)

    # --- end ---------------------------------------------------------------------------------------------------

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, let running ones finish up to timeout_s, cancel the rest; their KV is still exported."""
        self._draining = True
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        for live in list(self._live.values()):
            self._spawn(self._cancel(live))
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5.0)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
