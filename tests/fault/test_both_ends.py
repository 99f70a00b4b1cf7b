"""The front of a prompt computed while its back is restored: a real engine process, a real store, a medium that does what
a test says. Whatever happens to either end, the answer is the one a cold cache gives."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from appliance.engine.proxy import EngineProxy
from appliance.kv.store import TieredStore
from appliance.kv.tiers.base import Extent
from appliance.plan.line import Line
from appliance.request import Chunk, Finished, GenerateRequest
from appliance.types import Namespace, SamplingParams, Tier, Tokens
from tests.support.appliance import BLOCK, TOKEN_BYTES, prompt
from tests.support.bare import Served, bare_engine
from tests.support.faulty import FaultyTier
from tests.support.kv import faulty

BLOCKS = 10
PROMPT = Tokens.of(prompt(1, BLOCKS * BLOCK + 1))
NS = Namespace("default")
TOKEN_S = 1e-3
"""A token is thought to take so long, computed or loaded."""

pytestmark = pytest.mark.asyncio


@dataclass
class Ends:
    served: Served
    medium: FaultyTier
    cold: list[int]
    """The completion of a cold cache."""
    restored: list[int]
    """Where each block that was sent to the engine starts."""

    @property
    def engine(self) -> EngineProxy:
        engine = self.served.runtime.engine
        assert isinstance(engine, EngineProxy)
        return engine

    async def answer(self) -> tuple[list[int], Finished]:
        return _answer([event async for event in self.served.runtime.generate(_request())])

    async def front_is_computed(self) -> None:
        root = self.served.store.root(NS)
        while not await self.engine.resident(root, PROMPT):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


def _request() -> GenerateRequest:
    return GenerateRequest(os.urandom(8).hex(), NS, PROMPT, SamplingParams(16, temperature=0.0), in_pieces=False)


def _answer(events: Sequence[Chunk | Finished]) -> tuple[list[int], Finished]:
    end = events[-1]
    assert isinstance(end, Finished)
    return [token for event in events if isinstance(event, Chunk) for token in event.tokens], end


@asynccontextmanager
async def both_ends(home: Path) -> AsyncIterator[Ends]:
    """The prompt is on nvme and nowhere else, and to load all of it is thought to take as long as to compute it."""
    async with bare_engine() as bare, bare.serving(home) as served:
        runtime, store = served.runtime, served.store
        assert isinstance(store, TieredStore)
        cold, _ = _answer([event async for event in runtime.generate(_request())])
        await runtime.drain(5)
        runtime._draining = False
        assert await store.flush(5)
        store.evict_dram()
        await bare.engine.evict()
        runtime.cost.prefill, runtime.cost.loads[Tier.NVME] = Line(TOKEN_S), Line(TOKEN_S / TOKEN_BYTES)
        restored: list[int] = []
        restore = bare.engine.restore

        async def counted(request: str, start: int, blocks: Sequence[tuple[int, int, int]]) -> int:
            restored.extend(start + n * BLOCK for n in range(len(blocks)))
            return await restore(request, start, blocks)

        bare.engine.restore = counted  # type: ignore[method-assign]
        yield Ends(served, faulty(store), cold, restored)


@pytest.mark.parametrize("back", ["comes while the front is computed", "comes after it"])
async def test_the_front_is_computed_and_the_back_restored_each_once(tmp_path: Path, back: str) -> None:
    async with both_ends(tmp_path) as ends:
        if back == "comes after it":
            gate = ends.medium.hold("read")
            asked = asyncio.ensure_future(ends.answer())
            await ends.front_is_computed()
            gate.open()
            tokens, end = await asked
        else:
            tokens, end = await ends.answer()
        assert end.decision.reason == "both"
        assert 0 < end.decision.front_to < end.decision.load_to
        assert tokens == ends.cold
        assert (end.sources.computed, end.sources.nvme) == (
            end.decision.front_to + 1,
            len(PROMPT) - 1 - end.decision.front_to,
        )
        assert ends.restored == list(range(end.decision.front_to, end.decision.load_to, BLOCK))


@pytest.mark.parametrize("good", [0, 3], ids=["all of it", "but its first blocks"])
async def test_a_back_that_is_lost_is_computed(tmp_path: Path, good: int) -> None:
    def spoil(extent: Extent, data: memoryview) -> None:
        """In the middle of that one of five records and a short one."""
        data[extent.length * (2 * good + 1) // 11] ^= 1

    async with both_ends(tmp_path) as ends:
        if good:
            ends.medium.spoil = spoil
        else:
            ends.medium.fail("read", 100)
        tokens, end = await ends.answer()
        assert end.decision.front_to == BLOCKS // 2 * BLOCK
        assert tokens == ends.cold
        assert (end.sources.computed, end.sources.nvme) == (len(PROMPT) - good * BLOCK, good * BLOCK)


async def test_an_engine_that_dies_while_the_back_comes_is_asked_again(tmp_path: Path) -> None:
    async with both_ends(tmp_path) as ends:
        gate = ends.medium.hold("read")
        asked = asyncio.ensure_future(ends.answer())
        await ends.front_is_computed()
        assert ends.engine.pid is not None
        os.kill(ends.engine.pid, signal.SIGKILL)
        gate.open()
        tokens, end = await asked
        assert tokens == ends.cold
        assert end.sources.total == len(PROMPT)
        assert ends.engine.generation == 2
