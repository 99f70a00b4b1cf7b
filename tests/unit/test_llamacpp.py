"""The llama.cpp engine on the tiny model: cells, state, sampling, text."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from appliance.engine.base import Engine, EngineConfig, KVMode, Row
from appliance.engine.llamacpp import create
from appliance.errors import EngineError, ModelError, RestoreError
from appliance.types import SamplingParams, Tokens
from tests.support.models import tiny_config, tiny_model

BLOCK = 64
GREEDY = SamplingParams(max_tokens=1, temperature=0)


@pytest.fixture(scope="module")
def loaded() -> Iterator[Engine]:
    engine = create(tiny_config(block_tokens=BLOCK, context_tokens=1024, max_sequences=8), lambda _: None)
    yield engine
    engine.close()


@pytest.fixture
def engine(loaded: Engine) -> Iterator[Engine]:
    yield loaded
    for seq in range(loaded.info.max_sequences):
        loaded.drop(seq)


def prompt(n: int, seed: int = 0) -> Tokens:
    return Tokens.of(np.random.default_rng(seed).integers(32, 127, n).tolist())


def prefill(engine: Engine, seq: int, tokens: Tokens, start: int = 0) -> np.ndarray:
    engine.decode([Row(seq, start, tokens, True)])
    return np.frombuffer(engine.logits(0), np.float32).copy()


def export(engine: Engine, seq: int, start: int, sizes: list[int]) -> list[bytearray]:
    targets = [bytearray(engine.info.layout.payload_bytes(n)) for n in sizes]
    engine.export(seq, start, [(n, memoryview(t)) for n, t in zip(sizes, targets, strict=True)])
    return targets


def restore(engine: Engine, seq: int, start: int, sizes: list[int], payloads: list[bytearray], use: int = 0) -> None:
    uses = [*sizes[:-1], use or sizes[-1]]
    blocks = zip(sizes, uses, map(memoryview, payloads), strict=True)
    engine.restore(seq, start, list(blocks))


def test_info_says_what_was_loaded(engine: Engine) -> None:
    info = engine.info
    assert info.kv_mode is KVMode.ROWS
    assert info.layout.block_tokens == BLOCK
    assert info.layout.fixed_bytes == (0,)
    assert info.context_tokens == 1024
    assert info.max_sequences == 6
    assert info.cell_bytes == 1024 * info.layout.token_bytes[0]
    assert info.decode_step_s > 0
    assert info.prefill_tokens_per_s > 0
    assert info.has_chat_template


def test_restored_logits_are_bit_equal_to_never_evicted(engine: Engine) -> None:
    tokens = prompt(3 * BLOCK + 20)
    sizes = [BLOCK, BLOCK, BLOCK, 20]
    prefill(engine, 0, tokens)
    payloads = export(engine, 0, 0, sizes)
    engine.drop(0, len(tokens) - 1)
    expected = prefill(engine, 0, tokens[-1:], len(tokens) - 1)
    engine.drop(0)
    restore(engine, 0, 0, sizes, payloads)
    engine.drop(0, len(tokens) - 1)
    assert np.array_equal(prefill(engine, 0, tokens[-1:], len(tokens) - 1), expected)


def test_export_after_restore_gives_the_same_bytes_from_other_cells(engine: Engine) -> None:
    prefill(engine, 3, prompt(100, seed=9))  # so that the restore lands elsewhere
    prefill(engine, 0, prompt(2 * BLOCK + 7))
    sizes = [BLOCK, BLOCK, 7]
    payloads = export(engine, 0, 0, sizes)
    engine.drop(0)
    engine.drop(3)
    restore(engine, 1, 0, sizes, payloads)
    assert export(engine, 1, 0, sizes) == payloads


def test_a_payload_does_not_depend_on_the_run_or_the_cells(engine: Engine) -> None:
    """Blocks exported alone, together, and from cells out of position order are the same bytes."""
    tokens = prompt(4 * BLOCK)
    prefill(engine, 0, tokens)
    together = export(engine, 0, 0, [BLOCK] * 4)
    alone = [export(engine, 0, i * BLOCK, [BLOCK])[0] for i in range(4)]
    assert alone == together
    for i in (2, 0, 3, 1):  # cells are claimed in this order
        restore(engine, 1 + i, i * BLOCK, [BLOCK], [together[i]])
        if i:
            engine.link(1 + i, 5, i * BLOCK, (i + 1) * BLOCK)
    engine.link(1, 5, 0, BLOCK)
    assert export(engine, 5, 0, [BLOCK] * 4) == together


def test_a_block_is_used_in_part(engine: Engine) -> None:
    tokens = prompt(2 * BLOCK)
    prefill(engine, 0, tokens)
    payloads = export(engine, 0, 0, [BLOCK, BLOCK])
    cut = BLOCK + 10
    engine.drop(0, cut)
    other = prompt(5, seed=4)
    expected = prefill(engine, 0, other, cut)
    restore(engine, 1, 0, [BLOCK, BLOCK], payloads, use=10)
    got = prefill(engine, 1, other, cut)
    assert np.argmax(got) == np.argmax(expected)
    np.testing.assert_allclose(got, expected, atol=1e-2)
    with pytest.raises(EngineError):
        export(engine, 1, 0, [BLOCK, BLOCK])  # positions beyond the used part are not there


def test_a_restore_extends_a_resident_prefix(engine: Engine) -> None:
    tokens = prompt(2 * BLOCK)
    prefill(engine, 0, tokens)
    tail = export(engine, 0, BLOCK, [BLOCK])
    engine.link(0, 1, 0, BLOCK)
    restore(engine, 1, BLOCK, [BLOCK], tail)
    assert export(engine, 1, 0, [BLOCK, BLOCK]) == export(engine, 0, 0, [BLOCK, BLOCK])


def test_a_refused_restore_leaves_the_target_untouched(engine: Engine) -> None:
    tokens = prompt(BLOCK)
    prefill(engine, 0, tokens)
    payload = export(engine, 0, 0, [BLOCK])
    engine.link(0, 1, 0, BLOCK)
    with pytest.raises(RestoreError):
        restore(engine, 1, BLOCK, [BLOCK], [payload[0][:-1]])  # a wrong size
    wide = Tokens.of([40] * 480)
    for seq in (2, 3):
        engine.decode([Row(seq, 0, wide, False)])  # cells are nearly gone
    assert export(engine, 1, 0, [BLOCK]) == payload
    with pytest.raises(RestoreError):
        restore(engine, 1, BLOCK, [BLOCK], payload)
    assert export(engine, 1, 0, [BLOCK]) == payload
    engine.drop(2)
    restore(engine, 1, BLOCK, [BLOCK], payload)  # scratch was left clean: now there is room


def test_a_decode_without_cells_changes_nothing(engine: Engine) -> None:
    tokens = prompt(BLOCK)
    prefill(engine, 0, tokens)
    payload = export(engine, 0, 0, [BLOCK])
    wide = Tokens.of([40] * 480)
    for seq in (1, 2):
        engine.decode([Row(seq, 0, wide, False)])
    with pytest.raises(EngineError):
        engine.decode([Row(0, BLOCK, prompt(BLOCK), True)])
    assert export(engine, 0, 0, [BLOCK]) == payload
    with pytest.raises(EngineError):
        export(engine, 0, 0, [BLOCK + 1])
    engine.drop(1)
    engine.decode([Row(0, BLOCK, prompt(BLOCK), True)])


def test_a_token_out_of_range_is_an_error_and_changes_nothing(engine: Engine) -> None:
    prefill(engine, 0, prompt(BLOCK))
    payload = export(engine, 0, 0, [BLOCK])
    with pytest.raises(EngineError):
        engine.decode([Row(0, BLOCK, Tokens.of([engine.info.vocab_tokens]), True)])
    assert export(engine, 0, 0, [BLOCK]) == payload


def test_rows_of_one_decode_do_not_mix(engine: Engine) -> None:
    one, two = prompt(50, seed=1), prompt(30, seed=2)
    expected = [np.argmax(prefill(engine, 0, one)), np.argmax(prefill(engine, 1, two))]
    engine.drop(0)
    engine.drop(1)
    engine.decode([Row(0, 0, one, True), Row(2, 0, prompt(20, seed=3), False), Row(1, 0, two, True)])
    assert [np.argmax(np.frombuffer(engine.logits(row), np.float32)) for row in (0, 2)] == expected


def sample(engine: Engine, params: SamplingParams, tokens: Tokens, n: int) -> list[int]:
    sampler = engine.new_sampler(params, tokens)
    prefill(engine, 0, tokens)
    chosen = []
    for i in range(n):
        chosen.append(sampler.sample(0).token)
        engine.decode([Row(0, len(tokens) + i, Tokens.of(chosen[-1:]), True)])
    sampler.close()
    engine.drop(0)
    return chosen


def test_a_seed_repeats_and_another_differs(engine: Engine) -> None:
    def run(seed: int) -> list[int]:
        return sample(engine, SamplingParams(max_tokens=1, temperature=1.5, seed=seed), prompt(40), 20)

    assert run(7) == run(7)
    assert run(7) != run(8)


def test_top_k_of_one_is_greedy(engine: Engine) -> None:
    greedy = sample(engine, GREEDY, prompt(40), 20)
    assert sample(engine, SamplingParams(max_tokens=1, temperature=2.0, top_k=1), prompt(40), 20) == greedy


def test_bias_and_penalties_change_the_choice(engine: Engine) -> None:
    greedy = sample(engine, GREEDY, prompt(40), 1)[0]
    banned = SamplingParams(max_tokens=1, temperature=0, logit_bias=((greedy, -100.0),))
    assert sample(engine, banned, prompt(40), 1)[0] != greedy
    seen = Tokens.of([greedy, *prompt(39).ids()])  # penalties look at the prompt too
    first = sample(engine, GREEDY, seen, 1)[0]
    penalised = SamplingParams(max_tokens=1, temperature=0, presence_penalty=1000.0)
    assert sample(engine, penalised, seen + Tokens.of([first]), 30).count(first) == 0


def test_ignore_eos_never_ends(engine: Engine) -> None:
    (end,) = [t for t in range(256, 259) if engine.piece(t) == b"" and t == 258]
    forced = SamplingParams(max_tokens=1, temperature=0, logit_bias=((end, 1000.0),))
    sampler = engine.new_sampler(forced, prompt(8))
    prefill(engine, 0, prompt(8))
    assert sampler.sample(0).is_end
    sampler.close()
    forced = SamplingParams(max_tokens=1, temperature=0, logit_bias=((end, 1000.0),), ignore_eos=True)
    sampler = engine.new_sampler(forced, prompt(8))
    assert not sampler.sample(0).is_end
    sampler.close()


def test_logprobs_are_those_of_the_raw_logits(engine: Engine) -> None:
    sampler = engine.new_sampler(SamplingParams(max_tokens=1, temperature=0, logprobs=3), prompt(20))
    logits = prefill(engine, 0, prompt(20)).astype(np.float64)
    sampled = sampler.sample(0)
    sampler.close()
    expected = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    assert sampled.logprob is not None
    assert sampled.logprob.logprob == pytest.approx(expected[sampled.token])
    assert [token for token, _ in sampled.logprob.top] == np.argsort(-expected)[:3].tolist()


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
