"""An engine client whose calls end when a test says so. It writes into slots when its export is let through, not before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from types import SimpleNamespace
from typing import Any

from appliance.engine.client import Computed, Done, EngineClient, Event, NewTokens, Preempted, Prefilled
from appliance.engine.protocol import EngineStats
from appliance.errors import EngineDied, EngineError, RestoreError
from appliance.types import FinishReason, SamplingParams, Tokens
from tests.support.kv import BLOCK_TOKENS, LAYOUT

WORD = Tokens.of([7])


class Gate:
    """Open until a test shuts it. `waiting` counts those who stand before it."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self.waiting = 0

    def shut(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    async def passed(self) -> None:
        self.waiting += 1
        try:
            await self._open.wait()
        finally:
            self.waiting -= 1


class StubEngine(EngineClient):
    def __init__(self, write: Callable[[int, int, int], None] = lambda start, n_tokens, slot: None) -> None:
        self.generation, self.pid = 1, 1
        self.admission, self.restoring, self.exporting, self.decoding = Gate(), Gate(), Gate(), Gate()
        self.computing, self.ending, self.parking, self.fronts = Gate(), Gate(), Gate(), Gate()
        self.gates = (
            self.admission, self.fronts, self.restoring, self.computing, self.decoding, self.ending, self.exporting, self.parking,
        )  # fmt: skip
        self.parked = 0
        self.error_after_prefill: BaseException | None = None
        self.poison: set[Tokens | str] = set()
        """Prompts, grammars and texts that end the engine process; another takes its place at once."""
        self.known: dict[str, Tokens] = {}
        self.alone: list[str] = []
        """Requests that ran while no other was known."""
        self.used_slots: list[int] = []
        """Slots that restores read, when they read them."""
        self._write = write
        self._cancelled: set[str] = set()
        self._preempted: set[str] = set()
        self._spoken: set[str] = set()
        """Requests that said their word."""
        self._present: dict[str, int] = {}
        self._born: dict[str, int] = {}
        """The generation each request lives in."""

    def die(self) -> None:
        self.generation += 1
        self.known.clear()

    async def start(self) -> Any: ...

    async def attach_pool(self, slot_bytes: int, slots: int) -> None: ...

    async def close(self) -> None: ...

    async def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> Tokens:
        if text in self.poison:
            self.die()
            raise EngineDied("the engine process died")
        return Tokens.of(list(text.encode()))

    async def render(self, messages: Sequence[dict[str, Any]], tools: Any = None, options: Any = None) -> Tokens:
        return await self.tokenize(str(messages), add_special=False, parse_special=True)

    async def detokenize(self, tokens: Tokens) -> str:
        return ""

    async def resident(self, ns: bytes, tokens: Tokens) -> int:
        return 0

    @property
    def info(self) -> Any:  # type: ignore[override]
        return SimpleNamespace(layout=LAYOUT)

    async def begin(self, request: str, ns: bytes, tokens: Tokens, reserve_tokens: int, owner: bytes) -> int:
        assert request not in self.known
        self.known[request], self._born[request] = tokens, self.generation
        for marks in (self._cancelled, self._preempted, self._spoken):
            marks.discard(request)
        return 0

    async def restore(self, request: str, start: int, blocks: Sequence[tuple[int, int, int]]) -> int:
        if not blocks:
            await self._pass(request, self.admission)
            self._present[request] = 0
            return 0
        await self._answered(request, self.restoring)
        self.used_slots += [slot for slot, _, _ in blocks]
        self._present[request] = start + sum(use for _, _, use in blocks)
        return self._present[request]

    async def run(self, request: str, sampling: SamplingParams) -> AsyncIterator[Event]:
        self._check_alive(request)
        prompt = self.known[request]
        if len(self.known) == 1:
            self.alone.append(request)
        if prompt in self.poison or sampling.grammar in self.poison:
            await asyncio.sleep(0.01)  # others are at work
            self.die()
            raise EngineDied("the engine process died")
        first = self._present[request] // BLOCK_TOKENS * BLOCK_TOKENS + BLOCK_TOKENS
        for computed in range(first, len(prompt), BLOCK_TOKENS):
            yield Computed(computed)
            if await self._stopped(request, self.computing):
                yield Preempted(computed)
                return
        if request not in self._spoken:
            yield Prefilled(max(len(prompt) - self._present[request], 1), 1.0)
            if self.error_after_prefill:
                while not self.exporting.waiting:  # noqa: ASYNC110 - a turn of the loop or two
                    await asyncio.sleep(0)
                raise self.error_after_prefill
            if await self._stopped(request, self.decoding):
                yield Preempted(len(prompt))
                return
            self._spoken.add(request)
            yield NewTokens(WORD, "w")
        if await self._stopped(request, self.ending):
            yield Preempted(len(prompt))
            return
        cancelled = request in self._cancelled
        yield Done(FinishReason.CANCELLED if cancelled else FinishReason.LENGTH, 1, 0.1, len(prompt))

    async def preempt(self, request: str) -> None:
        self._preempted.add(request)

    async def park(self, request: str) -> None:
        await self._answered(request, self.parking)
        self.parked += 1

    async def prefill(self, request: str, stop: int) -> int:
        await self._answered(request, self.fronts)
        self._present[request] = max(self._present[request], stop)
        return self._present[request]

    async def export(self, request: str, blocks: Sequence[tuple[int, int, int]]) -> None:
        await self._answered(request, self.exporting)
        if request not in self.known:
            raise EngineError("the request was released")
        for start, n_tokens, slot in blocks:
            self._write(start, n_tokens, slot)

    async def embed(self, request: str) -> bytes:
        raise AssertionError("the request path embeds nothing")

    async def release(self, request: str) -> None:
        """As the scheduler: what is being exported is answered first."""
        self.known.pop(request, None)
        self.exporting.open()
        await asyncio.sleep(0)

    async def cancel(self, request: str) -> None:
        self._cancelled.add(request)

    async def evict(self) -> int:
        return 0

    async def stats(self) -> EngineStats:
        raise AssertionError("the request path asks for no statistics")

    async def _stopped(self, request: str, gate: Gate) -> bool:
        """Wait there, unless it is preempted or cancelled; whether it was preempted."""
        await self._answered(request, gate, lambda: request in self._preempted or request in self._cancelled)
        preempted = request in self._preempted and request not in self._cancelled
        self._preempted.discard(request)
        return preempted

    async def _pass(self, request: str, gate: Gate) -> None:
        """Wait there, unless the request is cancelled."""
        await self._answered(request, gate, lambda: request in self._cancelled)
        if request in self._cancelled:
            raise RestoreError("the request was cancelled")

    async def _answered(self, request: str, gate: Gate, stopped: Callable[[], bool] = lambda: False) -> None:
        """Wait there, or until `stopped`, unless the engine dies."""
        self._check_alive(request)
        passing = asyncio.ensure_future(gate.passed())
        try:
            while not passing.done() and not stopped():
                await asyncio.sleep(0)
                self._check_alive(request)
        finally:
            passing.cancel()

    def _check_alive(self, request: str) -> None:
        if self._born[request] != self.generation:
            raise EngineDied("the engine process died")
