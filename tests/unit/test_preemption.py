"""Preemption: a request makes room, and goes on later; nothing is lost and nothing is held, wherever it is cut off."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from appliance.errors import EngineDied, Overloaded
from appliance.request import Chunk, Finished
from appliance.runtime import Runtime
from appliance.types import Namespace
from tests.support.kv import NS, prompt
from tests.support.stub_engine import WORD, Gate
from tests.support.stub_runtime import PROMPT, answer, engine_of, request, running, until

pytestmark = pytest.mark.asyncio

OTHER = Namespace("other")


@pytest.mark.parametrize("point", ["computing", "decoding", "ending"])
async def test_a_preempted_request_goes_on_and_its_client_sees_a_pause(tmp_path: Path, point: str) -> None:
    async with running(tmp_path) as runtime:
        engine = engine_of(runtime)
        gate: Gate = getattr(engine, point)
        gate.shut()
        asked = asyncio.ensure_future(answer(runtime, request()))
        await until(lambda: gate.waiting)
        await engine.preempt("r")
        await until(lambda: engine.parked)
        gate.open()
        chunk, end = await asked
        assert isinstance(chunk, Chunk)
        assert isinstance(end, Finished)
        assert end.timings.paused_ms > 0
        assert end.sources.total == len(PROMPT)
        assert (runtime.totals.requests, runtime.totals.preemptions) == (1, 1)
        assert runtime.totals.prompt_tokens == len(PROMPT)
        if point != "computing":
            assert end.loaded_bytes, "what it had computed was stored, and came back"
            assert end.sources.computed == len(PROMPT), "and counts for what it was: computed"


async def test_a_tenant_that_was_served_more_makes_room_for_one_that_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.pressure.PATIENCE_S", 0.05)
    async with running(tmp_path, max_running=1) as runtime:
        engine = engine_of(runtime)
        engine.ending.shut()
        long = asyncio.ensure_future(answer(runtime, request("long", prompt(1, 100))))
        await until(lambda: engine.ending.waiting)
        short = asyncio.ensure_future(answer(runtime, request("short", prompt(2, 40), ns=OTHER)))
        await until(lambda: runtime.waiting)
        runtime.turns.charge(runtime._live["long"].turn, 1000)
        await until(lambda: engine.parked)
        await until(lambda: engine.ending.waiting)
        assert runtime.waiting == 1
        engine.ending.open()
        assert isinstance((await short)[-1], Finished)
        assert isinstance((await long)[-1], Finished)
        assert runtime.totals.preemptions == 1


async def test_what_is_whole_is_stored_while_the_prompt_is_computed(tmp_path: Path) -> None:
    """So a crash in a long prefill costs the blocks that were not whole yet."""
    async with running(tmp_path) as runtime:
        engine = engine_of(runtime)
        engine.computing.shut()
        asked = asyncio.ensure_future(answer(runtime, request()))
        await until(lambda: runtime.store.lookup(NS, PROMPT).tokens == 16)
        engine.die()
        engine.computing.open()
        end = (await asked)[-1]
        assert isinstance(end, Finished)
        assert end.sources.dram == 16
        assert end.sources.computed == len(PROMPT) - 16


POINTS = ("exporting", "parking", "waiting", "admission", "restoring", "ending")
"""Of the cycle: storing what is new, giving up cells, then from the queue to where it stopped."""


async def _preempted_at(runtime: Runtime, point: str) -> asyncio.Task[list[Chunk | Finished]]:
    """A request that said a word, was preempted, and is at this point of the cycle."""
    engine = engine_of(runtime)
    engine.ending.shut()
    if point == "exporting":
        engine.exporting.shut()
    asked = asyncio.ensure_future(answer(runtime, request()))
    await until(lambda: engine.ending.waiting)
    if point != "exporting":
        await until(lambda: runtime.store.lookup(NS, PROMPT).tokens == len(PROMPT))
    if point == "waiting":
        engine.parking.shut()
        await engine.preempt("r")
        await until(lambda: engine.parking.waiting)
        other = runtime.turns.enter("other", "other", 1, alone=False)
        runtime.turns.charge(runtime._live["r"].turn, 1000)  # so the other takes the turn
        engine.parking.open()
        await until(lambda: runtime.turns.is_waiting(runtime._live["r"].turn))
        asked.add_done_callback(lambda _: runtime.turns.leave(other))
    else:
        gate: Gate = getattr(engine, point)
        if point != "ending":
            gate.shut()
        await engine.preempt("r")
        await until(lambda: engine.parked if point == "ending" else gate.waiting)
        await until(lambda: gate.waiting)
    return asked


@pytest.mark.parametrize("point", POINTS)
async def test_a_client_that_goes_away_leaves_nothing_behind(tmp_path: Path, point: str) -> None:
    async with running(tmp_path, max_running=1) as runtime:
        asked = await _preempted_at(runtime, point)
        asked.cancel()
        await asyncio.wait({asked})
        for gate in engine_of(runtime).gates:
            gate.open()
        await until(lambda: not runtime._live)


@pytest.mark.parametrize("point", POINTS)
async def test_an_engine_that_dies_leaves_nothing_behind(tmp_path: Path, point: str) -> None:
    async with running(tmp_path, max_running=1) as runtime:
        asked = await _preempted_at(runtime, point)
        engine_of(runtime).die()
        for gate in engine_of(runtime).gates:
            gate.open()
        if point == "waiting":
            runtime.turns.leave(next(iter(runtime.turns._held)))
        with pytest.raises(EngineDied):
            await asked
        await until(lambda: not runtime._live)


@pytest.mark.parametrize("point", POINTS)
async def test_a_stop_leaves_nothing_behind(tmp_path: Path, point: str) -> None:
    async with running(tmp_path, max_running=1) as runtime:
        asked = await _preempted_at(runtime, point)
        drained = asyncio.ensure_future(runtime.drain(0))
        await asyncio.sleep(0.01)
        for gate in engine_of(runtime).gates:
            gate.open()
        await drained
        await asyncio.wait({asked})
        refused = asked.exception()
        assert isinstance(refused, Overloaded) if refused else isinstance(asked.result()[-1], Finished)


async def test_completions_that_are_not_to_be_stored_are_computed_again(tmp_path: Path) -> None:
    async with running(tmp_path, store_completions=False) as runtime:
        engine = engine_of(runtime)
        engine.ending.shut()
        asked = asyncio.ensure_future(answer(runtime, request()))
        await until(lambda: engine.ending.waiting)
        await engine.preempt("r")
        await until(lambda: engine.parked)
        engine.ending.open()
        assert isinstance((await asked)[-1], Finished)
        assert runtime.store.lookup(NS, PROMPT + WORD).tokens == len(PROMPT)


async def test_who_was_parked_when_the_engine_died_is_asked_again_and_blames_nobody(tmp_path: Path) -> None:
    async with running(tmp_path, max_running=1) as runtime:
        engine = engine_of(runtime)
        engine.decoding.shut()
        asked = asyncio.ensure_future(answer(runtime, request()))
        await until(lambda: engine.decoding.waiting)
        engine.parking.shut()
        await engine.preempt("r")
        await until(lambda: engine.parking.waiting)
        other = asyncio.ensure_future(answer(runtime, request("other", prompt(2, 40), ns=OTHER)))
        await until(lambda: runtime.waiting)
        runtime.turns.charge(runtime._live["r"].turn, 1000)
        engine.parking.open()
        await until(lambda: engine.decoding.waiting and runtime.waiting)
        engine.die()
        await until(lambda: runtime.totals.requeued)
        engine.decoding.open()
        assert isinstance((await asked)[-1], Finished)
        assert isinstance((await other)[-1], Finished)
        assert engine.generation == 2
        await until(lambda: not runtime._quarantine._crashes)  # both were answered
