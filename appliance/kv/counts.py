"""The counters of one tier, kept under their metric names in the store's own. Event loop only."""

from __future__ import annotations

from collections import Counter

from appliance.errors import TierError, TierFull
from appliance.types import Tier

EVICTED = ("capacity", "quota", "expired", "asked")
"""Why blocks go: room for others, a tenant's quota, nobody wanted them for longer, an operator's wish."""


class TierCounts:
    def __init__(self, counts: Counter[str], tier: Tier) -> None:
        self._counts = counts
        self._tier = tier
        for why in EVICTED:
            self.evicted(why, 0)

    def add(self, name: str, amount: float) -> None:
        self._counts[f'{name}{{tier="{self._tier}"}}'] += amount  # type: ignore[assignment]

    def evicted(self, why: str, blocks: int) -> None:
        """`why`: one of EVICTED."""
        self._counts[f'evicted_blocks_total{{tier="{self._tier}",reason="{why}"}}'] += blocks

    def failed(self, error: TierError) -> None:
        """An operation of the medium or its index."""
        self._counts[f'tier_failures_total{{tier="{self._tier}",reason="{reason(error)}"}}'] += 1


def reason(error: TierError) -> str:
    return "full" if isinstance(error, TierFull) else "io"
