"""Automatic prefetch over a real store, with a simulated think time: what it brings up, keeps, spares and gives back."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from appliance.anticipate import REST_S, Anticipation
from appliance.errors import EngineDied
from appliance.kv.store import TieredStore
from appliance.runtime import Runtime
from appliance.sessions import Sessions
from appliance.types import SamplingParams, Tier, Tokens
from tests.support.faulty import FaultyTier
from tests.support.kv import NS, faulty, fill, prompt
from tests.support.stub_engine import WORD
from tests.support.stub_runtime import answer, engine_of, request, running, until

pytestmark = pytest.mark.asyncio

SLOTS, BUDGET = 16, 4
LONG = 16 * 3 + 5  # three blocks and a tail


class Bench:
    """A runtime whose sessions live on a clock that tests turn, and the prefetch under test."""

    def __init__(self, runtime: Runtime, budget: int) -> None:
        self.now_s = 1000.0
        self.runtime = runtime
        runtime.sessions = Sessions(runtime.store.names, lambda: self.now_s)
        assert isinstance(runtime.store, TieredStore)
        self.store = runtime.store
        self.medium: FaultyTier = faulty(self.store)
        self.anticipation = Anticipation(runtime, budget, lambda: self.now_s)

    async def turn(self, seed: int, n_tokens: int = LONG) -> Tokens:
        """A whole request of a session of its own, whose blocks then are on nvme only. Returns what it ended with."""
        tokens = prompt(seed, n_tokens)
        await answer(self.runtime, request(f"turn-{seed}-{self.now_s}", tokens))
        await until(lambda: not engine_of(self.runtime).known)
        await self.store.flush(5)
        self.store.evict_dram()
        assert self.in_dram(tokens) == 0
        return tokens + WORD

    def in_dram(self, tokens: Tokens) -> int:
        return self.store.lookup(NS, tokens).by_tier().get(Tier.DRAM, 0)

    @property
    def pinned(self) -> int:
        return self.store._dram._pinned


@asynccontextmanager
async def anticipating(home: Path, budget: int = BUDGET, slots: int = SLOTS) -> AsyncIterator[Bench]:
    async with running(home, slots=slots, max_queue=8) as runtime:
        bench = Bench(runtime, budget)
        yield bench
        bench.anticipation.forget()
        assert not bench.pinned


async def test_the_blocks_of_a_session_are_up_before_its_next_turn(tmp_path: Path) -> None:
    async with anticipating(tmp_path) as bench:
        tokens = await bench.turn(1)
        await bench.anticipation.step()
        assert bench.in_dram(tokens) == LONG
        assert bench.pinned == BUDGET
        read = bench.medium.calls["read"]
        bench.now_s += 15
        await bench.anticipation.step()
        (*_, finished) = await answer(bench.runtime, request("next", tokens + prompt(5, 10)))
        assert bench.medium.calls["read"] == read, "nothing moves twice"
        assert finished.sources.dram == LONG  # type: ignore[union-attr]
        totals = bench.runtime.prefetched.totals()
        assert (totals.moved, totals.hit, totals.late, totals.wasted) == (4, 4, 0, 0)


async def test_what_is_held_is_within_the_budget_and_of_the_likeliest(tmp_path: Path) -> None:
    async with anticipating(tmp_path) as bench:
        first, second = await bench.turn(1), await bench.turn(2)
        await bench.anticipation.step()
        assert (bench.in_dram(second), bench.in_dram(first)) == (LONG, 0), "the last used"
        assert bench.pinned == BUDGET
        bench.now_s += 60
        third = await bench.turn(3)
        await bench.anticipation.step()
        assert (bench.in_dram(third), bench.pinned) == (LONG, BUDGET)


async def test_a_long_session_is_held_up_to_the_budget(tmp_path: Path) -> None:
    async with anticipating(tmp_path) as bench:
        tokens = await bench.turn(1, 16 * 8)
        await bench.anticipation.step()
        assert (bench.in_dram(tokens), bench.pinned) == (16 * BUDGET, BUDGET)


async def test_a_prefix_that_sessions_share_is_paid_for_once(tmp_path: Path) -> None:
    async with anticipating(tmp_path, budget=5) as bench:
        shared = prompt(1, 16 * 3)
        for end in (2, 3):
            tokens = shared + prompt(end, 16)
            await answer(bench.runtime, request(f"r{end}", tokens))
            await until(lambda: not engine_of(bench.runtime).known)
        await bench.store.flush(5)
        bench.store.evict_dram()
        await bench.anticipation.step()
        assert [bench.in_dram(shared + prompt(end, 16)) for end in (2, 3)] == [64, 64]
        assert bench.pinned == 5


async def test_what_the_engine_holds_is_not_brought_up(tmp_path: Path) -> None:
    async with anticipating(tmp_path) as bench:
        tokens = await bench.turn(1)

        async def resident(ns: bytes, asked: Tokens) -> int:
            return 32

        engine_of(bench.runtime).resident = resident  # type: ignore[method-assign]
        await bench.anticipation.step()
        assert bench.pinned == 2
        assert bench.store.lookup(NS, tokens).hits[0].tier is Tier.NVME


async def test_nothing_is_held_while_somebody_waits(tmp_path: Path) -> None:
    async with anticipating(tmp_path) as bench:
        await bench.turn(1)
        await bench.anticipation.step()
        assert bench.pinned
        engine_of(bench.runtime).decoding.shut()
        asked = [asyncio.ensure_future(answer(bench.runtime, request(f"r{n}", prompt(20 + n, 8)))) for n in range(3)]
        await until(lambda: bench.runtime.waiting == 1 and engine_of(bench.runtime).decoding.waiting == 2)
        await bench.anticipation.step()
        assert not bench.pinned
        await bench.anticipation.step()
        assert not bench.pinned
        engine_of(bench.runtime).decoding.open()
        await asyncio.gather(*asked)


async def test_nothing_moves_while_a_request_loads_its_own_blocks(tmp_path: Path) -> None:
    async with anticipating(tmp_path) as bench:
        await bench.turn(1)
        await fill(bench.store, prompt(9, 32))
        engine_of(bench.runtime).restoring.shut()
        loading = asyncio.ensure_future(answer(bench.runtime, request("loading", prompt(9, 40))))
        await until(lambda: engine_of(bench.runtime).restoring.waiting)
        reads = bench.medium.calls.get("read", 0)
        await bench.anticipation.step()
        assert bench.medium.calls.get("read", 0) == reads
        engine_of(bench.runtime).restoring.open()
        await loading


async def test_a_running_requests_blocks_are_never_displaced(tmp_path: Path) -> None:
    async with anticipating(tmp_path, slots=12, budget=6) as bench:
        waiting_sessions = [await bench.turn(seed) for seed in (1, 2)]
        engine_of(bench.runtime).decoding.shut()
        mine = prompt(7, 16 * 9)
        running_one = asyncio.ensure_future(answer(bench.runtime, request("mine", mine)))
        await until(lambda: engine_of(bench.runtime).decoding.waiting and bench.in_dram(mine) == len(mine))
        await bench.store.flush(5)
        for _ in range(4):
            await bench.anticipation.step()
            assert bench.in_dram(mine) == len(mine)
            bench.now_s += REST_S[1]
        assert bench.in_dram(waiting_sessions[1]) == 16 * 3, "what was free is used"
        engine_of(bench.runtime).decoding.open()
        await running_one


async def test_a_session_that_is_not_expected_any_more_is_let_go_and_its_blocks_were_wasted(tmp_path: Path) -> None:
    async with anticipating(tmp_path) as bench:
        await bench.turn(1)
        await bench.anticipation.step()
        bench.now_s += 24 * 3600
        await bench.anticipation.step()
        assert not bench.pinned
        assert bench.runtime.prefetched.totals().wasted == 4


async def test_a_medium_that_fails_is_left_alone_longer_and_longer(tmp_path: Path) -> None:
    async with anticipating(tmp_path) as bench:
        tokens = await bench.turn(1)
        bench.medium.fail("read", 99)
        tries: list[float] = []
        for _ in range(40):
            before = bench.medium.calls.get("read", 0)
            await bench.anticipation.step()
            if bench.medium.calls.get("read", 0) > before:
                tries.append(bench.now_s)
                if len(tries) == 2:
                    bench.medium.heal()
            bench.now_s += 0.5
            bench.store._below.loads.breaker.worked()  # type: ignore[union-attr]  # it has a patience of its own
        assert tries[1] - tries[0] >= REST_S[0]
        assert tries[2] - tries[1] >= 2 * REST_S[0]
        assert bench.in_dram(tokens) == LONG


async def test_a_slow_medium_is_given_a_rest(tmp_path: Path) -> None:
    async with anticipating(tmp_path, budget=8) as bench:
        await bench.turn(1)
        second = await bench.turn(2)
        gate = bench.medium.hold("read")
        step = asyncio.ensure_future(bench.anticipation.step())
        await until(gate.reached.is_set)
        bench.now_s += 5
        gate.open()
        await step
        assert bench.in_dram(second) == LONG, "what came is kept"
        calls = bench.medium.calls["read"]
        await bench.anticipation.step()
        assert bench.medium.calls["read"] == calls


async def test_to_forget_lets_go_at_once_also_while_blocks_move(tmp_path: Path) -> None:
    async with anticipating(tmp_path) as bench:
        await bench.turn(1)
        gate = bench.medium.hold("read")
        step = asyncio.ensure_future(bench.anticipation.step())
        await until(gate.reached.is_set)
        bench.anticipation.forget()
        gate.open()
        await step
        assert not bench.pinned
        await bench.anticipation.step()
        assert not bench.pinned, "not before its next turn"


async def test_without_a_budget_it_does_nothing_and_ends(tmp_path: Path) -> None:
    async with anticipating(tmp_path, budget=0) as bench:
        await bench.turn(1)
        await asyncio.wait_for(bench.anticipation.run(), 5)
        assert not bench.medium.calls.get("read")


async def test_its_end_lets_go_and_an_engine_that_died_does_not_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.anticipate.PERIOD_S", 0.01)
    async with anticipating(tmp_path) as bench:
        tokens = await bench.turn(1)
        alive, engine = engine_of(bench.runtime).resident, engine_of(bench.runtime)
        asked = 0

        async def dead(ns: bytes, asked_for: Tokens) -> int:
            nonlocal asked
            asked += 1
            raise EngineDied("the engine process died")

        engine.resident = dead  # type: ignore[method-assign]
        task = asyncio.ensure_future(bench.anticipation.run())
        await until(lambda: asked > 1)
        engine.resident = alive  # type: ignore[method-assign]
        await until(lambda: bench.in_dram(tokens) == LONG)
        task.cancel()
        await asyncio.wait({task})
        assert not bench.pinned


async def test_a_prefetch_is_no_turn_of_a_session(tmp_path: Path) -> None:
    async with anticipating(tmp_path) as bench:
        asked = request("prefetch", prompt(1, LONG))
        await answer(bench.runtime, type(asked)("p", NS, asked.prompt, SamplingParams(max_tokens=0)))
        assert len(bench.runtime.sessions) == 0


async def test_while_nothing_changes_it_looks_less_and_less_often(tmp_path: Path) -> None:
    async with anticipating(tmp_path) as bench:
        await bench.turn(1)
        looked: list[float] = []
        engine, resident = engine_of(bench.runtime), engine_of(bench.runtime).resident

        async def counted(ns: bytes, tokens: Tokens) -> int:
            looked.append(bench.now_s)
            return await resident(ns, tokens)

        engine.resident = counted  # type: ignore[method-assign]
        for _ in range(40):
            await bench.anticipation.step()
            bench.now_s += 0.5
        gaps = [later - earlier for earlier, later in itertools.pairwise(looked)]
        assert gaps == [1, 2, 4, 8]
        second = await bench.turn(2)
        bench.now_s += 0.5
        await bench.anticipation.step()
        assert bench.in_dram(second) == LONG, "a new turn is seen at once"
