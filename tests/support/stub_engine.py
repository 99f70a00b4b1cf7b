"""An engine client whose calls end when a test says so. It writes into slots when its export is let through, not before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from appliance.engine.client import Done, EngineClient, Event, NewTokens, Prefilled
from appliance.engine.protocol import EngineStats
from appliance.errors import EngineDied, EngineError, RestoreError
from appliance.types import FinishReason, SamplingParams, Tokens

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
        self.generation, self.pid = 1, None
        self.admission, self.restoring, self.exporting, self.decoding = Gate(), Gate(), Gate(), Gate()
        self.error_after_prefill: BaseException | None = None
        self.text_error: EngineDied | None = None
        self.known: dict[str, Tokens] = {}
        self.used_slots: list[int] = []
        """Slots that restores read, when they read them."""
        self._write = write
        self._cancelled: set[str] = set()

    async def start(self) -> Any: ...

    async def attach_pool(self, slot_bytes: int, slots: int) -> None: ...

    async def close(self) -> None: ...

    async def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> Tokens:
        if self.text_error:
            raise self.text_error
        return Tokens.of(list(text.encode()))

    async def render(self, messages: Sequence[dict[str, Any]], tools: Any = None) -> Tokens:
        return await self.tokenize(str(messages), add_special=False, parse_special=True)

    async def detokenize(self, tokens: Tokens) -> str:
        return ""

    async def resident(self, ns: bytes, tokens: Tokens) -> int:
        return 0

    async def begin(self, request: str, ns: bytes, tokens: Tokens, reserve_tokens: int) -> int:
        self.known[request] = tokens
        return 0

    async def restore(self, request: str, start: int, blocks: Sequence[tuple[int, int, int]]) -> int:
        if not blocks:
            await self._or_cancelled(request, self.admission)
            return 0
        await self.restoring.passed()
        self.used_slots += [slot for slot, _, _ in blocks]
        return start + sum(use for _, _, use in blocks)

    async def run(self, request: str, sampling: SamplingParams) -> AsyncIterator[Event]:
        prompt = self.known[request]
        yield Prefilled(len(prompt), 1.0)
        if self.error_after_prefill:
            while not self.exporting.waiting:  # noqa: ASYNC110 - a turn of the loop or two
                await asyncio.sleep(0)
            raise self.error_after_prefill
        await self._or_cancelled(request, self.decoding)
        yield NewTokens(WORD, "w")
        yield Done(FinishReason.LENGTH, 1, 0.1, len(prompt))

    async def export(self, request: str, blocks: Sequence[tuple[int, int, int]]) -> None:
        await self.exporting.passed()
        if request not in self.known:
            raise EngineError("the request was released")
        for start, n_tokens, slot in blocks:
            self._write(start, n_tokens, slot)

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

    async def _or_cancelled(self, request: str, gate: Gate) -> None:
        passing = asyncio.ensure_future(gate.passed())
        while not passing.done():
            if request in self._cancelled:
                passing.cancel()
                raise RestoreError("the request was cancelled")
            await asyncio.sleep(0)
