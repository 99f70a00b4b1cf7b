"""What all requests took together, since start.

Threading: event loop only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from appliance.request import Finished
from appliance.types import Tier


@dataclass
class Totals:
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: dict[Tier, int] = field(default_factory=dict)
    staged_ahead_tokens: int = 0
    """Brought into DRAM while their request waited."""
    preemptions: int = 0
    requeued: int = 0
    """Times a request was put back into the queue because the engine died."""

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - sum(self.cached.values())

    def add(self, prompt_tokens: int, finished: Finished) -> None:
        self.requests += 1
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += finished.completion_tokens
        self.staged_ahead_tokens += finished.staged_ahead
        for tier in Tier:
            self.cached[tier] = self.cached.get(tier, 0) + int(getattr(finished.sources, tier.value))
