"""What is where, for a prompt: asked, not changed.

Threading: event loop only.
"""

from __future__ import annotations

from dataclasses import dataclass

from appliance.kv.base import Lookup
from appliance.plan.planner import decide
from appliance.runtime import Runtime
from appliance.types import Namespace, Tier, Tokens
from appliance.wanted import pieces_of


@dataclass(frozen=True)
class Inspection:
    """Spans [start, stop) of the prompt with the fastest tier that holds them; None = must be computed."""

    spans: tuple[tuple[int, int, Tier | None], ...]
    estimated_warm_s: float
    estimated_cold_s: float


async def where(runtime: Runtime, ns: Namespace, tokens: Tokens) -> tuple[int, Lookup]:
    """Tokens of the prompt that are resident, and what the store holds of it."""
    resident = await runtime.engine.resident(runtime.store.root(ns), tokens)
    return resident, runtime.store.lookup(ns, tokens)


async def inspect(runtime: Runtime, ns: Namespace, tokens: Tokens) -> Inspection:
    """Where each token of this prompt is, and what a first token would cost."""
    resident, lookup = await where(runtime, ns, tokens)
    spans: list[tuple[int, int, Tier | None]] = []

    def add(start: int, stop: int, tier: Tier | None) -> None:
        if stop > start:
            if spans and spans[-1][2] == tier:
                start = spans.pop()[0]
            spans.append((start, stop, tier))

    add(0, resident, Tier.HBM)
    for hit in lookup.hits:
        add(max(hit.start, resident), hit.start + hit.use_tokens, hit.tier)
    add(spans[-1][1] if spans else 0, len(tokens), None)
    warm = decide(
        len(tokens), resident, pieces_of(lookup.hits), runtime.cost, both_ends=runtime.engine.info.layout.divisible
    )
    cold = decide(len(tokens), 0, (), runtime.cost)
    return Inspection(tuple(spans), warm.chosen.total_s, cold.chosen.total_s)
