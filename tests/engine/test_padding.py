"""Small batches filled up for llama.cpp's attention: when it pays, and that nobody can tell by the result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from appliance.engine.base import Row
from appliance.engine.llamacpp.engine import LlamaCppEngine
from appliance.engine.llamacpp.padding import TILE_ROWS, Padding
from appliance.errors import EngineError
from tests.support.engines import complete, logits, prefill, prompt
from tests.support.models import tiny_config

ALWAYS, NEVER = Padding(1e6), Padding(0.0)


@pytest.fixture(scope="module")
def engine() -> Iterator[LlamaCppEngine]:
    engine = LlamaCppEngine(tiny_config(context_tokens=512, threads=1, batch_threads=1), lambda _: None)
    yield engine
    engine.close()


@pytest.mark.parametrize("depth", [0, 100, 1000, 10_000, 10**6])
def test_what_is_added_never_makes_more_than_a_tile(depth: int) -> None:
    padding = Padding(0.004)
    filled = [n for n in range(1, 100) if padding.tokens(n, depth)]
    assert all(n + padding.tokens(n, depth) == TILE_ROWS for n in filled)
    assert filled == list(range(filled[0], TILE_ROWS)) if filled else depth < 256


def test_a_single_token_is_decoded_alone() -> None:
    assert not Padding(0.004).tokens(1, 10**6)


@pytest.mark.parametrize(
    "changes",
    [{"kv_type_k": "q8_0", "kv_type_v": "q8_0"}, {"kv_type_v": "f32"}, {"gpu_layers": 1}, {"batch_tokens": 32}],
)
def test_nothing_is_added_where_there_is_no_such_attention(engine: LlamaCppEngine, changes: dict[str, Any]) -> None:
    assert Padding.of(engine._model, tiny_config()).cell_cost > 0
    assert Padding.of(engine._model, tiny_config(**changes)) == NEVER


def test_completions_and_cells_are_those_without_it(engine: LlamaCppEngine) -> None:
    tokens = prompt(150)
    found = []
    for padding in (NEVER, ALWAYS):
        engine._padding = padding
        prefill(engine, 0, tokens, batch=20)
        found.append(complete(engine, 0, len(tokens)))
        engine.drop(0)
    assert found[0] == found[1]
    prefill(engine, 0, prompt(512), batch=128)  # no error: every cell is free again


def test_without_room_for_it_the_batch_is_computed_alone(engine: LlamaCppEngine) -> None:
    engine._padding = ALWAYS
    engine.drop(0)
    tokens = prompt(500)
    prefill(engine, 0, tokens[:490], batch=128)
    engine.decode([Row(0, 490, tokens[490:], True)])
    found = logits(engine)
    engine._padding = NEVER
    engine.drop(0, 490)
    engine.decode([Row(0, 490, tokens[490:], True)])
    assert found.tobytes() == logits(engine).tobytes()
    with pytest.raises(EngineError, match="no free KV cells"):
        engine.decode([Row(1, 0, prompt(20), True)])
