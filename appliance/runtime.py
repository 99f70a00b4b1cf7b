"""The request path, and nothing else: lookup, decide, stage, restore, run, write behind.

Only this module knows both halves, the engine and the store. Threading: event loop only.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from appliance.types import FinishReason, Namespace, SamplingParams, Tier, TokenLogprob, Tokens, TokensBySource


@dataclass(frozen=True)
class GenerateRequest:
    request_id: str
    ns: Namespace
    prompt: Tokens
    sampling: SamplingParams


@dataclass(frozen=True)
class Chunk:
    """Newly generated text (whole characters) and its tokens. Either may be empty."""

    text: str
    tokens: Tokens
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Timings:
    """Milliseconds. prompt_ms covers stage, restore and prefill: from admission to the first token."""

    queue_ms: float
    load_ms: float
    prompt_ms: float
    predicted_ms: float
    ttft_ms: float


@dataclass(frozen=True)
class Finished:
    """Always the last event."""

    reason: FinishReason
    completion_tokens: int
    sources: TokensBySource
    timings: Timings


@dataclass(frozen=True)
class Inspection:
    """Spans [start, stop) of the prompt with the fastest tier that holds them; None = must be computed."""

    spans: tuple[tuple[int, int, Tier | None], ...]
    estimated_warm_s: float
    estimated_cold_s: float


@dataclass(frozen=True)
class PrefetchStep:
    found: dict[Tier | None, int]
    moved_tokens: int
    computed_tokens: int
    moved_bytes: int
    done: bool


class Runtime:
    """Methods as the server calls them; see the docstring of each."""

    async def tokenize(self, text: str, *, add_special: bool = True) -> Tokens: ...

    async def render(self, messages: list[dict[str, object]], tools: list[dict[str, object]] | None = None) -> Tokens: ...

    async def detokenize(self, tokens: Tokens) -> str: ...

    def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk | Finished]:
        """Closing the iterator early cancels the request. RequestError, Overloaded, EngineError before the first event
        or (EngineError) between events."""
        raise NotImplementedError

    async def inspect(self, ns: Namespace, tokens: Tokens) -> Inspection: ...

    def prefetch(self, ns: Namespace, tokens: Tokens, *, to: Tier, compute: bool) -> AsyncIterator[PrefetchStep]:
        raise NotImplementedError

    async def evict(self, tier: Tier) -> int: ...
