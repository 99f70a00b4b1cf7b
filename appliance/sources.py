"""Where the KV of a prompt came from, token by token.

Invariant: a position counts once, for what first put it into cells, however often it is brought back later.
Threading: event loop only.
"""

from __future__ import annotations

from appliance.types import Tier, TokensBySource


class Sources:
    def __init__(self, prompt_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._reach = 0
        self._by_tier: dict[Tier, int] = {}

    def reached(self, stop: int, tier: Tier | None) -> None:
        """Positions up to `stop` are in cells; those that were not yet came from `tier`, or were computed if it is None."""
        gained = min(stop, self._prompt_tokens) - self._reach
        if gained <= 0:
            return
        self._reach += gained
        if tier is not None:
            self._by_tier[tier] = self._by_tier.get(tier, 0) + gained

    def total(self, computed: int | None, *, complete: bool) -> TokensBySource:
        """`computed`: prompt tokens that were prefilled; None: all that came from no tier. `complete`: the prompt was in
        cells, to its last token."""
        by_tier = dict(self._by_tier)
        if computed is None:
            computed = max(self._prompt_tokens - sum(by_tier.values()), 1) if complete else 0
        surplus = sum(by_tier.values()) + computed - self._prompt_tokens
        if complete and surplus < 0:  # taken over, in cells, from requests that computed it meanwhile
            by_tier[Tier.HBM] = by_tier.get(Tier.HBM, 0) - surplus
        for tier in reversed(list(by_tier)):  # the last token is computed again for its logits
            taken = min(max(surplus, 0), by_tier[tier])
            by_tier[tier] -= taken
            surplus -= taken
        return TokensBySource(**{tier.value: count for tier, count in by_tier.items()}, computed=computed)
