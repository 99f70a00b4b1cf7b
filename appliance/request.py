"""The nouns of the request path: what is asked, what comes back piece by piece, and how it ended.

Invariant: immutable values. Safe to use from any thread.
"""

from __future__ import annotations

from dataclasses import dataclass

from appliance.plan.planner import Decision
from appliance.types import FinishReason, Namespace, SamplingParams, TokenLogprob, Tokens, TokensBySource


@dataclass(frozen=True)
class GenerateRequest:
    request_id: str
    ns: Namespace
    prompt: Tokens
    sampling: SamplingParams
    session: str | None = None
    """What the client calls the conversation (`prompt_cache_key`)."""
    retention_s: float | None = None
    """How long its blocks are worth keeping after their last use. None: as the profile says; 0: in memory only."""
    in_pieces: bool = True
    """The client gets text as it comes. False: it gets the whole answer at its end, which may be begun anew until then."""


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
    staged_ahead_ms: float = 0.0
    """Of queue_ms: what staging took that its load did not have to wait for."""
    paused_ms: float = 0.0
    """It was preempted for so long; in ttft_ms and in no other time."""
    compute_ms: float = 0.0
    """Of the engine's steps that computed this prompt, others' rows in them included."""
    service_ms: float = 0.0
    """Load and compute, at once where they were: what its first token cost, without waiting for others."""


@dataclass(frozen=True)
class Finished:
    """Always the last event."""

    reason: FinishReason
    completion_tokens: int
    sources: TokensBySource
    timings: Timings
    decision: Decision
    loaded_bytes: int
    """KV bytes restored from lower tiers."""
    staged_ahead: int = 0
    """Prompt tokens brought into DRAM while it waited; `sources` says from where."""
    stop: str | None = None
    """The stop string that ended it. Content: for the client only."""
