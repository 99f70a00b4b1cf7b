"""The llama.cpp engine on the tiny model: the conformance suite, what it says of itself, and bad model files."""

from __future__ import annotations

import itertools
from pathlib import Path
from unittest.mock import patch

import pytest

from appliance.engine.base import Engine, EngineConfig, KVMode
from appliance.engine.llamacpp import create
from appliance.engine.llamacpp.cells import LayoutError, RowLayout
from appliance.errors import ModelError
from tests.contracts.checkpoint import CheckpointConformance
from tests.contracts.engine import BATCH, CELLS, Conformance
from tests.support import odd_models
from tests.support.models import tiny_config, tiny_model

BLOCK = 64


class TestLlamaCpp(Conformance):
    block, end_token = BLOCK, 258

    @classmethod
    def open(cls) -> Engine:
        return create(
            tiny_config(block_tokens=BLOCK, context_tokens=CELLS, batch_tokens=BATCH, threads=1, batch_threads=1),
            lambda _: None,
        )


class TestOpaqueState(TestLlamaCpp):
    """A model whose state is not laid out in rows per token, as far as the engine can tell."""

    kv_mode = KVMode.OPAQUE

    @classmethod
    def open(cls) -> Engine:
        with patch.object(RowLayout, "parse", side_effect=LayoutError("not rows")):
            return super().open()


class TestRecurrent(CheckpointConformance):
    @classmethod
    def open(cls, folder: Path) -> Engine:
        path = odd_models.recurrent(folder / "recurrent.gguf")
        return create(tiny_config(model_path=str(path), block_tokens=BLOCK, threads=1, batch_threads=1), lambda _: None)


class TestHybrid(CheckpointConformance):
    @classmethod
    def open(cls, folder: Path) -> Engine:
        path = odd_models.hybrid(folder / "hybrid.gguf")
        return create(tiny_config(model_path=str(path), block_tokens=BLOCK, threads=1, batch_threads=1), lambda _: None)


def test_info_says_what_was_loaded() -> None:
    engine = create(tiny_config(block_tokens=BLOCK, context_tokens=1024, max_sequences=8), lambda _: None)
    info = engine.info
    engine.close()
    assert info.kv_mode is KVMode.ROWS
    assert info.layout.block_tokens == BLOCK
    assert info.layout.fixed_bytes == (0,)
    assert info.context_tokens == 1024
    assert info.max_sequences == 6
    assert info.cell_bytes == 1024 * info.layout.token_bytes[0]
    assert info.decode_step_s > 0
    assert info.prefill_tokens_per_s > 0
    assert info.has_chat_template


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, b"GGUF" + bytes(400)])
def test_a_bad_model_file_is_one_clear_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        create(_at(path), lambda _: None)
    assert "bad.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_or_missing_model_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_model().read_bytes()[:-5000])
    for bad in (path, tmp_path / "none.gguf"):
        with pytest.raises(ModelError, match=bad.name):
            create(_at(bad), lambda _: None)


def test_loading_reports_progress_and_the_fingerprint_follows_the_configuration() -> None:
    seen: list[float] = []
    prints = []
    for kv_type, sha in itertools.product(("f16", "f32"), (b"\1" * 32, b"\2" * 32)):
        config = tiny_config(kv_type_k=kv_type, kv_type_v=kv_type, model_sha256=sha, threads=1, batch_threads=1)
        engine = create(config, seen.append)
        prints.append(engine.info.fingerprint)
        assert (engine.info.threads, engine.info.batch_threads) == (1, 1)
        engine.close()
    assert seen[-1] == 1.0
    assert len({p.digest for p in prints}) == 4
    assert prints[0].layout == prints[1].layout
    assert prints[0].model == prints[2].model


def _at(path: Path) -> EngineConfig:
    return tiny_config(model_path=str(path))
