"""Rows in the decode calls that take least time: which way pays when, and that nobody can tell by the result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.engine.base import Row
from appliance.engine.llamacpp.batching import TILE_ROWS, Costs, filling, groups
from appliance.engine.llamacpp.engine import LlamaCppEngine
from appliance.errors import EngineError
from tests.support.engines import complete, logits, prefill, prompt
from tests.support.models import tiny_config

BOX = Costs(lone=0.030, lone_cell=2.5e-6, few=0.025, few_cell=10e-6, tile=0.3, tile_cell=0.15e-3)
"""About qwen2.5-0.5b on two cores."""
ALWAYS_FILL = Costs(lone=0, lone_cell=0, few=1, few_cell=1, tile=0, tile_cell=0)


@pytest.fixture(scope="module")
def engine() -> Iterator[LlamaCppEngine]:
    engine = LlamaCppEngine(tiny_config(context_tokens=512, threads=1, batch_threads=1), lambda _: None)
    yield engine
    engine.close()


def rows(depths: Sequence[int], *lengths: int) -> list[Row]:
    """One token at each depth, then one row of each length at depth 1,000."""
    single = [Row(i, depth, prompt(1), True) for i, depth in enumerate(depths)]
    return [*single, *(Row(len(depths) + i, 1000, prompt(n), False) for i, n in enumerate(lengths))]


def test_deep_streams_are_computed_one_by_one_and_shallow_ones_together() -> None:
    assert groups(BOX, rows([8000, 8000, 8000])) == [[0], [1], [2]]
    assert groups(BOX, rows([10, 10, 10])) == [[0, 1, 2]]


def test_with_a_chunk_of_a_prompt_that_fills_a_tile_all_go_into_one_call() -> None:
    assert groups(BOX, rows([8000, 8000], TILE_ROWS)) == [[0, 1, 2]]


def test_a_short_question_is_filled_up_where_its_context_is_deep() -> None:
    assert filling(BOX, rows([], 28)) == TILE_ROWS - 28
    assert not filling(BOX, [Row(0, 0, prompt(3), True)])
    assert not filling(BOX, rows([10**6])), "a lone token has a way of its own"


def test_without_costs_all_go_into_one_call_and_nothing_is_added() -> None:
    many = rows([8000, 8000], 3)
    assert groups(None, many) == [[0, 1, 2]]
    assert not filling(None, many)


@given(st.lists(st.integers(0, 20_000), max_size=10), st.lists(st.integers(1, 80), max_size=4))
def test_every_row_is_in_one_call_and_no_call_is_filled_beyond_a_tile(depths: list[int], lengths: list[int]) -> None:
    some = rows(depths, *lengths)
    if not some:
        return
    found = groups(BOX, some)
    assert sorted(index for group in found for index in group) == list(range(len(some)))
    for group in found:
        n_tokens = sum(len(some[index].tokens) for index in group)
        added = filling(BOX, [some[index] for index in group])
        assert not added or n_tokens + added == TILE_ROWS


def test_what_is_measured_is_what_a_row_costs() -> None:
    depth, filled = 1000, []

    def timed(n_rows: int, start: int) -> float:
        assert bool(filled) is (start > 0)
        cell = {1: 1e-6, 2: 4e-6, TILE_ROWS: 30e-6}[n_rows]
        return {1: 0.01, 2: 0.015, TILE_ROWS: 0.1}[n_rows] + cell * start

    costs = Costs.measured(timed, depth, lambda: filled.append(True))
    assert costs.alone(Row(0, 1999, prompt(1), True)) == pytest.approx(0.012)
    pair = [Row(i, 1999, prompt(1), True) for i in range(2)]
    assert costs.together(pair, 2) == pytest.approx(0.015 + 2 * 2000 * 2e-6)
    assert costs.filled(pair) == pytest.approx(0.1 + 2000 * 30e-6)


def test_an_engine_on_a_cpu_measures_at_start_and_leaves_its_cells_empty(engine: LlamaCppEngine) -> None:
    assert engine._costs is not None
    prefill(engine, 0, prompt(512), batch=128)
    engine.drop(0)


def test_completions_and_cells_are_those_without_filling(engine: LlamaCppEngine) -> None:
    tokens = prompt(150)
    found = []
    for costs in (None, ALWAYS_FILL):
        engine._costs = costs
        prefill(engine, 0, tokens, batch=20)
        found.append(complete(engine, 0, len(tokens)))
        engine.drop(0)
    assert found[0] == found[1]
    prefill(engine, 0, prompt(512), batch=128)  # no error: every cell is free again
    engine.drop(0)


def test_without_room_for_it_the_batch_is_computed_as_it_is(engine: LlamaCppEngine) -> None:
    engine._costs = ALWAYS_FILL
    tokens = prompt(500)
    prefill(engine, 0, tokens[:490], batch=128)
    engine.decode([Row(0, 490, tokens[490:], True)])
    found = logits(engine)
    engine._costs = None
    engine.drop(0, 490)
    engine.decode([Row(0, 490, tokens[490:], True)])
    assert found.tobytes() == logits(engine).tobytes()
    with pytest.raises(EngineError, match="no free KV cells"):
        engine.decode([Row(1, 0, prompt(20), True)])
