"""KV in and out of a llama.cpp context, through two scratch sequences.

Invariant: scratch sequences are empty between calls, and the target of a restore is untouched until all of its state
was accepted. Buffers are kept: first touch of fresh memory costs more than the copy. Threading: compute thread only.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as ll

from appliance.engine.llamacpp.cells import Bytes, LayoutError, RowLayout
from appliance.errors import EngineError, RestoreError

SCRATCH_SEQUENCES = 2
PROBE_TOKENS = 8
Export = Sequence[tuple[int, memoryview]]
Restore = Sequence[tuple[int, int, memoryview]]


class StatePort(ABC):
    """Export and restore as engine/base.py promises them."""

    layout: RowLayout | None = None

    def __init__(self, context: Any) -> None:
        self._context = context
        self._memory = ll.llama_get_memory(context)
        self._scratch = int(ll.llama_n_seq_max(context)) - 1
        self._buffer = np.empty(0, np.uint8)

    @abstractmethod
    def export(self, seq: int, start: int, blocks: Export) -> None: ...

    @abstractmethod
    def restore(self, seq: int, start: int, blocks: Restore) -> None: ...

    def read(self, seq: int, start: int, stop: int) -> Bytes:
        """The state of positions [start, stop): a view of the buffer, valid until the next call."""
        ll.llama_memory_seq_cp(self._memory, seq, self._scratch, start, stop)
        with self._cleared(self._scratch):
            size = int(ll.llama_state_seq_get_size(self._context, self._scratch))
            blob = self._room(size)
            written = ll.llama_state_seq_get_data(self._context, _address(blob), size, self._scratch)
        if written != size:
            raise EngineError("llama.cpp did not export the state it announced")
        return blob

    def _write(self, blob: Bytes, start: int, stop: int) -> None:
        """Put a state into the scratch sequence. RestoreError if llama.cpp does not say that it then holds [start, stop)."""
        if ll.llama_state_seq_set_data(self._context, _address(blob), len(blob), self._scratch) != len(blob):
            raise RestoreError("llama.cpp refused a state: no free KV cells, or another shape")
        first = ll.llama_memory_seq_pos_min(self._memory, self._scratch)
        last = ll.llama_memory_seq_pos_max(self._memory, self._scratch)
        if (first, last) != (start, stop - 1):
            raise RestoreError("a state holds other positions than it should")

    def _room(self, size: int) -> Bytes:
        if len(self._buffer) < size:
            self._buffer = np.ones(size, np.uint8)  # written, so that every page is there before the copy
        return self._buffer[:size]

    @contextmanager
    def _cleared(self, *sequences: int) -> Iterator[None]:
        try:
            yield
        finally:
            for sequence in sequences:
                ll.llama_memory_seq_rm(self._memory, sequence, -1, -1)


class RowPort(StatePort):
    """Rows per token: a run of blocks is one state."""

    layout: RowLayout

    def __init__(self, context: Any, layout: RowLayout, window_tokens: int, run_tokens: int) -> None:
        super().__init__(context)
        self.layout = layout
        self._room(layout.blob_bytes(run_tokens))
        self._window_tokens = window_tokens
        """0, or the sliding window: a state leaves out what its last token cannot see, so none may span more."""

    def export(self, seq: int, start: int, blocks: Export) -> None:
        n_tokens = [n for n, _ in blocks]
        targets = [np.frombuffer(target, np.uint8) for _, target in blocks]
        begins = [start + sum(n_tokens[:i]) for i in range(len(blocks))]
        stop = start + sum(n_tokens)
        at = start
        while at < stop:
            end = min(stop, (at // self._window_tokens + 1) * self._window_tokens) if self._window_tokens else stop
            reached = [i for i, begin in enumerate(begins) if begin < end and begin + n_tokens[i] > at]
            first, last = reached[0], reached[-1] + 1
            try:
                blob = self.read(seq, at, end)
                self.layout.split(blob, at, end, targets[first:last], n_tokens[first:last], at - begins[first])
            except LayoutError as error:
                raise EngineError(f"llama.cpp exported an unexpected state: {error}") from None
            at = end

    def restore(self, seq: int, start: int, blocks: Restore) -> None:
        used = sum(n for _, n, _ in blocks)
        sources = [(n, use, np.frombuffer(source, np.uint8)) for n, use, source in blocks]
        if any(len(source) != n * self.layout.token_bytes for n, _, source in sources):
            raise RestoreError("a block is not of the size its tokens need")
        blob = self._room(self.layout.blob_bytes(used))
        self.layout.join(blob, start, self._scratch, sources)
        with self._cleared(self._scratch):
            self._write(blob, start, start + used)
            ll.llama_memory_seq_cp(self._memory, self._scratch, seq, start, start + used)


class OpaquePort(StatePort):
    """One state per block, bytes as llama.cpp wrote them: restored one by one and gathered in a second scratch."""

    def __init__(self, context: Any, fixed_bytes: int, token_bytes: int) -> None:
        super().__init__(context)
        self._fixed_bytes = fixed_bytes
        self._token_bytes = token_bytes
        self._gather = self._scratch - 1

    def export(self, seq: int, start: int, blocks: Export) -> None:
        for n_tokens, target in blocks:
            blob = self.read(seq, start, start + n_tokens)
            if len(blob) != self._fixed_bytes + n_tokens * self._token_bytes:
                raise EngineError("llama.cpp exported a state of unexpected size")
            np.frombuffer(target, np.uint8)[:] = blob
            start += n_tokens

    def restore(self, seq: int, start: int, blocks: Restore) -> None:
        at = start
        with self._cleared(self._scratch, self._gather):
            for n_tokens, use_tokens, source in blocks:
                blob = np.frombuffer(source, np.uint8)
                if len(blob) != self._fixed_bytes + n_tokens * self._token_bytes:
                    raise RestoreError("a block is not of the size its tokens need")
                self._write(blob, at, at + n_tokens)
                ll.llama_memory_seq_cp(self._memory, self._scratch, self._gather, at, at + use_tokens)
                at += use_tokens
            ll.llama_memory_seq_cp(self._memory, self._gather, seq, start, at)


class NoPort(StatePort):
    """A state that cannot be sliced: the scheduler never asks, as KVMode.NONE says."""

    def export(self, seq: int, start: int, blocks: Export) -> None:
        raise EngineError("this model's state cannot be exported in blocks")

    def restore(self, seq: int, start: int, blocks: Restore) -> None:
        raise RestoreError("this model's state cannot be restored from blocks")


def _address(blob: Bytes) -> Any:
    return ctypes.cast(blob.ctypes.data, ctypes.POINTER(ctypes.c_uint8))
