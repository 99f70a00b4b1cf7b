"""What a user should know of a model: what its cells cost, and what of its KV cannot be restored and why.

Invariant: one line each, with numbers where there are any. Pure functions of what was probed. Threading: any.
"""

from __future__ import annotations

from typing import Any

from llama_cpp import llama_cpp as ll

from appliance.engine.base import EngineConfig, KVMode
from appliance.engine.llamacpp.cells import RowLayout
from appliance.engine.llamacpp.probe import Probed
from appliance.engine.llamacpp.text import Text

MIB = 2**20


def cell_bytes(config: EngineConfig, context_tokens: int, probed: Probed) -> int:
    """Of all cells: rows for each token, and a state for each sequence."""
    layout = probed.layout
    states = config.max_sequences if probed.mode is KVMode.CHECKPOINT else 0
    return context_tokens * sum(layout.token_bytes) + states * sum(layout.fixed_bytes)


def notes(model: Any, text: Text, config: EngineConfig, context_tokens: int, probed: Probed) -> tuple[str, ...]:
    said = _state_notes(config, probed)
    window_tokens = int(ll.llama_model_n_swa(model))
    if window_tokens and probed.mode is KVMode.ROWS:
        said += _window_notes(window_tokens, context_tokens, probed.port.layout)
    if not text.has_chat_template:
        said.append("the model brings no chat template: ChatML is used")
    if not text.tools.renders:
        said.append("the chat template knows no tools of a known form: a system message describes them")
    train_tokens = int(ll.llama_model_n_ctx_train(model))
    if context_tokens > train_tokens:
        said.append(f"one prompt should stay below the {train_tokens} tokens the model was trained for")
    return tuple(said)


def _state_notes(config: EngineConfig, probed: Probed) -> list[str]:
    layout = probed.layout
    if probed.mode is KVMode.NONE:
        return ["this model's state cannot be taken out and put back: nothing can be kept below hbm"]
    if probed.mode is KVMode.OPAQUE:
        return ["this model's KV is not laid out in rows per token: blocks are restored one by one"]
    if probed.mode is not KVMode.CHECKPOINT:
        return []
    state_mib = sum(layout.fixed_bytes) / MIB
    said = [
        f"this model has a state that cannot be cut: a prompt goes on only where one was kept, each {layout.block_tokens} tokens"
        " and where prompts and answers end, not in between",
        f"a state is {state_mib:,.1f} MiB, in every block and for each of engine.max_sequences = {config.max_sequences}:"
        f" {state_mib * config.max_sequences:,.0f} MiB in all",
    ]
    if layout.block_tokens != config.block_tokens:
        said.append(
            f"blocks have {layout.block_tokens} tokens instead of kv.block_tokens = {config.block_tokens}, for the state's size"
        )
    return said


def _window_notes(window_tokens: int, context_tokens: int, rows: RowLayout | None) -> list[str]:
    """The price of to-the-token reuse: layers with a sliding window keep what only an earlier resume point needs."""
    if rows is None or len(rows.sections) != 2:
        return []
    everything, windowed = rows.token_bytes, rows.sections[1].token_bytes
    return [
        f"layers with a sliding window of {window_tokens} tokens keep all cells, so that a prompt goes on at any token:"
        f" {windowed:,} of {everything:,} bytes per token, {windowed * context_tokens / MIB:,.0f} MiB of cells"
    ]
