"""A recorded trace: what was asked of the cache and when, without content. JSON lines: a header, then one event a request.

Blocks are numbered in the order in which they were first seen, tenants too, so a trace holds sizes, times and equality of
prefixes and nothing else: neither tokens nor names that a key could open. A path is the full blocks of prompt and answer
from token 0 on, as ranges of consecutive numbers.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from appliance.api.control import Model


class TraceHeader(Model):
    trace: Literal["kvctl"] = "kvctl"
    version: Literal[1] = 1
    started: str
    """UTC, ISO 8601."""
    block_tokens: int = Field(ge=1)
    block_bytes: int = Field(ge=1)
    """KV payload of a full block."""
    prefill_token_s: float = Field(ge=0)
    """Seconds to compute one token at depth 0."""
    prefill_depth_s: float = Field(ge=0)
    """What each token before it adds to that."""
    bytes_per_s: dict[Literal["dram", "nvme"], float]
    """From each tier into the engine; a tier that was never loaded from is left out."""


class TraceEvent(Model):
    t: float = Field(ge=0)
    """Seconds since the recording began."""
    tenant: int = Field(ge=0)
    path: list[tuple[int, int]]
    """First and last number of each range."""
    prompt_blocks: int = Field(ge=0)
    """So many blocks of the path are the prompt's; the others hold the answer."""
    prompt_tokens: int = Field(ge=0)


class Replayed(BaseModel):
    """What one choice of policy and sizes would have made of a trace."""

    policy: str
    dram_bytes: int
    nvme_bytes: int
    requests: int = 0
    block_events: int = 0
    """Blocks of all paths."""
    prompt_blocks: int = 0
    dram_blocks: int = 0
    """Of the prompts' blocks, found there."""
    nvme_blocks: int = 0
    reusable_blocks: int = 0
    """What tiers without a bound would have found."""
    evicted_dram: int = 0
    evicted_nvme: int = 0
    compute_s: float = 0.0
    """To compute what was not found."""
    load_s: float = 0.0
    saved_s: float = 0.0
    """Against computing everything."""

    @property
    def hit_share(self) -> float:
        return (self.dram_blocks + self.nvme_blocks) / max(1, self.prompt_blocks)

    @property
    def reusable_share(self) -> float:
        """Found, of what tiers without a bound would have found."""
        return (self.dram_blocks + self.nvme_blocks) / max(1, self.reusable_blocks)
