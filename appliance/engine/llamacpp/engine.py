"""The llama.cpp engine: one context with unified KV cells, through the C API.

Invariant: a restore reaches a live sequence only after its state was accepted whole in a scratch sequence. The highest
sequence ids are scratch, and not part of `info.max_sequences`. Threading: engine/base.py.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from llama_cpp import llama_cpp as ll
from numpy.typing import NDArray

from appliance.engine.base import Engine, EngineConfig, EngineInfo, KVMode, Row, Sampler
from appliance.engine.llamacpp import batching, native
from appliance.engine.llamacpp.calibrate import calibrate, others_running
from appliance.engine.llamacpp.identity import fingerprint
from appliance.engine.llamacpp.notes import cell_bytes, notes
from appliance.engine.llamacpp.probe import Probed, probe
from appliance.engine.llamacpp.sampling import ChainSampler
from appliance.engine.llamacpp.state import SCRATCH_SEQUENCES
from appliance.engine.llamacpp.text import Text
from appliance.errors import EngineError
from appliance.types import BlockLayout, SamplingParams, Tokens

CALIBRATION_TOKENS = 64
DEPTH_TOKENS = 2048
"""Beside so many cells the ways of attention are told apart."""
SLOWEST_TILE_S = 2.0
"""A model that takes longer for a tile is not measured at depth: its weights outweigh attention."""
NO_CELLS = 1
"""What llama_decode answers when there is no room; nothing has changed then."""


class LlamaCppEngine(Engine):
    def __init__(self, config: EngineConfig, on_progress: Callable[[float], None]) -> None:
        self._model = native.load_model(config, on_progress)
        try:
            self._context = native.new_context(self._model, config)
        except EngineError:
            ll.llama_model_free(self._model)
            raise
        self._memory = ll.llama_get_memory(self._context)
        metadata = native.metadata(self._model)
        self._text = Text(self._model, metadata)
        self._batch = _Batch(config.batch_tokens)
        self._threads = Threads(config.threads or 1, config.threads or 1, config.batch_threads or 1)
        self._busy = False
        self._batch_index: list[int] = []
        self._costs: batching.Costs | None = None
        self._spare = config.max_sequences - 1
        first = min(64, self._text.vocab_tokens)
        self._sample_tokens = Tokens.of(i % first for i in range(CALIBRATION_TOKENS))
        probed = probe(self._context, self._model, config.block_tokens, self._compute_sample)
        self._state = probed.port
        self.info = self._describe(config, metadata, probed)
        if probed.mode is KVMode.ROWS and not config.gpu_layers and config.batch_tokens >= batching.TILE_ROWS:
            self._costs = self._measure_costs(probed.layout)

    def _describe(self, config: EngineConfig, metadata: dict[str, str], probed: Probed) -> EngineInfo:
        prefill_tokens = min(CALIBRATION_TOKENS, config.batch_tokens)
        speed = calibrate(
            lambda n: self._timed_batch(1, n),
            lambda n: self._timed_batch(prefill_tokens, n),
            prefill_tokens,
            config.threads,
            config.batch_threads,
        )
        self._threads = Threads(speed.threads, speed.quiet_threads, speed.batch_threads)
        context_tokens = int(ll.llama_n_ctx(self._context))
        layout = probed.layout
        return EngineInfo(
            engine=native.build(),
            model_name=Path(config.model_path).stem,
            description=native.description(self._model),
            vocab_tokens=self._text.vocab_tokens,
            context_tokens=context_tokens,
            max_sequences=config.max_sequences - SCRATCH_SEQUENCES,
            kv_mode=probed.mode,
            layout=layout,
            fingerprint=fingerprint(config, metadata, probed.port.layout, probed.mode, layout),
            threads=speed.threads,
            quiet_threads=speed.quiet_threads,
            batch_threads=speed.batch_threads,
            decode_step_s=speed.decode_step_s,
            prefill_tokens_per_s=speed.prefill_tokens_per_s,
            weight_bytes=int(ll.llama_model_size(self._model)),
            cell_bytes=cell_bytes(config, context_tokens, probed),
            has_chat_template=self._text.has_chat_template,
            tool_format=self._text.tools.form,
            grammars=True,
            embedding_width=int(ll.llama_model_n_embd_out(self._model)),
            pooling=native.pooling(metadata),
            notes=notes(self._model, self._text, config, context_tokens, probed),
        )

    # --- text ----------------------------------------------------------------------------------------------------

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return self._text.tokenize(text, add_special=add_special, parse_special=parse_special)

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[int]:
        return self._text.render(messages, tools, options)

    def piece(self, token: int) -> bytes:
        return self._text.piece(token)

    # --- compute -------------------------------------------------------------------------------------------------

    def groups(self, rows: Sequence[Row]) -> list[list[int]]:
        return batching.groups(self._costs, rows)

    def decode(self, rows: Sequence[Row]) -> None:
        added = batching.filling(self._costs, rows)
        threads = self._threads.batch
        if not added and all(len(row.tokens) == 1 for row in rows):
            # Just before a step somebody still delivers the last token, just after one a next request may arrive: those
            # are over in a millisecond. Whoever is there both times will be there all the time.
            threads = self._threads.quiet
            if self._busy and threads != self._threads.shared and others_running():
                threads = self._threads.shared
        ll.llama_set_n_threads(self._context, threads, threads)
        code = self._decode([*rows, Row(self._spare, 0, self._sample_tokens[:added], False)]) if added else NO_CELLS
        if added:
            self.drop(self._spare)
        if code == NO_CELLS:
            code = self._decode(rows)
        self._busy = self._threads.quiet != self._threads.shared and others_running()
        if code:
            for row in rows:  # part of the batch may have been computed
                self.drop(row.seq, row.start)
            raise EngineError(
                "no free KV cells" if code == NO_CELLS else f"llama.cpp could not compute a batch (code {code})"
            )

    def _decode(self, rows: Sequence[Row]) -> int:
        batch, self._batch_index = self._batch.fill(rows)
        return int(ll.llama_decode(self._context, batch))

    def embed(self, row: Row) -> NDArray[np.float32]:
        threads = self._threads.batch
        ll.llama_set_n_threads(self._context, threads, threads)
        batch, _ = self._batch.fill([row], every_output=True)
        ll.llama_set_embeddings(self._context, True)
        try:
            code = int(ll.llama_decode(self._context, batch))
        finally:
            ll.llama_set_embeddings(self._context, False)
        if code:
            self.drop(row.seq, row.start)
            raise EngineError(f"llama.cpp could not compute an embedding (code {code})")
        vectors = ll.llama_get_embeddings(self._context)
        if not vectors:
            raise EngineError("this model makes no embeddings")
        return np.ctypeslib.as_array(vectors, shape=(len(row.tokens), self.info.embedding_width))

    def logits(self, row: int) -> memoryview:
        return self._logits(row).data

    def new_sampler(self, params: SamplingParams, prompt: Tokens) -> Sampler:
        return ChainSampler(self._context, params, prompt, self._text.end_tokens, self._logits, self._batch_index_of)

    # --- cells ---------------------------------------------------------------------------------------------------

    def link(self, source: int, target: int, start: int, stop: int) -> None:
        ll.llama_memory_seq_cp(self._memory, source, target, start, stop)

    def drop(self, seq: int, start: int = 0) -> None:
        if not ll.llama_memory_seq_rm(self._memory, seq, start, -1):
            ll.llama_memory_seq_rm(self._memory, seq, 0, -1)  # a recurrent state cannot be cut, only forgotten

    def export(self, seq: int, start: int, blocks: Sequence[tuple[int, memoryview]]) -> None:
        self._state.export(seq, start, blocks)

    def restore(self, seq: int, start: int, blocks: Sequence[tuple[int, int, memoryview]]) -> None:
        self._state.restore(seq, start, blocks)

    def close(self) -> None:
        if self._context:
            ll.llama_free(self._context)
            ll.llama_model_free(self._model)
            self._context = self._model = None

    # --- inside --------------------------------------------------------------------------------------------------

    def _batch_index_of(self, row: int) -> int:
        return self._batch_index[row]

    def _logits(self, row: int) -> NDArray[np.float32]:
        pointer = ll.llama_get_logits_ith(self._context, self._batch_index[row])
        if not pointer:
            raise EngineError("this row has no logits")
        return np.ctypeslib.as_array(pointer, shape=(self._text.vocab_tokens,))

    def _compute_sample(self, seq: int, n_tokens: int) -> None:
        self.decode([Row(seq, 0, self._sample_tokens[:n_tokens], True)])

    def _measure_costs(self, layout: BlockLayout) -> batching.Costs | None:
        """None if that would take too long, or cells are too few to see a difference."""
        depth = min(DEPTH_TOKENS, self.info.context_tokens - batching.TILE_ROWS) // layout.block_tokens
        depth *= layout.block_tokens
        slowest_s = batching.TILE_ROWS / self.info.prefill_tokens_per_s
        if depth < layout.block_tokens or slowest_s > SLOWEST_TILE_S:
            return None
        nothing = memoryview(bytes(layout.payload_bytes(layout.block_tokens)))
        blocks = [(layout.block_tokens, layout.block_tokens, nothing)] * (depth // layout.block_tokens)

        def deep() -> None:
            self.restore(0, 0, blocks)  # content does not matter, only that it is there
            self.link(0, 1, 0, depth)

        try:
            return batching.Costs.measured(self._timed_rows, depth, deep)
        finally:
            ll.llama_memory_clear(self._memory, False)

    def _timed_rows(self, n_tokens: int, start: int) -> float:
        """Seconds of a batch that is dropped again: of two tokens, each is a row of its own sequence."""
        tokens = self._sample_tokens[: n_tokens if n_tokens != 2 else 1]
        rows = [Row(seq, start, tokens, True) for seq in range(2 if n_tokens == 2 else 1)]
        began_s = time.perf_counter()
        self.decode(rows)
        ll.llama_synchronize(self._context)
        seconds = time.perf_counter() - began_s
        for row in rows:
            self.drop(row.seq, start)
        return seconds

    def _timed_batch(self, n_tokens: int, threads: int) -> None:
        self._threads = Threads(threads, threads, threads)
        self._compute_sample(0, n_tokens)
        ll.llama_synchronize(self._context)
        ll.llama_memory_clear(self._memory, False)


class Threads(NamedTuple):
    """Of a decode step beside others, of one on a quiet box, and of prefill."""

    shared: int
    quiet: int
    batch: int


class _Batch:
    """One llama_batch, allocated once: every token belongs to one sequence."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._token = np.zeros(size, np.int32)
        self._pos = np.zeros(size, np.int32)
        self._n_seq = np.ones(size, np.int32)
        self._seq = np.zeros(size, np.int32)
        self._seq_ref = self._seq.ctypes.data + np.arange(size, dtype=np.uintp) * self._seq.itemsize
        self._logits = np.zeros(size, np.int8)
        self._batch = ll.llama_batch(
            token=_pointer(self._token, ctypes.c_int32),
            pos=_pointer(self._pos, ctypes.c_int32),
            n_seq_id=_pointer(self._n_seq, ctypes.c_int32),
            seq_id=_pointer(self._seq_ref, ctypes.POINTER(ctypes.c_int32)),
            logits=_pointer(self._logits, ctypes.c_int8),
        )

    def fill(self, rows: Sequence[Row], *, every_output: bool = False) -> tuple[Any, list[int]]:
        """The batch, and the index of each row's last token in it; with outputs of these tokens, or of every one."""
        at = 0
        last = []
        for row in rows:
            stop = at + len(row.tokens)
            assert at < stop <= self._size
            self._token[at:stop] = np.frombuffer(row.tokens.data, "<u4")
            self._pos[at:stop] = np.arange(row.start, row.start + stop - at)
            self._seq[at:stop] = row.seq
            self._logits[at:stop] = every_output
            self._logits[stop - 1] = every_output or row.want_logits
            last.append(stop - 1)
            at = stop
        self._batch.n_tokens = at
        return self._batch, last


def _pointer(array: NDArray[Any], kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))
