"""Driving an Engine directly: prompts, prefill, blocks as bytes, greedy completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.engine.base import Engine, EngineConfig, Row
from appliance.engine.null import NullEngine
from appliance.types import SamplingParams, Tokens

NULL_BLOCK = 16


def null_config(**changes: Any) -> EngineConfig:
    """A small null engine: 1024 cells, blocks of 16 tokens, batches of 64."""
    settings: dict[str, Any] = {
        "kind": "null",
        "model_path": "",
        "model_sha256": bytes(32),
        "context_tokens": 1024,
        "max_sequences": 16,
        "batch_tokens": 64,
        "shared_batch_tokens": 8,
        "prefill_share": 1.0,
        "block_tokens": NULL_BLOCK,
        "gpu_layers": 0,
        "threads": 1,
        "batch_threads": 1,
        "kv_type_k": "f16",
        "kv_type_v": "f16",
    }
    return EngineConfig(**{**settings, **changes})


def null_engine(**changes: Any) -> NullEngine:
    return NullEngine(null_config(**changes))


def prompt(n_tokens: int, seed: int = 0) -> Tokens:
    """Printable bytes, which every engine under test has as tokens."""
    return Tokens.of(np.random.default_rng(seed).integers(32, 127, n_tokens).tolist())


def greedy(max_tokens: int = 1, **changes: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, **changes)


def logits(engine: Engine, row: int = 0) -> NDArray[np.float32]:
    found: NDArray[np.float32] = np.frombuffer(engine.logits(row), np.float32).copy()
    return found


def prefill(engine: Engine, seq: int, tokens: Tokens, start: int = 0, batch: int = 64) -> NDArray[np.float32]:
    """Compute positions [start, start + len(tokens)) in calls of at most `batch`; the logits after the last."""
    for at in range(0, len(tokens), batch):
        part = tokens[at : at + batch]
        engine.decode([Row(seq, start + at, part, at + len(part) == len(tokens))])
    return logits(engine)


def export(engine: Engine, seq: int, start: int, sizes: Sequence[int]) -> list[bytearray]:
    payloads = [bytearray(engine.info.layout.payload_bytes(n)) for n in sizes]
    engine.export(seq, start, [(n, memoryview(payload)) for n, payload in zip(sizes, payloads, strict=True)])
    return payloads


def restore(
    engine: Engine, seq: int, start: int, sizes: Sequence[int], payloads: Sequence[bytearray], use: int | None = None
) -> None:
    """Whole blocks, the last of them in part if `use` says so."""
    uses = [*sizes[:-1], use or sizes[-1]]
    blocks = zip(sizes, uses, payloads, strict=True)
    engine.restore(seq, start, [(n, use, memoryview(payload)) for n, use, payload in blocks])


def complete(engine: Engine, seq: int, at: int, n_tokens: int = 24, params: SamplingParams | None = None) -> list[int]:
    """Tokens chosen one by one after the last decode, which was of `seq` and ended at position `at`. `seq` grows."""
    sampler = engine.new_sampler(params or greedy(), Tokens())
    chosen: list[int] = []
    for i in range(n_tokens):
        chosen.append(sampler.sample(0).token)
        engine.decode([Row(seq, at + i, Tokens.of(chosen[-1:]), True)])
    sampler.close()
    return chosen
