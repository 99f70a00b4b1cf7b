"""Responses of the OpenAI API as its clients expect them, with llama-server's timings and our own `kvctl` object.

Invariant: a field is sent when it was set, and only then: null is a value, absence another. Immutable; any thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict


class Body(BaseModel):
    """A response, or a part of one."""

    model_config = ConfigDict(frozen=True)

    def to_json(self) -> bytes:
        return self.__pydantic_serializer__.to_json(self, exclude_unset=True)


class PromptTokensDetails(Body):
    cached_tokens: int


class Usage(Body):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class LlamaTimings(Body):
    """As llama-server reports them: cache_n + prompt_n is the prompt; rates are null when nothing was computed."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float | None
    prompt_per_second: float | None
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float | None
    predicted_per_second: float | None


class Way(Body):
    """One way to a first token, as it was estimated. total_ms also has what other requests take meanwhile."""

    load_to_tokens: int
    compute_first_tokens: int
    """Computed from the front while the blocks behind load; 0: nothing is."""
    load_ms: float
    compute_ms: float
    total_ms: float


class DecisionTaken(Body):
    """Load or recompute, for one prompt: what was chosen, why, and what the choices were estimated to cost."""

    request: str
    """For `kvctl explain`."""
    reason: str
    load_to_tokens: int
    estimated_ms: float
    actual_ms: float
    """What estimated_ms turned out to be."""
    recompute_ms: float
    alternatives: dict[str, Way]
    """The best of each way, by its reason."""


class Explanation(Body):
    """The `kvctl` object: where the prompt's KV came from and where the time went."""

    tokens: dict[str, int]
    """By tier; "computed" is what no tier had."""
    timings_ms: dict[str, float]
    decisions: list[DecisionTaken]
    """One per prompt."""


class Alternative(Body):
    token: str
    logprob: float
    bytes: list[int] | None


class ScoredToken(Alternative):
    top_logprobs: list[Alternative]


class ChatLogprobs(Body):
    content: list[ScoredToken]
    refusal: None = None


class TextLogprobs(Body):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class FunctionCalled(Body):
    """Also a delta: the name comes first and once, then the arguments in pieces."""

    name: str | None = None
    arguments: str


class ToolCalled(Body):
    index: int | None = None
    """In deltas only."""
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCalled


class ChatMessage(Body):
    """Also a delta, with only the fields that are new."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCalled] | None = None


class ChatChoice(Body):
    index: int
    message: ChatMessage | None = None
    delta: ChatMessage | None = None
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class TextChoice(Body):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str | None


class Answer(Body):
    """A whole response or one chunk of a stream, for both endpoints."""

    id: str
    object: Literal["chat.completion", "chat.completion.chunk", "text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: Sequence[ChatChoice | TextChoice]
    usage: Usage | None = None
    timings: LlamaTimings | None = None
    kvctl: Explanation | None = None


class Embedding(Body):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    """Numbers, or their f32le bytes in base64."""


class EmbeddingUsage(Body):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Body):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Model(Body):
    """As OpenAI's clients know it, then what Anthropic's look for."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    """Tokens of prompt and completion together (vLLM's name)."""
    type: Literal["model"]
    display_name: str
    created_at: datetime


class ModelList(Body):
    object: Literal["list"]
    data: list[Model]
    first_id: str
    last_id: str
    has_more: bool


class TokenList(Body):
    tokens: list[int]


class Content(Body):
    content: str
