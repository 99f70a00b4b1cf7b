"""A request that is preempted, parked and run again: the same tokens, its cells given up meanwhile, one end."""

from __future__ import annotations

import pytest

from appliance.engine.client import Computed, Done, NewTokens, Preempted, Prefilled
from appliance.engine.scheduler import COMPUTED_BLOCKS
from appliance.errors import EngineError
from appliance.types import FinishReason, Tokens
from tests.support.engines import NULL_BLOCK, prompt
from tests.support.scheduling import Bench, reference

PROMPT = prompt(100)


def preempted_after(bench: Bench, n_tokens: int, *, max_tokens: int = 8) -> Preempted:
    """A request "r" that stopped when it had said so many tokens; with 0, in the middle of its prompt."""
    bench.start("r", PROMPT, max_tokens)
    while len(bench.tokens("r")) < n_tokens or not bench.engine.batches:
        bench.step()
    bench.scheduler.preempt("r")
    bench.settle()
    event = bench.events["r"][-1]
    assert isinstance(event, Preempted)
    return event


def go_on(bench: Bench, max_tokens: int = 8) -> None:
    bench.done(bench.scheduler.restore("r", 0, ()))
    bench.run("r", max_tokens)
    bench.settle()


@pytest.mark.parametrize("n_tokens", [0, 1, 5])
@pytest.mark.parametrize("evicted", [False, True])
def test_it_goes_on_where_it_stopped(n_tokens: int, evicted: bool) -> None:
    bench = Bench(batch_tokens=64)
    stopped = preempted_after(bench, n_tokens)
    assert stopped.kv_tokens == (len(PROMPT) + n_tokens - 1 if n_tokens else 64)
    bench.done(bench.scheduler.park("r"))
    assert bench.roster.stats().cells_pinned == 0
    if evicted:
        bench.done(bench.scheduler.evict())
    go_on(bench)
    assert bench.tokens("r") == reference(PROMPT, 8)
    assert sum(isinstance(event, Prefilled) for event in bench.events["r"]) == 1
    end = bench.end("r")
    assert isinstance(end, Done)
    assert (end.completion_tokens, end.reason) == (8, FinishReason.LENGTH)
    bench.release("r")
    bench.settle()
    assert bench.roster.stats().cells_pinned == 0


def test_it_can_be_preempted_again_and_again() -> None:
    bench = Bench(batch_tokens=64)
    preempted_after(bench, 1)
    for _ in range(3):
        bench.done(bench.scheduler.park("r"))
        bench.done(bench.scheduler.evict())
        bench.done(bench.scheduler.restore("r", 0, ()))
        said = len(bench.tokens("r"))
        bench.run("r")
        while len(bench.tokens("r")) == said:
            bench.step()
        bench.scheduler.preempt("r")
        bench.settle()
    bench.done(bench.scheduler.park("r"))
    go_on(bench)
    assert bench.tokens("r") == reference(PROMPT, 8)


def test_what_it_had_generated_is_restored_with_its_prompt() -> None:
    bench = Bench(batch_tokens=64)
    stopped = preempted_after(bench, 6)
    bench.done(bench.scheduler.park("r"))
    bench.done(bench.scheduler.evict())
    sequence = PROMPT + Tokens.of(bench.tokens("r"))
    blocks = bench.stored(sequence[: stopped.kv_tokens])
    bench.done(bench.scheduler.restore("r", 0, ()))
    assert bench.done(bench.scheduler.restore("r", 0, blocks)) == stopped.kv_tokens
    computed = len(list(bench.rows()))
    bench.run("r")
    bench.step()
    assert [len(row.tokens) for row in list(bench.rows())[computed:]] == [1]
    bench.settle()
    assert bench.tokens("r") == reference(PROMPT, 8)


def test_its_cells_are_another_ones_until_it_goes_on() -> None:
    bench = Bench(batch_tokens=64, context_tokens=150)
    preempted_after(bench, 2)
    bench.start("other", prompt(90, 5), 8)
    bench.settle()
    assert bench.end("other") is None, "it is held until it is parked"
    bench.done(bench.scheduler.park("r"))
    assert bench.end("other")
    waiting = bench.scheduler.restore("r", 0, ())
    bench.settle()
    assert not waiting.done()
    bench.release("other")
    bench.done(waiting)
    bench.run("r")
    bench.settle()
    assert bench.tokens("r") == reference(PROMPT, 8)


@pytest.mark.parametrize("parked", [False, True])
@pytest.mark.parametrize("how", ["cancel", "release"])
def test_it_can_be_given_up(parked: bool, how: str) -> None:
    bench = Bench(batch_tokens=64)
    preempted_after(bench, 2)
    if parked:
        bench.done(bench.scheduler.park("r"))
        bench.scheduler.restore("r", 0, ())
    bench.done(getattr(bench.scheduler, how)("r"))
    if how == "cancel":
        bench.run("r")
        bench.settle()
        end = bench.end("r")
        assert isinstance(end, Done)
        assert end.reason is FinishReason.CANCELLED
        bench.release("r")
    bench.settle()
    assert bench.roster.stats().cells_pinned == 0
    assert bench.tokens("r") == reference(PROMPT, 8)[:2]


def test_nothing_is_preempted_that_does_not_run_and_nothing_parked_that_was_not_preempted() -> None:
    bench = Bench(batch_tokens=64)
    bench.begin("r", PROMPT)
    bench.done(bench.scheduler.preempt("r"))
    bench.done(bench.scheduler.preempt("unknown"))
    assert not bench.events
    with pytest.raises(EngineError, match="preempted"):
        bench.done(bench.scheduler.park("r"))
    bench.run("r")
    bench.settle()
    bench.done(bench.scheduler.preempt("r"))
    assert bench.end("r"), "it had ended"


def test_a_long_prompt_tells_how_far_it_is() -> None:
    bench = Bench(batch_tokens=64, context_tokens=1024)
    tokens = prompt(NULL_BLOCK * COMPUTED_BLOCKS * 2 + 100)
    bench.start("r", tokens, 2)
    bench.settle()
    told = [event.tokens for event in bench.events["r"] if isinstance(event, Computed)]
    assert len(told) >= 2
    first = next(n for n, event in enumerate(bench.events["r"]) if isinstance(event, NewTokens))
    assert all(isinstance(event, (Computed, Prefilled)) for event in bench.events["r"][:first])
