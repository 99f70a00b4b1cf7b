"""How the engine slices the state of models that are not plain full attention, and opaque states."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from appliance.engine.base import KVMode, Row
from appliance.engine.llamacpp import create, state
from appliance.engine.llamacpp.cells import LayoutError, RowLayout
from appliance.engine.llamacpp.checkpoint import CheckpointPort
from appliance.engine.llamacpp.engine import LlamaCppEngine
from appliance.errors import EngineError, RestoreError
from appliance.types import Tokens
from tests.support import odd_models
from tests.support.models import tiny_config

BLOCK = 64
SIZES = [BLOCK, BLOCK, BLOCK, 21]
TOKENS = Tokens.of(np.random.default_rng(0).integers(32, 127, sum(SIZES)).tolist())


def open_engine(**changes: object) -> LlamaCppEngine:
    settings = {"block_tokens": BLOCK, "context_tokens": 1024, "threads": 1, "batch_threads": 1, **changes}
    engine = create(tiny_config(**settings), lambda _: None)
    assert isinstance(engine, LlamaCppEngine)
    return engine


def logits_of_last(engine: LlamaCppEngine, seq: int) -> np.ndarray:
    last = len(TOKENS) - 1
    engine.drop(seq, last)
    engine.decode([Row(seq, last, TOKENS[last:], True)])
    return np.frombuffer(engine.logits(0), np.float32).copy()


def round_trip(engine: LlamaCppEngine) -> None:
    """Export, drop, restore into the same cells: bit-equal logits; export again: the same bytes."""
    engine.decode([Row(0, 0, TOKENS, True)])
    payloads = [bytearray(engine.info.layout.payload_bytes(n)) for n in SIZES]
    engine.export(0, 0, [(n, memoryview(p)) for n, p in zip(SIZES, payloads, strict=True)])
    expected = logits_of_last(engine, 0)
    engine.drop(0)
    engine.restore(0, 0, [(n, n, memoryview(p)) for n, p in zip(SIZES, payloads, strict=True)])
    again = [bytearray(len(p)) for p in payloads]
    engine.export(0, 0, [(n, memoryview(p)) for n, p in zip(SIZES, again, strict=True)])
    assert again == payloads
    assert np.array_equal(logits_of_last(engine, 0), expected)


@pytest.mark.parametrize("window_tokens", [16, 48, 100, 512])
def test_a_sliding_window_model_restores_bit_equal(tmp_path: Path, window_tokens: int) -> None:
    path = odd_models.sliding(tmp_path / "sliding.gguf", window_tokens)
    engine = open_engine(model_path=str(path))
    assert engine.info.kv_mode is KVMode.ROWS
    assert not engine.info.has_chat_template
    assert any("ChatML" in note for note in engine.info.notes)
    round_trip(engine)
    engine.close()


def test_a_model_whose_state_cannot_be_put_back_says_that_nothing_can_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CheckpointPort, "restore", lambda *_: None)
    engine = open_engine(model_path=str(odd_models.recurrent(tmp_path / "recurrent.gguf")))
    assert engine.info.kv_mode is KVMode.NONE
    assert any("nothing can be kept" in note for note in engine.info.notes)
    engine.decode([Row(0, 0, TOKENS[:40], True)])
    with pytest.raises(EngineError):
        engine.export(0, 0, [(40, memoryview(bytearray(engine.info.layout.payload_bytes(40))))])
    with pytest.raises(RestoreError):
        engine.restore(1, 0, [(40, 40, memoryview(bytearray(engine.info.layout.payload_bytes(40))))])
    engine.drop(0)
    engine.decode([Row(0, 0, TOKENS[:40], True)])
    engine.close()


@pytest.fixture
def opaque(monkeypatch: pytest.MonkeyPatch) -> Iterator[LlamaCppEngine]:
    def refuse(_blob: object) -> RowLayout:
        raise LayoutError("not rows")

    monkeypatch.setattr(state.RowLayout, "parse", refuse)
    engine = open_engine()
    yield engine
    engine.close()


def test_opaque_states_restore_bit_equal(opaque: LlamaCppEngine) -> None:
    assert opaque.info.kv_mode is KVMode.OPAQUE
    assert any("one by one" in note for note in opaque.info.notes)
    assert opaque.info.layout.fixed_bytes[0] > 0
    round_trip(opaque)


def test_an_opaque_restore_in_part_or_of_another_position(opaque: LlamaCppEngine) -> None:
    opaque.decode([Row(0, 0, TOKENS, True)])
    payloads = [bytearray(opaque.info.layout.payload_bytes(BLOCK)) for _ in range(2)]
    opaque.export(0, 0, [(BLOCK, memoryview(p)) for p in payloads])
    opaque.restore(1, 0, [(BLOCK, BLOCK, memoryview(payloads[0])), (BLOCK, 10, memoryview(payloads[1]))])
    opaque.decode([Row(1, BLOCK + 10, TOKENS[:3], True)])
    opaque.link(0, 2, 0, BLOCK)
    with pytest.raises(RestoreError, match="positions"):
        opaque.restore(2, BLOCK, [(BLOCK, BLOCK, memoryview(payloads[0]))])
    opaque.decode([Row(2, BLOCK, TOKENS[:3], True)])  # the target ends where it did, and scratch is clear


@pytest.mark.parametrize("kv_type", ["f32", "bf16", "q8_0", "q4_0"])
def test_every_kv_type_restores_bit_equal(kv_type: str) -> None:
    engine = open_engine(kv_type_k=kv_type, kv_type_v=kv_type)
    assert engine.info.kv_mode is KVMode.ROWS
    round_trip(engine)
    engine.close()


def test_a_blob_that_is_not_rows_is_refused() -> None:
    for blob in (b"", b"\0" * 8, b"\0" * 64, np.random.default_rng(1).bytes(500)):
        with pytest.raises(LayoutError):
            RowLayout.parse(np.frombuffer(blob, np.uint8))
