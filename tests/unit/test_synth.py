"""Synthetic models: the two properties of `tiny`, and files that load."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from appliance.engine.base import Engine, Row
from appliance.engine.llamacpp import create
from appliance.errors import ModelError, UsageError
from appliance.ops import synth as synth_module
from appliance.ops.gguf_check import check
from appliance.ops.synth import synth
from appliance.ops.synth_shape import SHAPES, Shape
from appliance.types import SamplingParams, Tokens
from tests.support.models import tiny_config, tiny_model

BLOCK = 256
NEW_TOKENS = 64
TEXT = Path(__file__).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = create(tiny_config(context_tokens=8192), lambda _: None)
    yield engine
    engine.close()


def prefill(engine: Engine, seq: int, tokens: Tokens, chunks: Iterator[int]) -> None:
    at = 0
    while at < len(tokens):
        part = tokens[at : at + next(chunks)]
        at += len(part)
        engine.decode([Row(seq, at - len(part), part, at == len(tokens))])


def complete(engine: Engine, seq: int, length: int) -> bytes:
    """Greedy completion of a prefilled sequence, which is dropped."""
    sampler = engine.new_sampler(SamplingParams(max_tokens=NEW_TOKENS, temperature=0), Tokens())
    chosen = []
    for i in range(NEW_TOKENS):
        sampled = sampler.sample(0)
        assert not sampled.is_end
        chosen.append(sampled.token)
        engine.decode([Row(seq, length + i, Tokens.of([sampled.token]), True)])
    sampler.close()
    engine.drop(seq)
    return b"".join(map(engine.piece, chosen))


PROMPTS = {
    "prose": TEXT[:1100],
    "short": "Hello",
    "one letter": "a" * 900,
    "one word": "hello " * 150,
    "another place": TEXT[1500:2400],
    "random": "".join(map(chr, np.random.default_rng(5).integers(32, 127, 1400))),
}
SPLITS = ([512], [1], [7], [64], [100, 300, 11], [255, 1], [256])


@pytest.mark.parametrize("name", PROMPTS)
def test_completions_do_not_depend_on_how_the_prompt_was_batched(engine: Engine, name: str) -> None:
    tokens = Tokens.of(engine.tokenize(PROMPTS[name], add_special=True, parse_special=False))
    completions = set()
    for split in SPLITS:
        prefill(engine, 0, tokens, itertools.cycle(split))
        completions.add(complete(engine, 0, len(tokens)))
    assert len(completions) == 1
    text = completions.pop()
    assert all(32 <= byte < 127 for byte in text)
    assert len(set(text)) > 10, "a varied text, or the comparison proves little"


def test_completions_depend_on_the_prompt(engine: Engine) -> None:
    completions = set()
    for text in PROMPTS.values():
        tokens = Tokens.of(engine.tokenize(text, add_special=True, parse_special=False))
        prefill(engine, 0, tokens, itertools.cycle([512]))
        completions.add(complete(engine, 0, len(tokens)))
    assert len(completions) == len(PROMPTS)


@pytest.mark.parametrize("n_blocks", [1, 4, 9])
def test_completions_depend_on_every_block(engine: Engine, n_blocks: int) -> None:
    """Positive control: with any one block's KV taken from another prompt, another completion."""
    letters = np.random.default_rng(3)
    size = n_blocks * BLOCK + 9
    one, two = (Tokens.of(letters.choice(list((TEXT * 3).encode()), size).tolist()) for _ in range(2))
    good, bad = exported(engine, one, n_blocks), exported(engine, two, n_blocks)

    def completion(blocks: list[bytearray]) -> bytes:
        engine.restore(0, 0, [(BLOCK, BLOCK, memoryview(block)) for block in blocks])
        engine.decode([Row(0, n_blocks * BLOCK, one[n_blocks * BLOCK :], True)])
        return complete(engine, 0, size)

    expected = completion(good)
    assert completion(good) == expected
    for i in range(n_blocks):
        assert completion([*good[:i], bad[i], *good[i + 1 :]]) != expected, f"block {i} does not matter"


def test_completions_depend_on_keys_and_on_values(engine: Engine) -> None:
    letters = np.random.default_rng(4)
    one, two = (Tokens.of(letters.integers(32, 127, 4 * BLOCK + 9).tolist()) for _ in range(2))
    good, bad = exported(engine, one, 4), exported(engine, two, 4)
    expected = None
    for part in (None, 0, 1):  # nothing, all keys, all values of block 1 replaced
        blocks = [bytearray(block) for block in good]
        if part is not None:
            half = len(blocks[1]) // 2
            blocks[1][part * half : (part + 1) * half] = bad[1][part * half : (part + 1) * half]
        engine.restore(0, 0, [(BLOCK, BLOCK, memoryview(block)) for block in blocks])
        engine.decode([Row(0, 4 * BLOCK, one[4 * BLOCK :], True)])
        completion = complete(engine, 0, len(one))
        if part is None:
            expected = completion
        else:
            assert completion != expected


def exported(engine: Engine, tokens: Tokens, n_blocks: int) -> list[bytearray]:
    prefill(engine, 1, tokens, itertools.cycle([512]))
    blocks = [bytearray(engine.info.layout.payload_bytes(BLOCK)) for _ in range(n_blocks)]
    engine.export(1, 0, [(BLOCK, memoryview(block)) for block in blocks])
    engine.drop(1)
    return blocks


def test_the_same_seed_gives_the_same_file_and_another_a_different_one(tmp_path: Path) -> None:
    first = synth("tiny", tmp_path / "a.gguf").read_bytes()
    assert synth("tiny", tmp_path / "b.gguf").read_bytes() == first
    assert synth("tiny", tmp_path / "c.gguf", seed=1).read_bytes() != first
    assert first == tiny_model().read_bytes()


def test_an_unknown_preset_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="tiny"):
        synth("huge", tmp_path / "x.gguf")


def test_nothing_is_left_behind_when_writing_fails(tmp_path: Path) -> None:
    def fail(_fraction: float) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ModelError, match="No space"):
        synth("tiny", tmp_path / "x.gguf", on_progress=fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("preset", SHAPES)
def test_a_quantised_shape_loads_and_talks_in_printable_ascii(
    tmp_path: Path, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The presets' own code path at a hundredth of their size: same architecture, ties and biases, fewer of all."""
    shape = SHAPES[preset]
    small = Shape(shape.arch, 2, 256, 4, 2, 64, 512, 2000, 1024, shape.rope_base, shape.tied, shape.qkv_bias, 1e-6)
    monkeypatch.setitem(synth_module.SHAPES, preset, small)
    fractions: list[float] = []
    path = synth(preset, tmp_path / "m.gguf", on_progress=fractions.append)
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert check(path).architecture == shape.arch
    assert len(GGUFReader(path).tensors) > 20
    engine = create(tiny_config(model_path=str(path), context_tokens=512), lambda _: None)
    tokens = Tokens.of(engine.tokenize("Hello there", add_special=True, parse_special=False))
    prefill(engine, 0, tokens, itertools.cycle([64]))
    assert all(32 <= byte < 127 for byte in complete(engine, 0, len(tokens)))
    engine.close()
