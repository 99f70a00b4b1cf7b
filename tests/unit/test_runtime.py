"""The request path with a real store and an engine that waits for the test: slots, queue, quarantine, learning, drain."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from appliance.errors import EngineDied, EngineError, Overloaded, RequestError
from appliance.kv.store import TieredStore
from appliance.plan.line import Line
from appliance.prefetch import prefetch
from appliance.runtime import Chunk, Finished
from appliance.types import Tier
from tests.support.kv import LAYOUT, NS, faulty, fill, prompt
from tests.support.stub_runtime import PROMPT, answer, engine_of, request, running, until

pytestmark = pytest.mark.asyncio


async def test_an_answer_is_complete_before_its_blocks_are_stored(tmp_path: Path) -> None:
    async with running(tmp_path) as runtime:
        engine_of(runtime).exporting.shut()
        events = await answer(runtime, request())
        assert isinstance(events[-1], Finished)
        assert runtime.store.usage()[0].pending_blocks
        engine_of(runtime).exporting.open()
        await until(lambda: not runtime.store.usage()[0].pending_blocks)
        assert runtime.store.lookup(NS, PROMPT).tokens == len(PROMPT)


async def test_a_slot_is_free_only_after_the_engine_let_go_of_it(tmp_path: Path) -> None:
    """A request that fails while its prompt is being exported must not leave the engine writing into others' slots."""
    async with running(tmp_path) as runtime:
        engine = engine_of(runtime)
        engine.exporting.shut()
        engine.error_after_prefill = EngineError("no logits")
        freed: list[bool] = []
        abort = runtime.store.abort
        runtime.store.abort = lambda reserved: (freed.append(engine.exporting.waiting == 0), abort(reserved))[1]  # type: ignore[method-assign]
        with pytest.raises(EngineError, match="no logits"):
            await answer(runtime, request())
        await until(lambda: freed)
        assert freed == [True]
        assert not engine.known


async def test_a_prefetch_given_up_holds_its_slots_until_the_engine_has_read_them(tmp_path: Path) -> None:
    async with running(tmp_path) as runtime:
        await fill(runtime.store, PROMPT)
        await runtime.store.flush(5)
        engine = engine_of(runtime)
        engine.restoring.shut()
        steps = prefetch(runtime, NS, PROMPT, to=Tier.HBM, compute=False)
        await anext(steps)
        moving = asyncio.ensure_future(anext(steps))
        await until(lambda: engine.restoring.waiting)
        moving.cancel()
        await asyncio.wait({moving})
        assert runtime.store._dram._pinned > 0  # type: ignore[attr-defined]
        engine.restoring.open()
        await until(lambda: not engine.known)
        assert engine.used_slots


async def test_runs_are_on_their_way_into_cells_while_the_next_is_read(tmp_path: Path) -> None:
    tokens = prompt(1, 16 * 7)
    async with running(tmp_path, read_size=4096) as runtime:
        await fill(runtime.store, tokens)
        await runtime.store.flush(5)
        runtime.store.evict_dram()
        engine = engine_of(runtime)
        engine.restoring.shut()
        asked = asyncio.ensure_future(answer(runtime, request(tokens=tokens)))
        await until(lambda: engine.restoring.waiting > 1)
        engine.restoring.open()
        finished = (await asked)[-1]
        assert isinstance(finished, Finished)
        assert finished.loaded_bytes == 7 * LAYOUT.payload_bytes(16)


async def test_the_queue_has_a_bound_within_one_turn_of_the_loop(tmp_path: Path) -> None:
    async with running(tmp_path, max_running=1, max_queue=2) as runtime:
        engine_of(runtime).decoding.shut()
        asked = [asyncio.ensure_future(answer(runtime, request(f"r{n}"))) for n in range(8)]
        await until(lambda: sum(each.done() for each in asked) == 5)
        assert all(isinstance(each.exception(), Overloaded) for each in asked if each.done())
        engine_of(runtime).decoding.open()
        await until(lambda: all(each.done() for each in asked))


async def test_who_leaves_the_queue_makes_room_in_it(tmp_path: Path) -> None:
    async with running(tmp_path, max_running=1, max_queue=1) as runtime:
        engine_of(runtime).decoding.shut()
        first = asyncio.ensure_future(answer(runtime, request("first")))
        await until(lambda: runtime.running == 1)
        leaving = asyncio.ensure_future(answer(runtime, request("leaving")))
        await until(lambda: runtime.waiting == 1)
        leaving.cancel()
        await until(lambda: runtime.waiting == 0)
        second = asyncio.ensure_future(answer(runtime, request("second")))
        engine_of(runtime).decoding.open()
        assert await first
        assert await second


async def test_a_stop_tells_who_waits_for_cells_to_come_back(tmp_path: Path) -> None:
    async with running(tmp_path) as runtime:
        engine_of(runtime).admission.shut()
        asked = asyncio.ensure_future(answer(runtime, request()))
        await until(lambda: engine_of(runtime).admission.waiting)
        await runtime.drain(0)
        with pytest.raises(Overloaded) as refused:
            await asked
        assert refused.value.status == 503


async def test_a_text_that_crashes_the_engine_twice_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as runtime:
        engine_of(runtime).poison.add("poison")
        for _ in range(2):
            with pytest.raises(EngineDied):
                await runtime.tokenize("poison")
        with pytest.raises(RequestError) as refused:
            await runtime.tokenize("poison")
        assert refused.value.status == 422
        assert await runtime.tokenize("food")


async def test_a_request_the_engine_never_saw_is_not_to_blame(tmp_path: Path) -> None:
    async with running(tmp_path) as runtime:
        engine = engine_of(runtime)
        engine.pid = None

        async def dead(*_: object) -> int:
            raise EngineDied("the engine process did not come back")

        begin, engine.begin = engine.begin, dead  # type: ignore[method-assign]
        for _ in range(3):
            with pytest.raises(EngineDied):
                await answer(runtime, request())
        engine.begin, engine.pid = begin, 1  # type: ignore[method-assign]
        assert await answer(runtime, request())


async def test_a_medium_that_hangs_costs_the_storing_not_the_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.kv.patience.PATIENCE_S", 0.05)
    hung = asyncio.Event()
    async with running(tmp_path, write_behind=LAYOUT.payload_bytes(16)) as runtime:
        store = runtime.store
        assert isinstance(store, TieredStore)
        assert store._writer is not None

        async def hang(batch: object) -> str:
            await hung.wait()
            return "io"

        monkeypatch.setattr(store._writer, "_write", hang)
        for n in range(5):
            assert isinstance((await answer(runtime, request(f"r{n}", prompt(n, 40))))[-1], Finished)
        await until(lambda: not engine_of(runtime).known)
        assert store.counters()["store_busy_total"] > 0
        hung.set()


async def test_a_bug_is_logged_without_what_it_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with running(tmp_path) as runtime:
        engine_of(runtime).exporting.shut()
        engine_of(runtime).error_after_prefill = KeyError("a prompt's words")
        with caplog.at_level(logging.DEBUG), pytest.raises(EngineError, match="internal error"):
            await answer(runtime, request())
        assert "KeyError" in caplog.text
        assert "words" not in caplog.text


async def test_a_load_beside_others_teaches_what_loads_beside_others_take(tmp_path: Path) -> None:
    async with running(tmp_path) as runtime:
        tokens = prompt(1, 16 * 7)
        await fill(runtime.store, tokens)
        engine_of(runtime).decoding.shut()
        shared: list[bool] = []
        runtime.cost.saw_load = lambda *_, **how: shared.append(how["shared"])  # type: ignore[method-assign]
        asked = [asyncio.ensure_future(answer(runtime, request(f"r{n}", tokens))) for n in range(2)]
        await until(lambda: len(engine_of(runtime).used_slots) >= 14)
        engine_of(runtime).decoding.open()
        for each in asked:
            assert await each
        assert shared[-1]


async def test_the_back_on_its_way_to_an_engine_that_died_never_reaches_the_next(tmp_path: Path) -> None:
    tokens = prompt(1, 16 * 6 + 1)
    async with running(tmp_path) as runtime:
        await fill(runtime.store, tokens)
        await runtime.store.flush(5)
        runtime.store.evict_dram()
        runtime.cost.loads[Tier.NVME] = Line(0.01 / 64)  # to load all takes about as long as to compute it
        assert isinstance(runtime.store, TieredStore)
        medium, engine = faulty(runtime.store).hold("read"), engine_of(runtime)
        engine.fronts.shut()
        asked = asyncio.ensure_future(answer(runtime, request(tokens=tokens)))
        await until(lambda: engine.fronts.waiting and medium.reached.is_set())
        engine.die()
        await until(lambda: engine.fronts.waiting and engine.known)
        medium.open()
        await until(lambda: engine.used_slots)
        engine.fronts.open()
        end = (await asked)[-1]
        assert isinstance(end, Finished)
        assert end.decision.reason == "both"
        assert len(engine.used_slots) == 7 - end.decision.front_to // 16, "each block was restored once"


async def test_who_got_nothing_yet_is_asked_again_after_a_crash(tmp_path: Path) -> None:
    async with running(tmp_path) as runtime:
        engine = engine_of(runtime)
        engine.decoding.shut()
        asked = [asyncio.ensure_future(answer(runtime, request(f"r{n}", prompt(n, 40)))) for n in range(2)]
        await until(lambda: engine.decoding.waiting == 2)
        engine.die()
        await until(lambda: runtime.totals.requeued == 2)
        engine.decoding.open()
        for each in asked:
            assert isinstance((await each)[-1], Finished)
        assert set(engine.alone) >= {"r0", "r1"}, "suspects run alone"
        assert runtime.totals.requests == 2


async def test_who_got_a_part_is_told_and_who_waits_for_all_of_it_is_not(tmp_path: Path) -> None:
    async with running(tmp_path) as runtime:
        engine = engine_of(runtime)
        engine.ending.shut()
        streaming = runtime.generate(request("stream", prompt(1, 40)))
        whole = asyncio.ensure_future(answer(runtime, replace(request("whole", prompt(2, 40)), in_pieces=False)))
        assert isinstance(await anext(streaming), Chunk)
        await until(lambda: engine.ending.waiting == 2)
        engine.die()
        with pytest.raises(EngineDied):
            await anext(streaming)
        engine.ending.open()
        assert [type(event) for event in await whole] == [Chunk, Finished]


async def test_a_poison_request_is_condemned_and_no_other(tmp_path: Path) -> None:
    async with running(tmp_path, max_running=8, max_queue=8) as runtime:
        engine = engine_of(runtime)
        poison = prompt(99, 40)
        engine.poison.add(poison)
        engine.decoding.shut()
        good = [asyncio.ensure_future(answer(runtime, request(f"r{n}", prompt(n, 40)))) for n in range(6)]
        bad = asyncio.ensure_future(answer(runtime, request("poison", poison)))
        await until(lambda: engine.generation == 2)
        engine.decoding.open()
        for each in good:
            assert isinstance((await each)[-1], Finished)
        with pytest.raises(RequestError) as refused:
            await bad
        assert refused.value.status == 422
        assert engine.generation == 3
        with pytest.raises(RequestError):
            await answer(runtime, request("again", poison))
        assert engine.generation == 3, "the engine does not see it again"


async def test_a_poison_grammar_condemns_itself_and_not_its_prompt(tmp_path: Path) -> None:
    async with running(tmp_path) as runtime:
        engine = engine_of(runtime)
        engine.poison.add("root ::= poison")
        good, bad = (replace(request().sampling, grammar=f"root ::= {word}") for word in ("good", "poison"))
        with pytest.raises(RequestError) as refused:
            await answer(runtime, replace(request("bad"), sampling=bad))
        assert (refused.value.status, engine.generation) == (422, 3)
        for name, sampling in (("plain", request().sampling), ("good", good)):
            assert isinstance((await answer(runtime, replace(request(name), sampling=sampling)))[-1], Finished)
        with pytest.raises(RequestError):
            await answer(runtime, replace(request("again"), sampling=replace(bad, seed=5)))
        assert engine.generation == 3, "the engine does not see it again"


async def test_a_suspect_that_is_answered_is_none_any_more(tmp_path: Path) -> None:
    async with running(tmp_path) as runtime:
        engine = engine_of(runtime)
        for _ in range(3):
            engine.decoding.shut()
            asked = asyncio.ensure_future(answer(runtime, request()))
            await until(lambda: engine.decoding.waiting)
            engine.die()
            engine.decoding.open()
            assert isinstance((await asked)[-1], Finished)


async def test_a_request_put_back_after_a_crash_can_be_given_up(tmp_path: Path) -> None:
    async with running(tmp_path, max_running=1) as runtime:
        engine = engine_of(runtime)
        engine.decoding.shut()
        first = asyncio.ensure_future(answer(runtime, request("first")))
        await until(lambda: engine.decoding.waiting)
        engine.admission.shut()
        engine.die()
        await until(lambda: engine.admission.waiting)
        first.cancel()
        await until(lambda: not runtime.running and not engine.known)
