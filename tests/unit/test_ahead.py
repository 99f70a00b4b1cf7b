"""Queue look-ahead with a real store: what it stages, holds, reports and gives back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from appliance.kv.store import TieredStore
from appliance.request import Finished
from appliance.runtime import Runtime
from appliance.types import Tier, Tokens
from tests.support.faulty import FaultyTier, Gate
from tests.support.kv import LAYOUT, NS, faulty, fill, prompt
from tests.support.stub_runtime import answer, engine_of, request, running, until

SLOTS = 32
BUDGET = SLOTS // 4
LONG, LONGER = prompt(1, 16 * 6), prompt(2, 16 * 12)

pytestmark = pytest.mark.asyncio


def store_of(runtime: Runtime) -> TieredStore:
    assert isinstance(runtime.store, TieredStore)
    return runtime.store


def pinned(runtime: Runtime) -> int:
    return store_of(runtime)._dram._pinned


def in_dram(runtime: Runtime, tokens: Tokens) -> int:
    return runtime.store.lookup(NS, tokens).by_tier().get(Tier.DRAM, 0)


def read_bytes(runtime: Runtime) -> float:
    return runtime.store.counters()['load_bytes_total{tier="nvme"}']


async def stored(runtime: Runtime, *prompts: Tokens) -> None:
    """On nvme and nowhere else."""
    for tokens in prompts:
        await fill(runtime.store, tokens)
        await runtime.store.flush(5)
        runtime.store.evict_dram()


@asynccontextmanager
async def queueing(
    home: Path, *prompts: Tokens, prepare: Callable[[FaultyTier], object] = lambda medium: None
) -> AsyncIterator[tuple[Runtime, list[asyncio.Task[list]]]]:  # type: ignore[type-arg]
    """One request runs for as long as `decoding` is shut; one for each of these prompts, which nvme holds, waits."""
    async with running(home, max_running=1, max_queue=8, slots=SLOTS, read_size=4096) as runtime:
        await stored(runtime, *prompts)
        prepare(faulty(store_of(runtime)))
        engine_of(runtime).decoding.shut()
        first = asyncio.ensure_future(answer(runtime, request("first", prompt(9, 8))))
        await until(lambda: engine_of(runtime).decoding.waiting)
        asked = [asyncio.ensure_future(answer(runtime, request(f"r{n}", each))) for n, each in enumerate(prompts)]
        await until(lambda: runtime.waiting == len(prompts))
        yield runtime, asked
        engine_of(runtime).decoding.open()
        await first
        await asyncio.wait(asked)


def finished(task: asyncio.Task[list]) -> Finished:  # type: ignore[type-arg]
    end = task.result()[-1]
    assert isinstance(end, Finished)
    return end


async def test_a_load_after_a_wait_is_only_a_copy_and_its_tokens_are_of_the_tier_they_came_from(tmp_path: Path) -> None:
    async with queueing(tmp_path, LONG) as (runtime, asked):
        await until(lambda: in_dram(runtime, LONG) == len(LONG))
        assert pinned(runtime) == 6
        read = read_bytes(runtime)
    assert read_bytes(runtime) == read
    end = finished(asked[0])
    assert (end.sources.nvme, end.sources.dram) == (len(LONG) - 1, 0)
    assert end.staged_ahead == runtime.totals.staged_ahead_tokens == len(LONG)
    assert end.timings.staged_ahead_ms > 0


async def test_more_than_the_budget_is_staged_to_the_budget_the_nearest_first(tmp_path: Path) -> None:
    async with queueing(tmp_path, LONGER, LONG) as (runtime, asked):
        await until(lambda: in_dram(runtime, LONGER) == BUDGET * 16)
        for _ in range(20):
            await asyncio.sleep(0.005)
            assert pinned(runtime) <= BUDGET
        assert in_dram(runtime, LONG) == 0
    ends = [finished(task) for task in asked]
    assert ends[0].staged_ahead == BUDGET * 16
    assert [end.sources.nvme for end in ends] == [len(LONGER) - 1, len(LONG) - 1]


async def test_who_leaves_the_queue_gives_back_what_was_held_for_him(tmp_path: Path) -> None:
    async with queueing(tmp_path, LONG) as (runtime, asked):
        await until(lambda: in_dram(runtime, LONG) == len(LONG))
        asked[0].cancel()
        await until(lambda: not runtime.waiting)
        assert pinned(runtime) == 0


async def test_a_request_may_leave_or_begin_while_it_is_being_staged(tmp_path: Path) -> None:
    gates: list[Gate] = []
    async with queueing(tmp_path, LONG, LONGER, prepare=lambda medium: gates.append(medium.hold("read"))) as (
        runtime,
        asked,
    ):
        await until(gates[0].reached.is_set)
        asked[0].cancel()
        await until(lambda: runtime.waiting == 1)
        engine_of(runtime).decoding.open()
        await until(lambda: not runtime.waiting)
        gates[0].open()
    assert finished(asked[1]).sources.nvme == len(LONGER) - 1


async def test_a_medium_that_fails_ahead_costs_a_recompute_at_most(tmp_path: Path) -> None:
    async with queueing(tmp_path, LONG, prepare=lambda medium: medium.fail("read", 99)) as (runtime, asked):
        await until(lambda: any(name.startswith("tier_failures") for name in runtime.store.counters()))
        assert pinned(runtime) == 0
    assert finished(asked[0]).sources.computed == len(LONG)


async def test_an_absent_prefix_asked_for_twice_at_once_is_read_once(tmp_path: Path) -> None:
    async with running(tmp_path, slots=SLOTS, read_size=4096) as runtime:
        await stored(runtime, LONG)
        engine_of(runtime).decoding.shut()
        asked = [asyncio.ensure_future(answer(runtime, request(f"r{n}", LONG))) for n in range(2)]
        await until(lambda: engine_of(runtime).decoding.waiting == 2)
        assert len(engine_of(runtime).used_slots) == 12, "the second had its blocks while the first went on"
        assert read_bytes(runtime) == sum(LAYOUT.payload_bytes(16) for _ in range(6))
        engine_of(runtime).decoding.open()
        for task in asked:
            assert isinstance((await task)[-1], Finished)
