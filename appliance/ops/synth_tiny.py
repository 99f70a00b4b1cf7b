"""The weights of the `tiny` model, constructed so that "same tokens" proves that the KV cache is right.

Greedy completions do not depend on how a prompt was batched, and do depend on every block. Attention either picks one
token (a score gap of 30 or more) or sums +-1 over a class of tokens chosen by their keys: both are exact in half precision, in
any order of summation, so that rounding of other batch shapes stays near 1e-6, far below the margins between logits.

  layer 0  three heads fetch the codes (32 bits) of the last three tokens, five sum codes over token classes
           the FFN makes 64 hash bits of four tokens, each the parity of four code bits
  layer 1  eight heads sum hash bits over token classes: the whole prompt counts, whatever its length
           the FFN mixes these sums with the current hash by random products; the result chooses among printable ASCII

Invariant: every key and value that a later token reads is exact in half precision. Values only.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from appliance.ops.synth_shape import Shape

F32 = NDArray[np.float32]

CODE, HASH, SUM, OUT = 32, 64, 64, 63
HEADS, KV_HEADS, HEAD = 8, 2, 32
LOOKBACK = 3
CONST_AT = 0
CODES_AT = 1
HASH_AT = CODES_AT + CODE * (1 + LOOKBACK)
CODE_SUM_AT = HASH_AT + HASH
SUM_AT = CODE_SUM_AT + CODE
OUT_AT = SUM_AT + SUM
EMBD = OUT_AT + OUT
PARITY = ((5, 1), (4, -2), (2, 2), (0, -2), (-2, 2))
"""(shift, weight): sum of weight * relu(s + shift) is +1, -1, +1, -1, +1 at s = -4, -2, 0, 2, 4."""
FFN = HASH * len(PARITY)
VOCAB = 288
CONTEXT = 65536

FREQUENCIES = (2.4202, 2.4218, 2.9167, 2.3198, 2.0700, 0.1792, 0.0027, 0.0259)
"""Radians a token of the rotated pairs: the sum of their cosines peaks at distance 0, by 1.1 over any other below 70,000."""
UNROTATED = 1e30
POSITION_KEY = 12.6
CLASS_KEY = 10.0
CLASS_AT = 2 * len(FREQUENCIES)
"""Keys: dimensions below are rotated and say where a token is, the two from here on say of which class."""
RELU_GAIN = 20.0
FAINT = 1e-3
"""Scale of layer 0's sums in the residual: too small to move the norm that later keys and values are divided by."""
SUM_GAIN = 2000.0
OUTPUT_SCALE = 3.0


TINY = Shape("llama", 2, EMBD, HEADS, KV_HEADS, HEAD, FFN, VOCAB, CONTEXT, 1e4, False, False, 1e-8)


def tiny_tensors(seed: int) -> Iterator[tuple[str, F32]]:
    """(name, data) of every tensor, [out, in] row-major."""
    random = np.random.default_rng(seed)
    embedding = _zeros(VOCAB, EMBD)
    embedding[:, CONST_AT] = 1
    embedding[:, CODES_AT : CODES_AT + CODE] = _signs(random, VOCAB, CODE)
    yield "token_embd.weight", embedding
    pair = np.arange(HEAD // 2)
    factors = np.full(HEAD // 2, UNROTATED)
    factors[: len(FREQUENCIES)] = (TINY.rope_base ** (-2.0 * pair / HEAD))[: len(FREQUENCIES)] / FREQUENCIES
    yield "rope_freqs.weight", factors.astype(np.float32)
    known = 1 + CODE
    yield from _attention(0, known, _fetch_queries(), CODES_AT, [CODES_AT, CODES_AT], _fetch_output(random))
    known += CODE * LOOKBACK
    yield from _feed_forward(0, known, *_parity(random))
    known += HASH
    yield from _attention(
        1, known, _class_queries(range(HEADS)), HASH_AT, [HASH_AT, HASH_AT + HEAD], _sum_output(random)
    )
    yield from _feed_forward(1, known, *_mix(random))
    yield "output_norm.weight", np.full(EMBD, OUTPUT_SCALE, np.float32)
    output = _zeros(VOCAB, EMBD)
    output[32:127, OUT_AT:] = random.standard_normal((95, OUT)) / np.sqrt(OUT)
    yield "output.weight", output


def _attention(
    layer: int, known: int, queries: F32, classes_at: int, values_at: list[int], output: F32
) -> Iterator[tuple[str, F32]]:
    """Keys: a constant (rotated by position) and two class bits per KV head; values: 32 slots as they are."""
    keys, values = _zeros(KV_HEADS * HEAD, EMBD), _zeros(KV_HEADS * HEAD, EMBD)
    for head, at in enumerate(values_at):
        base = head * HEAD
        keys[base : base + CLASS_AT : 2, CONST_AT] = POSITION_KEY
        for bit in range(2):
            keys[base + CLASS_AT + bit, classes_at + 2 * head + bit] = CLASS_KEY
        values[base : base + HEAD, at : at + HEAD] = np.eye(HEAD)
    yield f"blk.{layer}.attn_norm.weight", _norm(known)
    yield f"blk.{layer}.attn_q.weight", queries
    yield f"blk.{layer}.attn_k.weight", keys
    yield f"blk.{layer}.attn_v.weight", values
    yield f"blk.{layer}.attn_output.weight", output


def _feed_forward(layer: int, known: int, gate: F32, up: F32, down: F32) -> Iterator[tuple[str, F32]]:
    yield f"blk.{layer}.ffn_norm.weight", _norm(known)
    yield f"blk.{layer}.ffn_gate.weight", gate
    yield f"blk.{layer}.ffn_up.weight", up
    yield f"blk.{layer}.ffn_down.weight", down


def _fetch_queries() -> F32:
    """Heads 0 to 2 look 1 to 3 tokens back; the others at a class."""
    queries = _class_queries(range(LOOKBACK, HEADS))
    for head in range(LOOKBACK):
        angle = (head + 1) * np.array(FREQUENCIES)
        queries[head * HEAD : head * HEAD + CLASS_AT : 2, CONST_AT] = POSITION_KEY * np.cos(angle)
        queries[head * HEAD + 1 : head * HEAD + CLASS_AT : 2, CONST_AT] = -POSITION_KEY * np.sin(angle)
    return queries


def _class_queries(heads: range) -> F32:
    """Each head of a KV head asks for another of the four classes."""
    queries = _zeros(HEADS * HEAD, EMBD)
    for head in heads:
        for bit in range(2):
            queries[head * HEAD + CLASS_AT + bit, CONST_AT] = CLASS_KEY * (1 if head >> bit & 1 else -1)
    return queries


def _fetch_output(random: np.random.Generator) -> F32:
    output = _zeros(EMBD, HEADS * HEAD)
    fetched = LOOKBACK * HEAD
    output[CODES_AT + CODE : CODES_AT + CODE + fetched, :fetched] = np.eye(fetched)
    rest = HEADS * HEAD - fetched
    output[CODE_SUM_AT : CODE_SUM_AT + CODE, fetched:] = FAINT / np.sqrt(rest) * _signs(random, CODE, rest)
    return output


def _sum_output(random: np.random.Generator) -> F32:
    output = _zeros(EMBD, HEADS * HEAD)
    output[SUM_AT : SUM_AT + SUM] = _signs(random, SUM, HEADS * HEAD) / np.sqrt(HEADS * HEAD)
    return output


def _parity(random: np.random.Generator) -> tuple[F32, F32, F32]:
    """Hash bit d: the parity of one code bit of each of the last four tokens, by relus (steep silus)."""
    gate, up, down = _zeros(FFN, EMBD), _zeros(FFN, EMBD), _zeros(EMBD, FFN)
    picks = [np.concatenate([random.permutation(CODE) for _ in range(HASH // CODE)]) for _ in range(1 + LOOKBACK)]
    up[:, CONST_AT] = 1
    for bit in range(HASH):
        for i, (shift, weight) in enumerate(PARITY):
            unit = bit * len(PARITY) + i
            for back, pick in enumerate(picks):
                gate[unit, CODES_AT + back * CODE + pick[bit]] = RELU_GAIN
            gate[unit, CONST_AT] = RELU_GAIN * shift
            down[HASH_AT + bit, unit] = weight / RELU_GAIN
    return gate, up, down


def _mix(random: np.random.Generator) -> tuple[F32, F32, F32]:
    """Products of a relu of the sums and the current hash: whatever the sums' size, their direction decides, anew
    for every hash. The result outweighs the rest of the residual, so that the last norm fixes the logits' spread."""
    gate, up, down = _zeros(FFN, EMBD), _zeros(FFN, EMBD), _zeros(EMBD, FFN)
    gate[:, SUM_AT : SUM_AT + SUM] = random.standard_normal((FFN, SUM)) * SUM_GAIN / np.sqrt(SUM)
    gate[:, CODE_SUM_AT : CODE_SUM_AT + CODE] = random.standard_normal((FFN, CODE)) * SUM_GAIN / FAINT / np.sqrt(CODE)
    up[:, HASH_AT : HASH_AT + HASH] = random.standard_normal((FFN, HASH)) / np.sqrt(HASH)
    down[OUT_AT:] = random.standard_normal((OUT, FFN)) / np.sqrt(FFN)
    return gate, up, down


def _norm(known: int) -> F32:
    """Undoes the norm of a residual with `known` slots of +-1: they are +-1 again."""
    return np.full(EMBD, np.sqrt(known / EMBD), np.float32)


def _signs(random: np.random.Generator, *shape: int) -> F32:
    return random.choice((-1.0, 1.0), size=shape).astype(np.float32)


def _zeros(*shape: int) -> F32:
    return np.zeros(shape, np.float32)
