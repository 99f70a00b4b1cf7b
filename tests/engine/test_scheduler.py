"""What the scheduler computes in each step, for whom it makes room, and how requests end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from appliance.engine.base import KVMode, Row
from appliance.engine.client import Computed, Done, Prefilled
from appliance.engine.request import Failed
from appliance.engine.transfer import SHARED_SLICE, SLICE_BLOCKS, Transfers
from appliance.errors import EngineError, RequestError, RestoreError
from appliance.types import FinishReason, Tokens
from tests.support.engines import NULL_BLOCK, export, prompt
from tests.support.scheduling import NS, SHARED_SLICE_BLOCKS, Bench, reference

BLOCK = NULL_BLOCK


def lengths(bench: Bench, since: int = 0) -> list[list[int]]:
    """Tokens of each row of each decode."""
    return [[len(row.tokens) for row in batch] for batch in bench.engine.batches[since:]]


def text_of(tokens: list[int]) -> str:
    return bytes(tokens).decode()


# --- what a step computes -------------------------------------------------------------------------------------------


def test_a_prompt_is_prefilled_in_chunks_and_its_last_token_alone() -> None:
    bench = Bench(batch_tokens=64)
    bench.start("r", prompt(150), 1)
    bench.settle()
    assert lengths(bench) == [[64], [64], [21], [1]]
    assert [row.want_logits for row in bench.rows()] == [False, False, False, True]
    assert Tokens(b"".join(row.tokens.data for row in bench.rows())) == prompt(150)


def test_prompts_share_a_batch_first_come_first_served() -> None:
    bench = Bench(batch_tokens=64)
    for seed in range(3):
        bench.start(str(seed), prompt(40, seed), 1)
    bench.settle()
    assert lengths(bench) == [[39, 25], [1, 14, 39], [1, 1]]
    assert [bench.tokens(str(seed)) for seed in range(3)] == [reference(prompt(40, seed), 1) for seed in range(3)]


def test_streams_decode_in_every_step_and_leave_prefill_a_small_budget() -> None:
    bench = Bench(batch_tokens=64, shared_batch_tokens=8)
    for seed in range(3):
        bench.start(str(seed), prompt(5, seed), 40)
    for _ in range(4):
        bench.step()
    since = len(bench.engine.batches)
    bench.start("long", prompt(100, 9), 4)
    while not bench.tokens("long"):
        bench.step()
    during = lengths(bench, since)
    assert during == [[1, 1, 1, 8]] * 12 + [[1, 1, 1, 3], [1, 1, 1, 1]]
    bench.settle()
    for seed in range(3):
        assert bench.tokens(str(seed)) == reference(prompt(5, seed), 40)
    assert bench.tokens("long") == reference(prompt(100, 9), 4)


def test_a_request_that_runs_adopts_what_another_has_computed_meanwhile() -> None:
    bench = Bench(batch_tokens=64)
    bench.start("a", prompt(100), 4)
    bench.start("b", prompt(100) + prompt(10, 1), 4)
    bench.settle()
    (prefilled,) = (event for event in bench.events["b"] if isinstance(event, Prefilled))
    assert prefilled.prefill_tokens < 50
    assert bench.tokens("b") == reference(prompt(100) + prompt(10, 1), 4)


def test_a_row_that_fails_fails_only_its_request() -> None:
    bench = Bench()
    for seed in range(3):
        bench.start(str(seed), prompt(10, seed), 8)
    bench.step()
    bad = bench.rows_of(prompt(10, 1))[0].seq
    bench.engine.refuses = lambda row: row.seq == bad
    bench.settle()
    assert isinstance(bench.end("1"), Failed)
    for seed in (0, 2):
        assert bench.tokens(str(seed)) == reference(prompt(10, seed), 8)
    assert bench.roster.stats().requests_running == 0
    bench.engine.refuses = lambda row: False
    bench.release("0", "1", "2")
    bench.start("again", prompt(10, 1), 8)
    bench.settle()
    assert bench.tokens("again") == reference(prompt(10, 1), 8)


def test_begin_and_stats_never_wait_for_a_decode() -> None:
    bench = Bench()
    bench.start("computes", prompt(30), 3)
    computing, proceed = threading.Event(), threading.Event()

    def slow(_row: Row) -> bool:
        computing.set()
        assert proceed.wait(60)
        return False

    bench.engine.refuses = slow
    with ThreadPoolExecutor(2) as threads:
        try:
            step = threads.submit(bench.settle)
            assert computing.wait(60)
            assert threads.submit(bench.begin, "other", prompt(30)).result(30) == 0
            assert threads.submit(bench.roster.stats).result(30).requests_running == 1
            cancelled = threads.submit(bench.scheduler.cancel, "computes").result(30)
            assert not cancelled.done(), "a command is taken between steps"
            assert not step.done()
        finally:
            proceed.set()
        step.result(60)
    cancelled.result(timeout=0)
    end = bench.end("computes")
    assert isinstance(end, Done)
    assert end.reason is FinishReason.CANCELLED


# --- sampling and ends ----------------------------------------------------------------------------------------------


def test_a_request_with_no_tokens_to_make_is_done_after_its_prompt() -> None:
    bench = Bench()
    bench.start("r", prompt(40), 0)
    bench.settle()
    assert [type(event) for event in bench.events["r"]] == [Prefilled, Done]
    end = bench.end("r")
    assert isinstance(end, Done)
    assert (end.reason, end.completion_tokens, end.kv_tokens) == (FinishReason.LENGTH, 0, 40)
    assert not any(row.want_logits for row in bench.rows())


@pytest.mark.parametrize("max_tokens", [1, 5])
def test_a_limit_ends_with_length(max_tokens: int) -> None:
    bench = Bench()
    bench.start("r", prompt(40), max_tokens)
    bench.settle()
    end = bench.end("r")
    assert isinstance(end, Done)
    assert (end.reason, end.completion_tokens) == (FinishReason.LENGTH, max_tokens)
    assert end.kv_tokens == 40 + max_tokens - 1, "the last token was never decoded"
    assert bench.tokens("r") == reference(prompt(40), max_tokens)
    assert bench.text("r") == text_of(bench.tokens("r"))


def test_what_was_reserved_is_a_limit_too() -> None:
    bench = Bench()
    bench.begin("r", prompt(40), reserve_tokens=3)
    bench.run("r", 1000)
    bench.settle()
    end = bench.end("r")
    assert isinstance(end, Done)
    assert end.kv_tokens == 43


@pytest.mark.parametrize("at", [0, 3, 6])
def test_a_stop_string_across_tokens_ends_before_it(at: int) -> None:
    full = text_of(reference(prompt(40), 20))
    stop = full[at : at + 3]
    bench = Bench()
    bench.start("r", prompt(40), 20, stop=("not there", stop))
    bench.settle()
    end = bench.end("r")
    assert isinstance(end, Done)
    assert end.reason is FinishReason.STOP
    assert bench.text("r") == full[: full.index(stop)]
    assert end.completion_tokens == full.index(stop) + 3


def test_text_held_back_for_a_stop_string_comes_with_the_last_token() -> None:
    full = text_of(reference(prompt(40), 6))
    bench = Bench()
    bench.start("r", prompt(40), 6, stop=(full[-2:] + "never",))
    bench.settle()
    assert bench.text("r") == full


@pytest.mark.parametrize("ignore", [False, True])
def test_the_end_token_ends_without_being_told(ignore: bool) -> None:
    end_token = 256
    bench = Bench()
    bench.start("r", prompt(40), 6, logit_bias=((end_token, 1000.0),), ignore_eos=ignore)
    bench.settle()
    end = bench.end("r")
    assert isinstance(end, Done)
    assert end.reason is (FinishReason.LENGTH if ignore else FinishReason.STOP)
    assert len(bench.tokens("r")) == end.completion_tokens == (6 if ignore else 0)


def test_a_sampler_that_cannot_be_made_fails_its_request() -> None:
    bench = Bench()
    bench.start("bad", prompt(10), 4, logit_bias=((10**6, 1.0),))
    bench.start("good", prompt(10, 1), 4)
    bench.settle()
    assert isinstance(bench.end("bad"), Failed)
    assert bench.tokens("good") == reference(prompt(10, 1), 4)


# --- admission ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "reserve_tokens", "code"),
    [
        (Tokens(), 1, None),
        (Tokens.of([65, 262]), 1, None),
        (prompt(120), 9, "context_length_exceeded"),
        (prompt(129), 0, "context_length_exceeded"),
    ],
)
def test_a_prompt_that_can_never_run_is_refused_at_begin(tokens: Tokens, reserve_tokens: int, code: str | None) -> None:
    bench = Bench(context_tokens=128)
    with pytest.raises(RequestError) as caught:
        bench.begin("r", tokens, reserve_tokens)
    assert (caught.value.param, caught.value.code) == ("prompt", code)
    bench.begin("r", prompt(120), 8)
    with pytest.raises(EngineError):
        bench.begin("r", prompt(5))


def test_admission_is_first_come_first_served_also_when_a_later_one_would_fit() -> None:
    bench = Bench(context_tokens=100)
    bench.start("a", prompt(60, 1), 10)
    bench.start("big", prompt(50, 2), 10)
    bench.start("small", prompt(5, 3), 5)
    bench.settle()
    assert bench.end("a")
    assert not bench.events["big"]
    assert not bench.events["small"]
    assert bench.roster.stats().requests_waiting == 2
    bench.release("a")
    bench.settle()
    assert bench.tokens("big") == reference(prompt(50, 2), 10)
    assert bench.tokens("small") == reference(prompt(5, 3), 5)


def test_released_sequences_make_room_and_the_one_in_use_stays() -> None:
    bench = Bench(context_tokens=100)
    for seed in range(3):
        bench.start(str(seed), prompt(30, seed), 1)
        bench.settle()
        bench.release(str(seed))
        bench.settle()
    assert bench.begin("again", prompt(30, 0) + prompt(5, 9), 1) == 30  # the oldest, now pinned
    bench.start("new", prompt(40, 7), 1)
    bench.settle()
    assert bench.roster.stats().resident_evictions >= 1
    bench.run("again", 1)
    bench.settle()
    (prefilled,) = (event for event in bench.events["again"] if isinstance(event, Prefilled))
    assert prefilled.prefill_tokens == 5


@pytest.mark.parametrize("max_sequences", [2, 4])
def test_pins_of_waiting_requests_give_way_when_nothing_else_can(max_sequences: int) -> None:
    bench = Bench(context_tokens=100, max_sequences=max_sequences)
    bench.start("first", prompt(90), 1)
    bench.settle()
    bench.release("first")
    bench.settle()
    assert bench.begin("pins", prompt(90), 5) == 90
    bench.start("other", prompt(60, 5), 5)
    bench.settle()
    assert bench.tokens("other") == reference(prompt(60, 5), 5)
    bench.release("other")
    bench.run("pins", 5)
    bench.settle()
    assert bench.tokens("pins") == reference(prompt(90), 5)


def test_a_request_gives_up_its_own_pin_when_that_is_in_its_way() -> None:
    bench = Bench(max_sequences=2)  # one besides the scratch sequence
    for request in ("first", "second"):
        bench.start(request, prompt(40) + prompt(5, len(request)), 3)
        bench.settle()
        assert bench.tokens(request) == reference(prompt(40) + prompt(5, len(request)), 3)
        bench.release(request)


def test_namespaces_share_nothing() -> None:
    bench = Bench()
    bench.start("r", prompt(40), 1)
    bench.settle()
    bench.release("r")
    bench.settle()
    assert bench.begin("same", prompt(40)) == 40
    assert bench.begin("other", prompt(40), ns=b"another") == 0


def test_a_state_that_cannot_be_sliced_is_never_shared() -> None:
    bench = Bench(kv_mode=KVMode.NONE)
    for request in ("first", "second"):
        assert bench.begin(request, prompt(40)) == 0
        bench.run(request, 5)
        bench.settle()
        assert bench.tokens(request) == reference(prompt(40), 5)
        bench.release(request)
        bench.settle()
        assert bench.roster.stats().cells_used == 0


# --- restore and export ---------------------------------------------------------------------------------------------


def test_an_empty_restore_waits_for_admission() -> None:
    bench = Bench(context_tokens=100)
    bench.start("a", prompt(60, 1), 10)
    bench.begin("b", prompt(60, 2), 10)
    admitted = bench.scheduler.restore("b", 0, ())
    bench.settle()
    assert not admitted.done()
    bench.release("a")
    assert bench.done(admitted) == 0


@pytest.mark.parametrize("n_tokens", [BLOCK, 5 * BLOCK, 5 * BLOCK + 3])
def test_a_restored_prompt_completes_as_computed(n_tokens: int) -> None:
    bench = Bench()
    tokens = prompt(n_tokens)
    bench.begin("r", tokens + prompt(7, 1), 8)
    assert bench.done(bench.scheduler.restore("r", 0, bench.stored(tokens))) == n_tokens
    bench.run("r", 8)
    bench.settle()
    assert bench.tokens("r") == reference(tokens + prompt(7, 1), 8)
    assert sum(len(row.tokens) for row in bench.rows()) == 7 + 7


def test_a_prompt_restored_whole_computes_only_its_last_token() -> None:
    bench = Bench()
    tokens = prompt(3 * BLOCK)
    bench.begin("r", tokens, 8)
    bench.done(bench.scheduler.restore("r", 0, bench.stored(tokens)))
    bench.run("r", 1)
    bench.settle()
    assert lengths(bench) == [[1]]
    assert bench.tokens("r") == reference(tokens, 1)


def test_a_resident_prefix_that_ends_inside_a_block_is_continued() -> None:
    bench = Bench()
    tokens = prompt(4 * BLOCK)
    bench.start("short", tokens[: BLOCK + 5], 0)
    bench.settle()
    bench.release("short")
    bench.settle()
    assert bench.begin("r", tokens, 8) == BLOCK + 5
    assert bench.done(bench.scheduler.restore("r", BLOCK, bench.stored(tokens)[1:])) == 4 * BLOCK
    bench.run("r", 8)
    bench.settle()
    assert bench.tokens("r") == reference(tokens, 8)


@pytest.mark.parametrize(
    ("step_s", "block_s", "blocks"), [(0, 1, SLICE_BLOCKS), (1, 0, 1), (1, 1, 1), (1, 0.01, 4), (1, 1e-6, SLICE_BLOCKS)]
)
def test_a_slice_beside_streams_takes_its_share_of_a_step(step_s: float, block_s: float, blocks: int) -> None:
    bench = Bench()
    transfers = Transfers(bench.engine, bench.roster.cells, lambda slot, nbytes: memoryview(b""), block_s=block_s)
    assert transfers.slice_blocks(step_s) == blocks
    assert blocks in (1, SLICE_BLOCKS) or blocks * block_s <= SHARED_SLICE * step_s


def test_restores_do_not_keep_streams_waiting() -> None:
    bench = Bench()
    bench.start("stream", prompt(5, 1), 100)
    while not bench.tokens("stream"):
        bench.step()
    tokens = prompt(20 * BLOCK)
    bench.begin("r", tokens, 8)
    restored = bench.scheduler.restore("r", 0, bench.stored(tokens))
    steps = 0
    while not restored.done():
        before = len(bench.tokens("stream"))
        bench.step()
        steps += 1
        assert len(bench.tokens("stream")) == before + 1
    assert steps == 20 // SHARED_SLICE_BLOCKS


@pytest.mark.parametrize(
    ("start", "blocks"),
    [
        (BLOCK, [(1000, BLOCK, BLOCK)]),  # a gap
        (-1, [(1000, BLOCK, BLOCK)]),
        (0, [(1000, BLOCK, BLOCK), (1001, BLOCK, BLOCK), (1002, BLOCK, BLOCK), (1003, BLOCK, BLOCK)]),  # too many
        (0, [(1000, BLOCK, 5), (1001, BLOCK, BLOCK)]),  # in part, and not the last
        (0, [(1000, BLOCK, 0)]),
        (0, [(1000, 5, BLOCK)]),
        (0, [(1000, BLOCK + 1, BLOCK)]),
        (0, [(1000, BLOCK, BLOCK), (-7, BLOCK, BLOCK)]),  # no such slot
        (0, [(1000, BLOCK, BLOCK), (1000, BLOCK, BLOCK)]),  # another place's block
    ],
)
def test_a_restore_that_cannot_be_leaves_the_request_as_it_was(start: int, blocks: list[tuple[int, int, int]]) -> None:
    bench = Bench()
    tokens = prompt(3 * BLOCK + 5)
    good = bench.stored(tokens)
    bench.begin("r", tokens, 8)
    bench.done(bench.scheduler.restore("r", 0, ()))
    with pytest.raises(RestoreError):
        bench.done(bench.scheduler.restore("r", start, blocks))
    assert bench.roster.stats().cells_used == 0
    assert bench.done(bench.scheduler.restore("r", 0, good)) == len(tokens)
    bench.run("r", 8)
    bench.settle()
    assert bench.tokens("r") == reference(tokens, 8)


def test_a_restore_that_fails_half_way_is_taken_back() -> None:
    bench = Bench()
    bench.start("stream", prompt(5, 1), 100)
    while not bench.tokens("stream"):
        bench.step()
    tokens = prompt(8 * BLOCK)
    blocks = bench.stored(tokens)
    bench.begin("r", tokens, 8)
    reply = bench.scheduler.restore("r", 0, [*blocks[:5], blocks[0], *blocks[6:]])
    bench.step()
    sequence = bench.roster.known("r").sequence
    assert sequence
    assert sequence.length == SHARED_SLICE_BLOCKS * BLOCK
    with pytest.raises(RestoreError):
        bench.done(reply)
    assert sequence.length == 0
    bench.run("r", 8)
    bench.settle()
    assert bench.tokens("r") == reference(tokens, 8)


def exported(bench: Bench, request: str, tokens: Tokens) -> list[bytes]:
    """All of `tokens` in blocks, by one export."""
    starts = range(0, len(tokens), BLOCK)
    blocks = [(start, min(BLOCK, len(tokens) - start), i) for i, start in enumerate(starts)]
    bench.done(bench.scheduler.export(request, blocks))
    return [bytes(bench.slot(i, bench.engine.info.layout.payload_bytes(n))) for _, n, i in blocks]


def right(bench: Bench, tokens: Tokens) -> list[bytes]:
    layout = bench.engine.info.layout
    return [bytes(bench.slot(slot, layout.payload_bytes(n))) for slot, n, _ in bench.stored(tokens, first_slot=5000)]


@pytest.mark.parametrize("when", ["running", "finished", "cancelled"])
def test_what_is_in_cells_can_be_exported_until_release(when: str) -> None:
    bench = Bench()
    tokens = prompt(3 * BLOCK + 5)
    bench.start("r", tokens, 200)
    while len(bench.tokens("r")) < 3:
        bench.step()
    if when == "cancelled":
        bench.scheduler.cancel("r")
    if when == "finished":
        bench.settle()
    assert exported(bench, "r", tokens) == right(bench, tokens)
    whole = tokens + Tokens.of(bench.tokens("r"))
    end = bench.end("r")
    assert isinstance(end, Done)
    assert exported(bench, "r", whole[: end.kv_tokens]) == right(bench, whole[: end.kv_tokens])
    with pytest.raises(EngineError):
        bench.done(bench.scheduler.export("r", [(end.kv_tokens - 1, 2, 0)]))
    bench.release("r")
    with pytest.raises(EngineError):
        bench.done(bench.scheduler.export("r", [(0, BLOCK, 0)]))


def test_exports_beside_streams_rest_in_between() -> None:
    bench = Bench()
    tokens = prompt(10 * BLOCK)
    bench.start("r", tokens, 100)
    while not bench.tokens("r"):
        bench.step()
    resting = [True, True, False, True]
    bench.roster.transfers.resting = lambda: resting.pop(0)  # type: ignore[method-assign]
    bench.scheduler.export("r", [(i * BLOCK, BLOCK, i) for i in range(10)])
    exported = []
    for _ in range(4):
        bench.step()
        exported.append(len(bench.slots))
    assert exported == [0, 0, SHARED_SLICE_BLOCKS, SHARED_SLICE_BLOCKS]
    assert Transfers(bench.engine, bench.roster.cells, lambda slot, nbytes: memoryview(b"")).resting() is False


def test_exports_go_on_beside_streams_a_slice_at_a_time() -> None:
    bench = Bench()
    tokens = prompt(10 * BLOCK)
    bench.start("r", tokens, 100)
    while not bench.tokens("r"):
        bench.step()
    reply = bench.scheduler.export("r", [(i * BLOCK, BLOCK, i) for i in range(10)])
    for i in range(1, 5):
        bench.step()
        assert len(bench.slots) == i * SHARED_SLICE_BLOCKS
        assert len(bench.tokens("r")) == 1 + i
    bench.step()
    reply.result(timeout=0)


# --- cancel, release, evict -----------------------------------------------------------------------------------------


def queued(bench: Bench) -> None:
    bench.start("before", prompt(900, 1), 100)
    bench.start("r", prompt(100), 50)
    bench.step()
    assert bench.roster.stats().requests_waiting == 1


def restoring(bench: Bench) -> None:
    bench.start("stream", prompt(5, 1), 100)
    while not bench.tokens("stream"):
        bench.step()
    bench.begin("r", prompt(10 * BLOCK), 50)
    bench.scheduler.restore("r", 0, bench.stored(prompt(10 * BLOCK)))
    bench.run("r", 50)
    bench.step()
    assert 0 < bench.roster.known("r").sequence.length < 10 * BLOCK  # type: ignore[union-attr]


def prefilling(bench: Bench) -> None:
    bench.start("r", prompt(300), 50)
    bench.step()
    assert all(isinstance(event, Computed) for event in bench.events["r"])


def decoding(bench: Bench) -> None:
    bench.start("r", prompt(100), 50)
    while not bench.tokens("r"):
        bench.step()


def exporting(bench: Bench) -> None:
    decoding(bench)
    bench.scheduler.export("r", [(i * BLOCK, BLOCK, i) for i in range(6)])
    bench.step()


@pytest.mark.parametrize("stage", [queued, restoring, prefilling, decoding, exporting])
@pytest.mark.parametrize("how", ["cancel", "release"])
def test_a_request_can_be_given_up_at_any_stage(stage: Callable[[Bench], None], how: str) -> None:
    bench = Bench()
    stage(bench)
    getattr(bench.scheduler, how)("r")
    bench.step()
    end = bench.end("r")
    assert isinstance(end, Done)
    assert end.reason is FinishReason.CANCELLED
    bench.settle()
    bench.release("r", "before", "stream")
    bench.settle()
    stats = bench.roster.stats()
    assert (stats.requests_running, stats.requests_waiting, stats.cells_pinned) == (0, 0, 0)
    bench.done(bench.scheduler.evict())
    assert bench.roster.stats().cells_used == 0


def test_a_cancelled_export_goes_on_and_a_released_one_is_refused() -> None:
    for how, fails in (("cancel", False), ("release", True)):
        bench = Bench()
        decoding(bench)
        reply = bench.scheduler.export("r", [(i * BLOCK, BLOCK, i) for i in range(6)])
        bench.step()
        getattr(bench.scheduler, how)("r")
        bench.settle()
        assert isinstance(reply.exception(timeout=0), EngineError) is fails


def test_a_request_cancelled_before_it_runs_ends_when_it_is_run() -> None:
    bench = Bench()
    bench.begin("r", prompt(10))
    bench.scheduler.cancel("r")
    bench.settle()
    with pytest.raises(RestoreError):
        bench.done(bench.scheduler.restore("r", 0, ()))
    assert not bench.events["r"]
    bench.run("r", 5)
    bench.settle()
    end = bench.end("r")
    assert isinstance(end, Done)
    assert (end.reason, end.kv_tokens) == (FinishReason.CANCELLED, 0)


def test_a_request_runs_once_and_an_unknown_one_never() -> None:
    bench = Bench()
    bench.start("r", prompt(10), 3)
    for request in ("r", "unknown"):
        with pytest.raises(EngineError):
            bench.done(bench.scheduler.run_request(request, bench.roster.known("r").sampling))  # type: ignore[arg-type]
    with pytest.raises(EngineError):
        bench.done(bench.scheduler.restore("unknown", 0, ()))
    bench.done(bench.scheduler.cancel("unknown"))
    bench.done(bench.scheduler.release("unknown"))
    assert bench.tokens("r") == reference(prompt(10), 3)


def test_eviction_spares_what_requests_hold() -> None:
    bench = Bench()
    for seed in range(3):
        bench.start(str(seed), prompt(50, seed), 3)
    bench.settle()
    bench.release("0")
    bench.begin("pins", prompt(30) + prompt(9, 9))  # 30 of the 52 that "0" left
    assert bench.done(bench.scheduler.evict()) == 22
    stats = bench.roster.stats()
    assert stats.cells_used == stats.cells_pinned == 30 + 2 * 52
    sequence = bench.roster.known("1").sequence
    assert sequence
    assert bytes(export(bench.engine, sequence.id, 0, [BLOCK])[0]) == right(bench, prompt(BLOCK, 1))[0]
    assert bench.begin("other", prompt(50, 1), ns=NS) == 50


def test_asking_what_is_resident_changes_nothing() -> None:
    bench = Bench()
    prompts = [prompt(3 * BLOCK, seed) for seed in range(3)]
    for n, tokens in enumerate(prompts):
        bench.start(f"r{n}", tokens, 1)
        bench.settle()
        bench.release(f"r{n}")
        bench.settle()
    order = list(bench.roster.cells.residency._released)
    assert bench.roster.resident(NS, prompts[0]) == len(prompts[0])
    assert bench.roster.resident(NS, prompts[0][: BLOCK + 1]) == BLOCK + 1
    assert bench.roster.resident(b"another namespace", prompts[0]) == 0
    assert list(bench.roster.cells.residency._released) == order
    assert bench.roster.stats().cells_pinned == 0
