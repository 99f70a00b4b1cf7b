"""What of a stored prefix is worth loading.

Invariant: pure. Threading: any.
"""

from __future__ import annotations

from collections.abc import Sequence

from appliance.kv.base import Hit
from appliance.plan.planner import Decision, Piece


def pieces_of(hits: Sequence[Hit]) -> list[Piece]:
    """As the planner sees them."""
    return [Piece(hit.start, hit.start + hit.use_tokens, hit.tier, hit.payload_bytes) for hit in hits]


def wanted(hits: Sequence[Hit], present: int, decision: Decision) -> list[Hit]:
    """What to stage when so many leading tokens are in cells."""
    return [
        hit
        for hit in hits
        if hit.start + hit.use_tokens > present and decision.front_to <= hit.start < decision.load_to
    ]
