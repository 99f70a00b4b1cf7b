"""The reference engine: no model, real KV bytes. It is the executable meaning of base.py.

A token's KV row is real bytes in a real cell, chained: row = state * C, where state = previous_state * M + mix(token) and
previous_state is read back from the previous row's bytes. Logits are a function of every row of the sequence as it
stands in its cells. With checkpoints previous_state comes from a state beside the cells instead, one for each sequence. Invariant: one wrong, missing or misplaced KV byte changes the logits, so the completion; the same
rows give the same logits however the prompt was batched.

Vocabulary: 256 byte tokens, then SPECIALS. Completions are printable ASCII. The end token is chosen only after byte 4
(end of transmission), or when logit_bias asks for it.

Threading: as base.py says.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from appliance.chat.instructed import instructed
from appliance.chat.tools import ToolFormat
from appliance.engine.base import Engine, EngineConfig, EngineInfo, KVMode, Pooling, Row, Sampled, Sampler
from appliance.engine.sampling import Chain, Logits
from appliance.errors import EngineError, RequestError, RestoreError
from appliance.types import BlockLayout, Fingerprint, SamplingParams, Tokens

SPECIALS = ("<|end|>", "<|begin|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
END, BEGIN = 256, 257
VOCAB_TOKENS = 256 + len(SPECIALS)
END_TRIGGER = 4
EMBEDDING_WIDTH = 16
HEADER_BYTES = 8
"""Each frame of a block begins with its token count and its position, u32le each."""

_SPECIAL_IDS = {text: 256 + i for i, text in enumerate(SPECIALS)}
_SPECIAL_PATTERN = re.compile("(" + "|".join(map(re.escape, SPECIALS)) + ")")
_PRINTABLE = slice(32, 127)
_MULTIPLIER = 0xD1342543DE82EF95
_WORD = 2**64

U64 = npt.NDArray[np.uint64]


def create(config: EngineConfig, on_progress: Callable[[float], None]) -> NullEngine:
    engine = NullEngine(config)
    on_progress(1.0)
    return engine


def _mix(values: U64) -> U64:
    """splitmix64: a bijection on 64-bit words."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def _powers(base: int, count: int) -> U64:
    """base**0 .. base**(count - 1) modulo 2**64."""
    factors = np.full(count, base % _WORD, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


class _Codec:
    """state <-> row. unfold(fold(state)) == state, and any change of one byte of a row changes its state."""

    def __init__(self, words: int) -> None:
        odd = _mix(np.arange(2 * words, dtype=np.uint64)) | np.uint64(1)
        self._out, self._in = odd[:words].copy(), odd[words:].copy()
        rest = sum(int(a) * int(b) for a, b in zip(self._out[1:], self._in[1:], strict=True))
        self._out[0] = (1 - rest) * pow(int(self._in[0]), -1, _WORD) % _WORD  # so that out . in == 1

    def rows(self, states: U64) -> U64:
        rows: U64 = states[:, None] * self._out
        return rows

    def states(self, rows: U64) -> U64:
        states: U64 = (rows * self._in).sum(axis=1, dtype=np.uint64)
        return states


class _Sequence:
    """Cells of positions [base, base + len), and the digest of its first `digested` rows. Only blocks aside have a base.

    `state` is kept with checkpoints: a row of no cell.
    """

    def __init__(self) -> None:
        self.base = 0
        self.cells = np.empty(0, np.int64)
        self.digested = 0
        self.digest = 0
        self.state: U64 | None = None


class NullSampler(Sampler):
    def __init__(self, engine: NullEngine, chain: Chain) -> None:
        self._engine = engine
        self._chain = chain

    def sample(self, row: int) -> Sampled:
        token, logprob = self._chain.choose(np.frombuffer(self._engine.logits(row), np.float32))
        return Sampled(token, token == END, logprob)

    def close(self) -> None: ...


class NullEngine(Engine):
    def __init__(
        self, config: EngineConfig, *, token_bytes: int = 64, frames: int = 1, checkpoints: bool = False
    ) -> None:
        assert token_bytes % (8 * frames) == 0, "a row is whole words in every frame"
        self._words = token_bytes // 8
        self._codec = _Codec(self._words)
        self._rows = np.zeros((config.context_tokens, self._words), np.uint64)
        self._holders = np.zeros(config.context_tokens, np.int32)
        self._free = np.arange(config.context_tokens - 1, -1, -1, dtype=np.int64)
        self._n_free = config.context_tokens
        self._sequences = [_Sequence() for _ in range(config.max_sequences)]
        self._power = _powers(_MULTIPLIER, config.batch_tokens + 1)
        self._inverse = _powers(pow(_MULTIPLIER, -1, _WORD), config.batch_tokens + 1)
        self._logits: list[Logits | None] = []
        self._checkpoints = checkpoints
        fixed_bytes = HEADER_BYTES + (token_bytes // frames if checkpoints else 0)
        row_bytes = (token_bytes // frames,) * frames
        layout = BlockLayout(config.block_tokens, row_bytes, (fixed_bytes,) * frames, divisible=not checkpoints)
        self.info = _info(config, layout)

    # --- text ---------------------------------------------------------------------------------------------------

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        ids = [BEGIN] if add_special else []
        for part in _SPECIAL_PATTERN.split(text) if parse_special else [text]:
            if parse_special and part in _SPECIAL_IDS:
                ids.append(_SPECIAL_IDS[part])
            else:
                ids.extend(part.encode("utf-8", "replace"))
        return ids

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[int]:
        ids = [BEGIN]
        for message in instructed(messages, tools or ()):
            role, content = message.get("role"), message.get("content")
            if f"<|{role}|>" not in SPECIALS[2:] or not isinstance(content, str):
                raise RequestError("a message is text by system, user, assistant or tool", param="messages")
            ids += [_SPECIAL_IDS[f"<|{role}|>"], *content.encode("utf-8", "replace"), END]
        return [*ids, _SPECIAL_IDS["<|assistant|>"]]

    def piece(self, token: int) -> bytes:
        return bytes((token,)) if token < 256 else b""

    # --- compute ------------------------------------------------------------------------------------------------

    def decode(self, rows: Sequence[Row]) -> None:
        if sum(len(row.tokens) for row in rows) > self._n_free:
            raise EngineError("no free cells")
        tokens = [np.frombuffer(row.tokens.data, "<u4").astype(np.uint64) for row in rows]
        if any(ids.max() >= VOCAB_TOKENS for ids in tokens):
            raise EngineError("token id out of range")
        self._logits = [self._compute(row, ids) for row, ids in zip(rows, tokens, strict=True)]

    def _compute(self, row: Row, ids: U64) -> Logits | None:
        sequence = self._sequences[row.seq]
        assert sequence.base == 0 and row.start == len(sequence.cells), "a row continues its sequence"
        n = len(ids)
        assert 0 < n < len(self._power), "a decode call holds at most batch_tokens"
        before = self._state_before(sequence)
        states = self._power[1 : n + 1] * (before + np.cumsum(_mix(ids) * self._inverse[1 : n + 1], dtype=np.uint64))
        cells = self._allocate(n)
        self._rows[cells] = self._codec.rows(states)
        sequence.cells = np.concatenate((sequence.cells, cells))
        if self._checkpoints:
            sequence.state = self._codec.rows(states[-1:])[0]
        return self._logits_of(sequence, int(ids[-1])) if row.want_logits else None

    def _state_before(self, sequence: _Sequence) -> np.uint64:
        """Of the previous row as it stands in its cell, or of what is kept beside the cells."""
        if self._checkpoints:
            rows = np.empty((0, self._words), np.uint64) if sequence.state is None else sequence.state[None]
        else:
            rows = self._rows[sequence.cells[-1:]]
        state: np.uint64 = self._codec.states(rows)[0] if len(rows) else np.uint64(0)
        return state

    def _logits_of(self, sequence: _Sequence, last_token: int) -> Logits:
        start, stop = sequence.digested, len(sequence.cells)
        states = _mix(self._codec.states(self._rows[sequence.cells[start:]]))
        places = _mix(np.arange(start, stop, dtype=np.uint64)) | np.uint64(1)
        sequence.digest = (sequence.digest + int((states * places).sum(dtype=np.uint64))) % _WORD
        sequence.digested = stop
        noise = _mix(np.arange(VOCAB_TOKENS, dtype=np.uint64) ^ np.uint64(sequence.digest))
        logits: Logits = (noise >> np.uint64(40)).astype(np.float32) * np.float32(8 / 2**24)  # in [0, 8)
        logits[: _PRINTABLE.start] -= 50
        logits[_PRINTABLE.stop :] -= 50
        if last_token == END_TRIGGER:
            logits[END] = 50
        return logits

    def embed(self, row: Row) -> npt.NDArray[np.float32]:
        self.decode([row])
        cells = self._sequences[row.seq].cells[row.start :]
        states = self._codec.states(self._rows[cells])[:, None]
        noise = _mix(states ^ np.arange(1, EMBEDDING_WIDTH + 1, dtype=np.uint64))
        vectors: npt.NDArray[np.float32] = (noise >> np.uint64(40)).astype(np.float32) * np.float32(
            2**-23
        ) - np.float32(1)
        return vectors

    def logits(self, row: int) -> memoryview:
        logits = self._logits[row]
        assert logits is not None, "the row did not ask for logits"
        return logits.data

    def new_sampler(self, params: SamplingParams, prompt: Tokens) -> Sampler:
        if any(not 0 <= token < VOCAB_TOKENS for token, _ in params.logit_bias):
            raise RequestError("logit_bias names a token that does not exist", param="logit_bias")
        if params.grammar is not None:
            raise RequestError("the null engine follows no grammar", param="grammar")
        return NullSampler(self, Chain(params, prompt, END))

    # --- cells --------------------------------------------------------------------------------------------------

    def link(self, source: int, target: int, start: int, stop: int) -> None:
        base = self._sequences[source].base
        cells = self._sequences[source].cells[start - base : stop - base]
        sequence = self._sequences[target]
        assert start == len(sequence.cells) and len(cells) == stop - start, "sequences are dense"
        if self._checkpoints:
            assert stop == base + len(self._sequences[source].cells), "a state is that of the end"
            sequence.state = self._sequences[source].state
        self._holders[cells] += 1
        sequence.cells = np.concatenate((sequence.cells, cells))

    def drop(self, seq: int, start: int = 0) -> None:
        sequence = self._sequences[seq]
        dropped = sequence.cells[max(0, start - sequence.base) :]
        sequence.cells = sequence.cells[: max(0, start - sequence.base)].copy()
        assert not (self._checkpoints and len(dropped) and len(sequence.cells)), "a state cannot be cut"
        if not len(sequence.cells):
            sequence.base = 0
            sequence.state = None
        if start < sequence.digested:
            sequence.digested = sequence.digest = 0
        self._holders[dropped] -= 1
        freed = dropped[self._holders[dropped] == 0]
        self._free[self._n_free : self._n_free + len(freed)] = freed
        self._n_free += len(freed)

    def export(self, seq: int, start: int, blocks: Sequence[tuple[int, memoryview]]) -> None:
        cells, state = self._sequences[seq].cells, self._sequences[seq].state
        if self._checkpoints and (len(blocks) != 1 or start + blocks[0][0] != len(cells)):
            raise EngineError("the state at the end of the block is not there")
        for n_tokens, target in blocks:
            if start + n_tokens > len(cells) or len(target) != self.info.layout.payload_bytes(n_tokens):
                raise EngineError("the block is not in cells, or the buffer is not its size")
            rows = self._rows[cells[start : start + n_tokens]]
            if state is not None:
                rows = np.concatenate((rows, state[None]))
            header = np.array((n_tokens, start), "<u4").view(np.uint8)
            for frame, columns in self._frames(target, n_tokens):
                frame[:HEADER_BYTES] = header
                frame[HEADER_BYTES:].view("<u8").reshape(len(rows), -1)[:] = rows[:, columns]
            start += n_tokens

    def restore(self, seq: int, start: int, blocks: Sequence[tuple[int, int, memoryview]]) -> None:
        sequence = self._sequences[seq]
        if not len(sequence.cells):
            sequence.base = start
        assert start == sequence.base + len(sequence.cells), "a restore continues its sequence"
        parts = []
        state = None
        for n_tokens, use_tokens, source in blocks:
            if self._checkpoints and use_tokens != n_tokens:
                raise RestoreError("a block with a state is used whole")
            block = self._read(source, n_tokens, start)
            parts.append(block[:use_tokens])
            state = block[-1] if self._checkpoints else None
            start += n_tokens
        rows = np.concatenate(parts)
        if len(rows) > self._n_free:
            raise RestoreError("no free cells")
        cells = self._allocate(len(rows))
        self._rows[cells] = rows
        sequence.cells = np.concatenate((sequence.cells, cells))
        sequence.state = state

    def _read(self, source: memoryview, n_tokens: int, start: int) -> U64:
        if len(source) != self.info.layout.payload_bytes(n_tokens):
            raise RestoreError("the block is not the size its token count says")
        rows = np.empty((n_tokens + self._checkpoints, self._words), np.uint64)
        for frame, columns in self._frames(source, n_tokens):
            if frame[:HEADER_BYTES].tobytes() != np.array((n_tokens, start), "<u4").tobytes():
                raise RestoreError("the block is of another length or position")
            rows[:, columns] = frame[HEADER_BYTES:].view("<u8").reshape(len(rows), -1)
        return rows

    def _frames(self, payload: memoryview, n_tokens: int) -> list[tuple[npt.NDArray[np.uint8], slice]]:
        """Each frame's bytes, and the words of a row it holds."""
        parts, offset, sizes = [], 0, self.info.layout.frames(n_tokens)
        words = self._words // len(sizes)
        for i, size in enumerate(sizes):
            frame = np.frombuffer(payload, np.uint8, size, offset)
            parts.append((frame, slice(i * words, (i + 1) * words)))
            offset += size
        return parts

    def _allocate(self, n: int) -> npt.NDArray[np.int64]:
        self._n_free -= n
        cells: npt.NDArray[np.int64] = self._free[self._n_free : self._n_free + n][::-1].copy()
        self._holders[cells] = 1
        return cells

    @property
    def free_cells(self) -> int:
        return self._n_free

    def close(self) -> None: ...


def _info(config: EngineConfig, layout: BlockLayout) -> EngineInfo:
    shape = f"null engine|{layout.token_bytes}|{layout.fixed_bytes}|{layout.divisible}".encode()
    return EngineInfo(
        engine="null 1",
        model_name="null",
        description="reference engine: no model, bytes as tokens",
        vocab_tokens=VOCAB_TOKENS,
        context_tokens=config.context_tokens,
        max_sequences=config.max_sequences,
        kv_mode=KVMode.ROWS if layout.divisible else KVMode.CHECKPOINT,
        layout=layout,
        fingerprint=Fingerprint(hashlib.sha256(config.model_sha256).digest(), hashlib.sha256(shape).digest()),
        threads=1,
        quiet_threads=1,
        batch_threads=1,
        decode_step_s=0.0001,
        prefill_tokens_per_s=1e6,
        weight_bytes=0,
        cell_bytes=config.context_tokens * sum(layout.token_bytes),
        has_chat_template=True,
        tool_format=ToolFormat.HERMES,
        grammars=False,
        embedding_width=EMBEDDING_WIDTH,
        pooling=Pooling.MEAN,
        notes=(),
    )
