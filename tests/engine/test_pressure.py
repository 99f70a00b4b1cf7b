"""More work than cells and time: who is computed first, who makes room, what is computed once, and what waits aside."""

from __future__ import annotations

import pytest

from appliance.engine.batch import OVERTAKEN
from appliance.engine.client import Preempted, Prefilled
from appliance.engine.pace import LEAST_TOKENS, STEP_S, Pace
from appliance.errors import EngineError, RestoreError
from appliance.types import Tokens
from tests.support.engines import NULL_BLOCK, prompt
from tests.support.scheduling import Bench, reference

BLOCK = NULL_BLOCK


def preemptions(bench: Bench, request: str) -> int:
    return sum(isinstance(event, Preempted) for event in bench.events[request])


def computed(bench: Bench, request: str) -> int:
    return sum(event.prefill_tokens for event in bench.events[request] if isinstance(event, Prefilled))


# --- order of prompts -----------------------------------------------------------------------------------------------


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    bench = Bench(batch_tokens=16)
    bench.start("long", prompt(400), 1)
    bench.step()
    bench.start("short", prompt(10, 1), 1)
    for _ in range(2):
        bench.step()
    assert bench.tokens("short") == reference(prompt(10, 1), 1)
    assert not bench.tokens("long")
    bench.settle()
    assert bench.tokens("long") == reference(prompt(400), 1)


def test_the_oldest_prompt_gets_its_share_however_many_short_ones_come() -> None:
    bench = Bench(batch_tokens=16, max_sequences=64)
    bench.start("long", prompt(160), 1)
    for n in range(1, 200):
        bench.start(str(n), prompt(17, n), 1)
        bench.step()
        bench.release(str(n - 1))
        if bench.tokens("long"):
            break
    assert bench.tokens("long") == reference(prompt(160), 1)
    assert len(bench.engine.batches) <= (OVERTAKEN + 1) * (160 // 16 + 1) + 1


def test_a_prefix_that_two_requests_lack_is_computed_once() -> None:
    bench = Bench(batch_tokens=64)
    shared = prompt(300)
    bench.start("a", shared + prompt(10, 1), 2)
    bench.start("b", shared + prompt(12, 2), 2)
    bench.settle()
    assert computed(bench, "a") + computed(bench, "b") == len(shared) + 10 + 12
    for name, tail in (("a", prompt(10, 1)), ("b", prompt(12, 2))):
        assert bench.tokens(name) == reference(shared + tail, 2)


def test_the_second_waits_for_the_blocks_and_not_for_the_whole_request() -> None:
    bench = Bench(batch_tokens=64)
    bench.start("a", prompt(100), 50)
    bench.start("b", prompt(100) + prompt(5, 1), 2)
    while not bench.tokens("b"):
        bench.step()
    assert bench.end("a") is None


def test_what_another_request_holds_is_adopted_and_not_copied() -> None:
    bench = Bench()
    blocks = bench.stored(prompt(4 * BLOCK))
    bench.begin("a", prompt(4 * BLOCK))
    bench.begin("b", prompt(4 * BLOCK))
    bench.done(bench.scheduler.restore("a", 0, blocks))
    for slot, _, _ in blocks[:-1]:  # of the last one a token is computed in any case
        bench.slots[slot][:] = bytes(len(bench.slots[slot]))  # a copy of these would be a wrong answer
    assert bench.done(bench.scheduler.restore("b", 0, blocks)) >= 4 * BLOCK - 1
    bench.run("b", 4)
    bench.settle()
    assert bench.tokens("b") == reference(prompt(4 * BLOCK), 4)


def test_rows_are_computed_in_the_calls_that_the_engine_asks_for() -> None:
    bench = Bench(batch_tokens=64)
    bench.engine.groups = lambda rows: [[i] for i in reversed(range(len(rows)))]  # type: ignore[method-assign]
    for seed in range(3):
        bench.start(str(seed), prompt(20, seed), 6)
    bench.settle()
    assert all(len(batch) == 1 for batch in bench.engine.batches)
    for seed in range(3):
        assert bench.tokens(str(seed)) == reference(prompt(20, seed), 6)


# --- cells ----------------------------------------------------------------------------------------------------------


def test_more_answers_run_than_would_fit_at_their_longest_and_all_are_the_undisturbed_ones() -> None:
    bench = Bench(context_tokens=64, growth_tokens=4, batch_tokens=16)
    names = ["old", "young"]
    for seed, name in enumerate(names):
        bench.start(name, prompt(20, seed), 30)
    bench.settle()
    assert bench.roster.stats().preemptions == 1
    assert (preemptions(bench, "old"), preemptions(bench, "young")) == (0, 1)
    bench.done(bench.scheduler.park("young"))
    assert bench.end("old"), "the oldest goes on as soon as there is room"
    bench.release("old")
    bench.done(bench.scheduler.restore("young", 0, ()))
    bench.run("young", 30)
    bench.settle()
    for seed, name in enumerate(names):
        assert bench.tokens(name) == reference(prompt(20, seed), 30)


def test_a_stream_that_lacks_cells_makes_room_by_eviction_before_anybody_is_preempted() -> None:
    bench = Bench(context_tokens=64, growth_tokens=4, batch_tokens=16)
    bench.start("before", prompt(20, 9), 1)
    bench.settle()
    bench.release("before")
    bench.start("r", prompt(20), 40)
    bench.settle()
    assert bench.tokens("r") == reference(prompt(20), 40)
    assert bench.roster.stats().preemptions == 0


@pytest.mark.parametrize("n_streams", [2, 3])
def test_exports_that_hold_cells_which_a_stream_waits_for_do_not_rest(n_streams: int) -> None:
    bench = Bench(context_tokens=32 * n_streams, growth_tokens=4, batch_tokens=16)
    bench.roster.transfers.resting = lambda: True  # type: ignore[method-assign]
    for seed in range(n_streams):
        bench.start(str(seed), prompt(20, seed), 30)
    young = str(n_streams - 1)
    while not preemptions(bench, young):
        bench.step()
    reply = bench.scheduler.export(young, [(0, BLOCK, 0)])
    for _ in range(3):
        bench.step()
    reply.result(timeout=0)


def test_an_embedding_that_holds_cells_which_all_streams_wait_for_is_computed() -> None:
    bench = Bench(context_tokens=64, growth_tokens=4, batch_tokens=32)
    bench.pace.prompt_tokens = lambda n_decoding, n_prompts: 0 if n_decoding else 16  # type: ignore[method-assign]
    bench.start("r", prompt(20), 40)
    bench.begin("e", prompt(30, 1), 0, ns=b"e")
    bench.scheduler.restore("e", 0, ())
    while not bench.tokens("r"):
        bench.step()
    reply = bench.scheduler.embed("e")
    bench.settle()
    reply.result(timeout=0)
    bench.release("e")
    bench.settle()
    assert bench.tokens("r") == reference(prompt(20), 40)


def test_cells_that_a_stream_waits_for_are_not_given_to_who_comes_later() -> None:
    bench = Bench(context_tokens=64, growth_tokens=4, batch_tokens=16)
    for seed, name in enumerate(("old", "young")):
        bench.start(name, prompt(20, seed), 30)
    bench.settle()
    assert preemptions(bench, "young") == 1
    bench.scheduler.park("young")
    bench.start("later", prompt(64 - bench.roster.known("old").present - 2, 2), 2)
    bench.settle()
    assert bench.end("old"), "it went on at once"
    assert bench.roster.stats().preemptions == 1
    bench.release("old")
    bench.settle()
    assert bench.end("later")


def test_pins_of_those_who_wait_are_in_nobodys_way() -> None:
    bench = Bench(context_tokens=64, growth_tokens=4, batch_tokens=16)
    bench.start("before", prompt(30, 9), 1)
    bench.settle()
    bench.release("before")
    bench.settle()
    assert bench.begin("waits", prompt(30, 9) + prompt(5, 8), 8) == 30
    bench.start("r", prompt(20), 40)
    bench.settle()
    assert bench.tokens("r") == reference(prompt(20), 40)


def test_the_owner_that_holds_most_loses_cells_first() -> None:
    bench = Bench(context_tokens=100, batch_tokens=64)
    for name, owner, seed in (("small", b"one", 0), ("big1", b"two", 1), ("big2", b"two", 2)):
        bench.begin(name, prompt(25, seed), 1, ns=owner, owner=owner)
        bench.run(name, 1)
        bench.settle()
        bench.release(name)
    bench.settle()
    for seed in (3, 4, 5):
        bench.begin(str(seed), prompt(25, seed), 1, ns=b"two", owner=b"two")
        bench.run(str(seed), 1)
        bench.settle()
        bench.release(str(seed))
    bench.settle()
    assert bench.roster.resident(b"one", prompt(25, 0)) == 25, "the oldest of all, and of the owner that holds least"
    assert bench.roster.resident(b"two", prompt(25, 1)) == 0


# --- both ends ------------------------------------------------------------------------------------------------------


def both_ends(bench: Bench, tokens: Tokens, split: int) -> None:
    blocks = bench.stored(tokens)
    bench.begin("r", tokens)
    front = bench.scheduler.prefill("r", split * BLOCK)
    back = bench.scheduler.restore("r", split * BLOCK, blocks[split:])
    bench.settle()
    back.result(timeout=0)
    assert front.result(timeout=0) >= len(tokens) - 1


@pytest.mark.parametrize("split", [1, 3, 7])
def test_the_front_is_computed_while_the_back_is_put_aside(split: int) -> None:
    bench = Bench(batch_tokens=16)
    tokens = prompt(8 * BLOCK + 5)
    both_ends(bench, tokens, split)
    bench.run("r", 6)
    bench.settle()
    assert bench.tokens("r") == reference(tokens, 6)
    assert computed(bench, "r") == split * BLOCK + 1, "the front and the last token"


def test_what_is_aside_is_not_computed_as_well() -> None:
    bench = Bench(context_tokens=6 * BLOCK, batch_tokens=64)
    tokens = prompt(6 * BLOCK - 1)
    blocks = bench.stored(tokens)
    bench.begin("r", tokens, 1)
    bench.scheduler.prefill("r", BLOCK)
    back = bench.scheduler.restore("r", 2 * BLOCK, blocks[2:])
    bench.settle()
    back.result(timeout=0)
    bench.run("r", 1)
    bench.settle()
    assert bench.tokens("r") == reference(tokens, 1)
    assert computed(bench, "r") == 2 * BLOCK + 1


def test_blocks_that_come_after_the_front_was_computed_continue_it() -> None:
    bench = Bench(batch_tokens=64)
    tokens = prompt(6 * BLOCK)
    blocks = bench.stored(tokens)
    bench.begin("r", tokens)
    front = bench.scheduler.prefill("r", 2 * BLOCK)
    bench.done(bench.scheduler.restore("r", 2 * BLOCK, blocks[2:4]))
    assert front.result(timeout=0) == 4 * BLOCK
    bench.done(bench.scheduler.restore("r", 4 * BLOCK, blocks[4:]))
    bench.run("r", 4)
    bench.settle()
    assert bench.tokens("r") == reference(tokens, 4)


def test_blocks_aside_are_dropped_with_their_request() -> None:
    bench = Bench(batch_tokens=16)
    tokens = prompt(8 * BLOCK)
    blocks = bench.stored(tokens)
    bench.begin("r", tokens)
    front = bench.scheduler.prefill("r", 6 * BLOCK)
    back = bench.scheduler.restore("r", 6 * BLOCK, blocks[6:])
    while not back.done():
        bench.step()
    bench.scheduler.cancel("r")
    bench.settle()
    with pytest.raises(EngineError, match="cancelled"):
        front.result(timeout=0)
    bench.release("r")
    bench.done(bench.scheduler.evict())
    assert bench.engine.free_cells == bench.engine.info.context_tokens


def test_blocks_aside_go_with_a_request_that_had_ended_before() -> None:
    bench = Bench()
    bench.begin("r", prompt(4 * BLOCK))
    bench.done(bench.scheduler.restore("r", 0, ()))
    request = bench.roster.known("r")
    bench.roster.cells.place_aside(request, 2 * BLOCK, 3 * BLOCK, lambda seq: None)
    request.end()
    bench.release("r")
    bench.scheduler.step()
    assert bench.roster.stats().cells_used == 0


def test_a_request_that_is_run_before_its_front_was_answered_has_one_row_in_a_batch() -> None:
    bench = Bench(batch_tokens=64)
    tokens = prompt(2 * BLOCK + 1)
    blocks = bench.stored(tokens)
    bench.begin("r", tokens)
    bench.scheduler.restore("r", 0, blocks[:2])
    front = bench.scheduler.prefill("r", 2 * BLOCK)
    bench.run("r", 4)
    bench.settle()
    assert front.result(timeout=0) >= 2 * BLOCK
    assert bench.tokens("r") == reference(tokens, 4)


def test_a_front_that_cannot_be_computed_leaves_a_request_that_can_be_run() -> None:
    bench = Bench(batch_tokens=16)
    tokens = prompt(4 * BLOCK)
    bench.begin("r", tokens)
    bench.engine.refuses = lambda row: True
    front = bench.scheduler.prefill("r", 2 * BLOCK)
    bench.settle()
    assert isinstance(front.exception(timeout=0), EngineError)
    bench.engine.refuses = lambda row: False
    bench.run("r", 4)
    bench.settle()
    assert bench.tokens("r") == reference(tokens, 4)


def test_blocks_that_do_not_continue_what_is_there_or_comes_are_refused() -> None:
    bench = Bench(batch_tokens=16)
    tokens = prompt(6 * BLOCK)
    blocks = bench.stored(tokens)
    bench.begin("r", tokens)
    too_far = bench.scheduler.restore("r", 2 * BLOCK, blocks[2:])
    bench.settle()
    assert isinstance(too_far.exception(timeout=0), RestoreError)
    front = bench.scheduler.prefill("r", 3 * BLOCK)
    before_it = bench.scheduler.restore("r", 2 * BLOCK, blocks[2:3])
    bench.settle()
    assert isinstance(before_it.exception(timeout=0), RestoreError)
    assert front.result(timeout=0) == 3 * BLOCK


# --- pace -----------------------------------------------------------------------------------------------------------


def run_pace(pace: Pace, decode_s: float, chunk_s: float, steps: int) -> tuple[float, float]:
    """Seconds of decoding and of prompts in so many steps of one stream beside prompts without end."""
    decoding = prompts = 0.0
    for _ in range(steps):
        n = pace.prompt_tokens(1, 2)
        pace.saw(1, n, decode_s + (chunk_s if n else 0.0))
        decoding += decode_s
        prompts += chunk_s if n else 0.0
    return decoding, prompts


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("chunk_s", [0.02, 0.3, 2.0])
def test_prompts_have_their_share_of_the_time_beside_a_stream_and_no_more(share: float, chunk_s: float) -> None:
    decoding, prompts = run_pace(Pace(512, 64, share), 0.05, chunk_s, 2000)
    assert prompts / (decoding + prompts) == pytest.approx(min(share, chunk_s / (chunk_s + 0.05)), abs=0.05)


def test_without_a_bound_every_step_takes_a_chunk() -> None:
    pace = Pace(512, 64, 1.0)
    assert all(pace.prompt_tokens(1, 1) == 64 for _ in range(5) if not pace.saw(1, 64, 0.3))


def test_a_prompt_alone_is_computed_in_the_largest_chunks_and_several_in_shorter_steps() -> None:
    pace = Pace(512, 64, 0.3)
    pace.saw(0, 512, 4.0)
    assert pace.prompt_tokens(0, 1) == 512
    several = pace.prompt_tokens(0, 2)
    assert LEAST_TOKENS <= several < 512
    assert several * 4.0 / 512 <= STEP_S or several == LEAST_TOKENS


def test_a_batch_never_grows_beyond_its_size() -> None:
    assert Pace(64, 64, 1.0).prompt_tokens(60, 1) == 4
