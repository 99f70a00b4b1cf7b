"""Load or recompute: a pure function from what is where and what time costs to a decision.

Invariant: same arguments, same decision; no I/O, no clock, no state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from appliance.plan.cost import CostModel
from appliance.types import Tier


@dataclass(frozen=True)
class Piece:
    """A stored stretch of the prompt, [start, stop), in the fastest tier that holds it."""

    start: int
    stop: int
    tier: Tier
    nbytes: int
    """Bytes to move for it: the whole block, also when it is used in part."""


@dataclass(frozen=True)
class Alternative:
    """What it would take to load [resident, load_to) and compute the rest."""

    load_to: int
    load_s: float
    compute_s: float

    @property
    def total_s(self) -> float:
        return self.load_s + self.compute_s


@dataclass(frozen=True)
class Decision:
    """Load stored blocks up to token `load_to`, compute the rest. `load_to` == resident: load nothing."""

    load_to: int
    reason: str
    """resident | nothing-stored | load | load-part | recompute-is-faster"""
    chosen: Alternative
    recompute: Alternative


def decide(prompt_tokens: int, resident: int, pieces: Sequence[Piece], cost: CostModel) -> Decision:
    """The cheapest way to a first token.

    prompt_tokens: length of the prompt. resident: tokens of it in hbm. pieces: stored blocks from token 0 in order,
    contiguous. At least the last token is always computed, for its logits; it is part of every alternative.
    """
    last = prompt_tokens - 1

    def alternative(load_to: int, load_s: float) -> Alternative:
        present = min(max(load_to, resident), last)
        return Alternative(load_to, load_s, cost.prefill_s(present, last) + cost.decode_s(last))

    recompute = alternative(resident, 0.0)
    if resident >= last:
        return Decision(resident, "resident", recompute, recompute)
    options = [recompute]
    load_s = 0.0
    for piece in pieces:
        if piece.stop <= resident:
            continue
        load_s += cost.load_s(piece.tier, piece.nbytes)
        options.append(alternative(piece.stop, load_s))
    if len(options) == 1:
        return Decision(resident, "nothing-stored", recompute, recompute)
    # on equal cost the longer load wins: compute is what other requests wait for
    best = min(options, key=lambda option: (option.total_s, -option.load_to))
    if best is recompute:
        return Decision(resident, "recompute-is-faster", recompute, recompute)
    reason = "load" if best is options[-1] else "load-part"
    return Decision(best.load_to, reason, best, recompute)
