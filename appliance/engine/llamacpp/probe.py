"""Finds out, on a few tokens, how a model's state can leave the cells and come back.

Invariant: what a port was chosen for was tried on this very context; the cells are empty again afterwards. Threading:
compute thread, before it serves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llama_cpp import llama_cpp as ll

from appliance.engine.base import KVMode
from appliance.engine.llamacpp.cells import LayoutError, RowLayout
from appliance.engine.llamacpp.checkpoint import CheckpointPort, block_tokens_for
from appliance.engine.llamacpp.state import PROBE_TOKENS, NoPort, OpaquePort, RowPort, StatePort
from appliance.errors import KvctlError
from appliance.types import BlockLayout

RUN_BLOCKS = 16
"""Full blocks for which the buffer is ready from the start; longer runs make it grow."""


class Probed(NamedTuple):
    mode: KVMode
    port: StatePort
    layout: BlockLayout


def probe(context: Any, model: Any, block_tokens: int, compute: Callable[[int, int], None]) -> Probed:
    """`block_tokens` is the least; blocks that hold a state are longer."""
    memory = ll.llama_get_memory(context)
    compute(0, PROBE_TOKENS)
    try:
        if ll.llama_model_is_recurrent(model) or ll.llama_model_is_hybrid(model):
            return _with_state(context, model, block_tokens)
        raw = NoPort(context)
        one, two = (len(raw.read(0, 0, n)) for n in (1, 2))
        try:
            layout = RowLayout.parse(raw.read(0, 0, PROBE_TOKENS))
            rows = RowPort(context, layout, int(ll.llama_model_n_swa(model)), RUN_BLOCKS * block_tokens)
            _check_rows(rows)
        except (LayoutError, KvctlError):
            port = OpaquePort(context, 2 * one - two, two - one)
            return Probed(KVMode.OPAQUE, port, BlockLayout(block_tokens, (two - one,), (2 * one - two,)))
        return Probed(KVMode.ROWS, rows, BlockLayout(block_tokens, (layout.token_bytes,), (0,)))
    finally:
        ll.llama_memory_clear(memory, True)


def _with_state(context: Any, model: Any, block_tokens: int) -> Probed:
    try:
        port = CheckpointPort.of(context)
        _check_checkpoint(port)
    except (LayoutError, KvctlError):
        return Probed(KVMode.NONE, NoPort(context), BlockLayout(block_tokens, (0,), (0,)))
    row_bytes, state_bytes = port.layout.token_bytes, port.state_bytes
    longest = int(ll.llama_n_ctx(context)) // 4
    block_tokens = block_tokens_for(block_tokens, row_bytes, state_bytes, int(ll.llama_model_n_layer(model)), longest)
    return Probed(KVMode.CHECKPOINT, port, BlockLayout(block_tokens, (row_bytes,), (state_bytes,), divisible=False))


def _check_rows(port: RowPort) -> None:
    """LayoutError unless the rows of a range are the same in one state and in two, also after a restore."""
    cut = PROBE_TOKENS // 2 + 1
    row = port.layout.token_bytes
    whole = bytearray(PROBE_TOKENS * row)
    front, back, again = bytearray(cut * row), bytearray((PROBE_TOKENS - cut) * row), bytearray(len(whole))
    port.export(0, 0, [(PROBE_TOKENS, memoryview(whole))])
    port.export(0, 0, [(cut, memoryview(front)), (PROBE_TOKENS - cut, memoryview(back))])
    port.restore(1, 0, [(cut, cut, memoryview(front)), (PROBE_TOKENS - cut, PROBE_TOKENS - cut, memoryview(back))])
    port.export(1, 0, [(PROBE_TOKENS, memoryview(again))])
    halves = [bytearray(cut * row), bytearray((PROBE_TOKENS - cut) * row)]
    port.export(0, 0, [(cut, memoryview(halves[0]))])
    port.export(0, cut, [(PROBE_TOKENS - cut, memoryview(halves[1]))])
    if not (again == whole and halves == [front, back]):
        raise LayoutError("rows depend on the range they were exported in")


def _check_checkpoint(port: CheckpointPort) -> None:
    """LayoutError unless a block comes back as it was, also one that does not begin the sequence."""
    for start, seq in ((0, 1), (PROBE_TOKENS // 2 + 1, 2)):
        n = PROBE_TOKENS - start
        payload, again = (bytearray(n * port.layout.token_bytes + port.state_bytes) for _ in range(2))
        port.export(0, start, [(n, memoryview(payload))])
        port.restore(seq, start, [(n, n, memoryview(payload))])
        port.export(seq, start, [(n, memoryview(again))])
        if again != payload:
            raise LayoutError("a restored state is not what was exported")
