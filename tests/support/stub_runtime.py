"""A runtime over a real store and an engine that waits for the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from appliance.kv.store import TieredStore
from appliance.kv.tiers.dram import SlotState
from appliance.plan.cost import CostModel
from appliance.request import Chunk, Finished, GenerateRequest
from appliance.runtime import Limits, Runtime
from appliance.types import Namespace, SamplingParams, Tokens
from tests.support.kv import NS, keyring, opened, payload, prompt, view
from tests.support.stub_engine import StubEngine

PROMPT = prompt(1, 40)  # two blocks and a tail
TENANTS = ("default", "other")


@asynccontextmanager
async def running(
    home: Path, max_running: int = 2, max_queue: int = 2, *, store_completions: bool = True, **store: int
) -> AsyncIterator[Runtime]:
    """Afterwards nothing is pinned, reserved or known to the engine."""
    async with opened(home, ring=keyring(home, *TENANTS), **store) as kv:
        engine = StubEngine(lambda start, n, slot: _write(kv, start, n, slot))
        cost = CostModel.calibrated(prefill_tokens_per_s=100, decode_step_s=0.1)
        runtime = Runtime(engine, kv, cost, Limits(max_running, max_queue, store_completions=store_completions))
        yield runtime
        for gate in engine.gates:
            gate.open()
        await runtime.drain(5)
        assert not engine.known, "every request was released"
        assert kv._dram._pinned == 0, "every staged run was unpinned"
        assert all(entry.state is not SlotState.RESERVED for entry in kv._dram.entries()), "every reservation ended"


def _write(store: TieredStore, start: int, n_tokens: int, slot: int) -> None:
    kv = payload(PROMPT[start : start + n_tokens], start)
    view(store, slot)[: len(kv)] = kv


def request(name: str = "r", tokens: Tokens = PROMPT, max_tokens: int = 4, ns: Namespace = NS) -> GenerateRequest:
    return GenerateRequest(name, ns, tokens, SamplingParams(max_tokens=max_tokens))


async def answer(runtime: Runtime, asked: GenerateRequest) -> list[Chunk | Finished]:
    return [event async for event in runtime.generate(asked)]


async def until(condition: Callable[[], object]) -> None:
    async def wait() -> None:
        while not condition():  # noqa: ASYNC110 - of any kind, so there is no event to wait for
            await asyncio.sleep(0.001)

    await asyncio.wait_for(wait(), 10)


def engine_of(runtime: Runtime) -> StubEngine:
    assert isinstance(runtime.engine, StubEngine)
    return runtime.engine
