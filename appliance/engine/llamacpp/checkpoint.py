"""KV of models with a state that cannot be sliced: recurrent ones, and hybrids of those with attention.

A block holds the rows of its tokens (none in a recurrent model), then the state after its last token as llama.cpp wrote
it. Invariant: a block is exported from a sequence that ends where it ends, and restored whole; of a run of blocks all rows
and the last one's state go in. Threading: compute thread only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llama_cpp import llama_cpp as ll

from appliance.engine.llamacpp.cells import HEADER_BYTES, LayoutError, RowLayout
from appliance.engine.llamacpp.state import PROBE_TOKENS, Export, Restore, StatePort
from appliance.errors import EngineError, RestoreError

MOST_BLOCK_TOKENS = 4096
"""No longer block, however large the state: this far apart are the places where a prompt can go on."""
LAYER_TOKEN_BYTES = 1024
"""KV bytes of a token in one layer of attention as most models have it: two heads of 128, f16."""


class CheckpointPort(StatePort):
    layout: RowLayout

    def __init__(self, context: Any, layout: RowLayout, state_bytes: int) -> None:
        super().__init__(context)
        self.layout = layout
        self.state_bytes = state_bytes

    @classmethod
    def of(cls, context: Any) -> CheckpointPort:
        """By what sequence 0 holds: the first PROBE_TOKENS positions. LayoutError if that is laid out otherwise."""
        partial_bytes = int(ll.llama_state_seq_get_size_ext(context, 0, ll.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY))
        port = cls(context, RowLayout(0, ()), partial_bytes - HEADER_BYTES)
        blob = port.read(0, 0, PROBE_TOKENS)
        rows = blob[: -port.state_bytes]
        port.layout = RowLayout.parse(rows) if len(rows) > HEADER_BYTES else RowLayout(RowLayout.magic_of(blob), ())
        return port

    def export(self, seq: int, start: int, blocks: Export) -> None:
        if len(blocks) != 1:
            raise EngineError("a sequence has one state: blocks are exported one by one")
        n_tokens, target = blocks[0]
        stop = start + n_tokens
        if ll.llama_memory_seq_pos_max(self._memory, seq) != stop - 1:
            raise EngineError("the state at the end of the block is not there")
        blob = self.read(seq, start, stop)
        rows, state = blob[: -self.state_bytes], blob[-self.state_bytes :]
        payload = np.frombuffer(target, np.uint8)
        row_bytes = n_tokens * self.layout.token_bytes
        if len(payload) != row_bytes + self.state_bytes:
            raise EngineError("the buffer is not of the block's size")
        try:
            self.layout.split(rows, start, stop, [payload[:row_bytes]], [n_tokens], 0)
        except LayoutError as error:
            raise EngineError(f"llama.cpp exported an unexpected state: {error}") from None
        payload[row_bytes:] = state

    def restore(self, seq: int, start: int, blocks: Restore) -> None:
        sources = [(n, use, np.frombuffer(source, np.uint8)) for n, use, source in blocks]
        if any(use != n for n, use, _ in sources):
            raise RestoreError("a block with a state is used whole")
        if any(len(source) != n * self.layout.token_bytes + self.state_bytes for n, _, source in sources):
            raise RestoreError("a block is not of the size its tokens need")
        stop = start + sum(n for n, _, _ in sources)
        blob = self._room(self.layout.blob_bytes(stop - start) + self.state_bytes)
        self.layout.join(blob[: -self.state_bytes], start, self._scratch, sources)
        blob[-self.state_bytes :] = sources[-1][2][-self.state_bytes :]
        with self._cleared(self._scratch):
            self._write(blob, stop - 1, stop)  # llama.cpp says of a state where it ends, and of nothing before
            ll.llama_memory_seq_cp(self._memory, self._scratch, seq, start, stop)


def block_tokens_for(least: int, row_bytes: int, state_bytes: int, layers: int, longest: int) -> int:
    """`least`, doubled until a state weighs no more per token than rows do, or would in a model that had only rows.

    Not beyond `longest`, nor beyond MOST_BLOCK_TOKENS.
    """
    token_bytes = max(row_bytes, layers * LAYER_TOKEN_BYTES)
    tokens = least
    while tokens * token_bytes < state_bytes and 2 * tokens <= min(longest, MOST_BLOCK_TOKENS):
        tokens *= 2
    return tokens
