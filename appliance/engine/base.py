"""The engine contract: one model's weights and KV cells, driven by one thread.

An Engine knows nothing of requests, tenants, keys or tiers. It computes rows, shares and drops cells, and copies
KV of a token range out of cells and back in. `scheduler.py` decides what to call; `null.py` is the reference.

Threading: `decode`, `embed`, `sample`, `link`, `drop`, `export`, `restore`, `close` are called by the compute thread only.
`tokenize`, `render`, `piece` may be called from any thread at any time.

Cells. A sequence is a dense run of positions [0, length). `link` makes a second sequence share cells without a copy;
a cell is free again when no sequence holds it. The engine does not choose what to drop; it raises `EngineError` when a
decode or restore finds no free cells, and is then unchanged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.chat.tools import ToolFormat
from appliance.types import BlockLayout, Fingerprint, SamplingParams, TokenLogprob, Tokens


class KVMode(str, Enum):
    """What of this model's KV can leave the cells."""

    ROWS = "rows"
    """Rows per token: blocks of a run are exported and restored by one call, and a block may be used in part."""
    OPAQUE = "opaque"
    """One state blob per block: restored one by one, then linked, in part if wanted."""
    CHECKPOINT = "checkpoint"
    """A state beside the rows, or instead of them, that cannot be sliced (hybrid and recurrent models): a block holds the
    rows of its tokens and the state after its last one, so a sequence is exported, shared and continued only where it ends."""
    NONE = "none"
    """The state can neither be sliced nor be taken out and put back: nothing is stored below hbm."""

    def __str__(self) -> str:
        return self.value


class Pooling(str, Enum):
    """How the vectors of a prompt's tokens become one."""

    MEAN = "mean"
    FIRST = "first"
    LAST = "last"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class EngineConfig:
    """What the engine process is told at start. Sent as a msgpack map; no defaults hide here."""

    kind: str
    """llamacpp | null"""
    model_path: str
    model_sha256: bytes
    context_tokens: int
    """KV cells, shared by all sequences."""
    max_sequences: int
    """Sequences that can exist at once: resident, running and scratch. At most 256 for llama.cpp."""
    batch_tokens: int
    """Most tokens in one decode call; a prefill chunk is never larger."""
    shared_batch_tokens: int
    """Most prefill tokens in a step that other streams wait for."""
    prefill_share: float
    """Of the time, for prompts, while other streams decode. In (0, 1]; 1: no bound."""
    block_tokens: int
    gpu_layers: int
    threads: int
    """Decode threads; 0 = calibrate at start."""
    batch_threads: int
    """Prefill threads; 0 = calibrate at start."""
    kv_type_k: str
    kv_type_v: str


@dataclass(frozen=True)
class EngineInfo:
    """What a loaded engine says of itself."""

    engine: str
    """Name and build, e.g. "llama.cpp 0.3.36"."""
    model_name: str
    """API id: the file's stem."""
    description: str
    """Architecture, size and quantisation in words."""
    vocab_tokens: int
    context_tokens: int
    max_sequences: int
    kv_mode: KVMode
    layout: BlockLayout
    fingerprint: Fingerprint
    threads: int
    """Of a decode step while something else wants a core."""
    quiet_threads: int
    """Of a decode step while nothing else does."""
    batch_threads: int
    decode_step_s: float
    """Seconds of a one-token decode at depth 0 with `quiet_threads`, as calibrated."""
    prefill_tokens_per_s: float
    """At shallow depth with `batch_threads`, as calibrated."""
    weight_bytes: int
    cell_bytes: int
    """Bytes of all KV cells."""
    has_chat_template: bool
    tool_format: ToolFormat
    """How the model writes tool calls."""
    grammars: bool
    """Whether its samplers follow SamplingParams.grammar."""
    embedding_width: int
    """Numbers in an embedding; 0: the model makes none."""
    pooling: Pooling
    notes: tuple[str, ...]
    """What a user should know: what cannot be restored for this model, and similar."""


@dataclass(frozen=True)
class Row:
    """One sequence's part of a decode call: `tokens` at positions [start, start + len(tokens))."""

    seq: int
    start: int
    tokens: Tokens
    want_logits: bool
    """Logits after the last token of this row."""


@dataclass(frozen=True)
class Sampled:
    token: int
    is_end: bool
    """An end-of-generation token."""
    logprob: TokenLogprob | None


class Sampler(ABC):
    """State of one request's sampling chain (penalties, random numbers). Compute thread only."""

    @abstractmethod
    def sample(self, row: int) -> Sampled:
        """Choose from the logits of row `row` of the last decode (index into its `rows`) and accept the token."""

    @abstractmethod
    def close(self) -> None: ...


class Engine(ABC):
    info: EngineInfo

    # --- text (any thread) -------------------------------------------------------------------------------------

    @abstractmethod
    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids. `parse_special` turns special-token strings into their ids: for rendered templates only."""

    @abstractmethod
    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[int]:
        """Token ids of the chat template applied, with the generation prompt.

        Messages are those of the OpenAI API: roles system, user, assistant and tool; content as text; an assistant's
        `tool_calls`, with arguments as the text of a JSON object; a result's `tool_call_id`. `options` are handed to the
        template as they are; one that does not know them ignores them.
        Special tokens come from the template only: special-token strings inside the messages stay text.
        RequestError if the template refuses the messages.
        """

    @abstractmethod
    def piece(self, token: int) -> bytes:
        """Bytes of one token; may be part of a UTF-8 character; empty for control tokens, but those that mark a tool call."""

    # --- compute (compute thread) ------------------------------------------------------------------------------

    def groups(self, rows: Sequence[Row]) -> list[list[int]]:
        """Which of the rows to compute in one decode call each, by index, so that all together take least time."""
        return [list(range(len(rows)))]

    @abstractmethod
    def decode(self, rows: Sequence[Row]) -> None:
        """Compute all rows in one call and keep the wanted logits until the next call."""

    @abstractmethod
    def embed(self, row: Row) -> NDArray[np.float32]:
        """Compute the row and return the vectors of its tokens, [tokens, embedding_width]; valid until the next call."""

    @abstractmethod
    def logits(self, row: int) -> memoryview:
        """float32[vocab_tokens] of row `row` of the last decode; valid until the next call."""

    @abstractmethod
    def new_sampler(self, params: SamplingParams, prompt: Tokens) -> Sampler:
        """`prompt` seeds the penalties. RequestError if it cannot follow the parameters."""

    # --- cells (compute thread) --------------------------------------------------------------------------------

    @abstractmethod
    def link(self, source: int, target: int, start: int, stop: int) -> None:
        """Positions [start, stop) of `source` become positions of `target` too, sharing cells.

        With checkpoints `stop` is where `source` ends: `target` takes over its state.
        """

    @abstractmethod
    def drop(self, seq: int, start: int = 0) -> None:
        """Forget positions [start, end) of `seq`. With checkpoints all of them, or none."""

    @abstractmethod
    def export(self, seq: int, start: int, blocks: Sequence[tuple[int, memoryview]]) -> None:
        """Copy KV of consecutive blocks, beginning at position `start`, out of cells.

        Each block is (n_tokens, target); target holds exactly `layout.payload_bytes(n_tokens)` bytes. With checkpoints
        there is one block, and it ends where `seq` ends.
        """

    @abstractmethod
    def restore(self, seq: int, start: int, blocks: Sequence[tuple[int, int, memoryview]]) -> None:
        """Put KV of consecutive blocks into free cells and link them to `seq`, which ends at `start` or is empty.

        An empty `seq` may begin anywhere: its blocks are linked to the sequence they belong to later.
        Each block is (n_tokens, use_tokens, source): the first use_tokens of its n_tokens become visible. Only the last
        block may be used in part, with checkpoints none. All or nothing: on RestoreError `seq` still ends at `start`. The bytes were verified
        by the control process; an engine checks counts and shapes, since it cannot check content.
        """

    @abstractmethod
    def close(self) -> None: ...
