"""Load or recompute: a pure function from what is where and what time costs to a decision.

Invariant: same arguments, same decision; no I/O, no clock, no state. No listed way is cheaper than the chosen one by more
than anybody notices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from appliance.plan.cost import CostModel
from appliance.types import Tier

UNNOTICED_S = 0.02
"""Such a gain is not worth computing what could be loaded, which other requests wait for, nor doing two things at once."""
INTERFERENCE = 1.15
"""Loading and computing at once, each takes so much longer: both want memory and cores."""


@dataclass(frozen=True)
class Piece:
    """A stored stretch of the prompt, [start, stop), in the fastest tier that holds it."""

    start: int
    stop: int
    tier: Tier
    nbytes: int
    """Bytes to move for it: the whole block, also when it is used in part."""


@dataclass(frozen=True)
class Traffic:
    """What else wants the engine."""

    streams: int = 0
    """They decode; prompts get a share of the time."""
    prefill_share: float = 1.0
    prompts: tuple[int, ...] = ()
    """Tokens left to compute of each other prompt: the shortest goes first."""

    @property
    def shared(self) -> bool:
        return bool(self.streams or self.prompts)


NO_TRAFFIC = Traffic()


@dataclass(frozen=True)
class Alternative:
    """What it would take to load [.., load_to) and compute the rest.

    With `front_to`, tokens up to there are computed while [front_to, load_to) is loaded: from both ends.
    """

    load_to: int
    load_s: float
    compute_s: float
    """All that is computed, the front included."""
    front_to: int = 0
    front_s: float = 0.0
    others_s: float = 0.0
    """What other requests take of the engine meanwhile."""

    @property
    def service_s(self) -> float:
        """What the request itself costs, load and compute one after the other or at once."""
        beside_s = INTERFERENCE * max(self.load_s, self.front_s) if self.front_to else self.load_s
        return beside_s + self.compute_s - self.front_s

    @property
    def total_s(self) -> float:
        """From its cells to its first token."""
        return self.service_s + self.others_s


@dataclass(frozen=True)
class Decision:
    """Load stored blocks up to token `load_to`, compute the rest. `load_to` == resident: load nothing."""

    load_to: int
    reason: str
    """resident | nothing-stored | load | load-part | both | recompute-is-faster"""
    chosen: Alternative
    recompute: Alternative
    alternatives: Mapping[str, Alternative] = field(default_factory=dict)
    """The best of each way that is open, by its reason; the chosen one is among them."""

    @property
    def front_to(self) -> int:
        """Compute up to here while the blocks behind it load; 0: nothing is computed meanwhile."""
        return self.chosen.front_to


def decide(
    prompt_tokens: int,
    resident: int,
    pieces: Sequence[Piece],
    cost: CostModel,
    traffic: Traffic = NO_TRAFFIC,
    *,
    both_ends: bool = True,
) -> Decision:
    """The cheapest way to a first token.

    prompt_tokens: length of the prompt. resident: tokens of it in hbm. pieces: stored blocks from token 0 in order,
    contiguous. At least the last token is always computed, for its logits; it is part of every alternative.
    both_ends: whether the engine may compute the front while the back is loaded.
    """

    def alternative(load_to: int, load_s: float) -> Alternative:
        present = max(load_to, resident)
        return _beside(
            Alternative(load_to, load_s, cost.first_token_s(present, prompt_tokens)),
            prompt_tokens - present,
            cost,
            traffic,
        )

    recompute = alternative(resident, 0.0)
    if resident >= prompt_tokens - 1:
        return Decision(resident, "resident", recompute, recompute, {"resident": recompute})
    stored = [piece for piece in pieces if piece.stop > resident]
    if not stored:
        return Decision(resident, "nothing-stored", recompute, recompute, {"nothing-stored": recompute})
    options: list[tuple[str, Alternative]] = []
    nbytes: dict[Tier, int] = {}
    for piece in stored:
        nbytes[piece.tier] = nbytes.get(piece.tier, 0) + piece.nbytes
        way = "load" if piece is stored[-1] else "load-part"
        options.append((way, alternative(piece.stop, _load_s(nbytes, cost, traffic))))
    options.append(("recompute-is-faster", recompute))
    if both_ends:
        whole = options[len(stored) - 1][1]
        options += [("both", each) for each in _both_ends(prompt_tokens, resident, stored, whole, cost, traffic)]
    best: dict[str, Alternative] = {}
    for way, option in options:
        if way not in best or option.total_s < best[way].total_s:
            best[way] = option
    reason, chosen = _cheapest(options)
    return Decision(chosen.load_to, reason, chosen, recompute, {**best, reason: chosen})


def _cheapest(options: Sequence[tuple[str, Alternative]]) -> tuple[str, Alternative]:
    """The longest load of those that are as cheap as any, as far as anybody notices; both ends only if none is."""
    least_s = min(option.total_s for _, option in options)
    single = [each for each in options if not each[1].front_to and each[1].total_s <= least_s + UNNOTICED_S]
    if single:
        return max(single, key=lambda each: each[1].load_to)
    return min(options, key=lambda each: each[1].total_s)


def _load_s(nbytes: Mapping[Tier, int], cost: CostModel, traffic: Traffic) -> float:
    return sum(cost.load_s(tier, n, shared=traffic.shared) for tier, n in nbytes.items())


def _both_ends(
    prompt_tokens: int, resident: int, stored: Sequence[Piece], whole: Alternative, cost: CostModel, traffic: Traffic
) -> list[Alternative]:
    """Every split of the stored part: compute up to a block's start while it and all behind it load."""
    found: list[Alternative] = []
    nbytes: dict[Tier, int] = {}
    for piece in reversed(stored):
        nbytes[piece.tier] = nbytes.get(piece.tier, 0) + piece.nbytes
        if piece.start <= resident:
            break
        front_s = cost.prefill_s(resident, piece.start)
        option = replace(
            whole,
            load_s=_load_s(nbytes, cost, traffic),
            compute_s=whole.compute_s + front_s,
            front_to=piece.start,
            front_s=front_s,
            others_s=0.0,
        )
        computed = piece.start - resident + prompt_tokens - whole.load_to
        found.append(_beside(option, computed, cost, traffic))
    return found


def _beside(option: Alternative, tokens: int, cost: CostModel, traffic: Traffic) -> Alternative:
    """With what others take of the engine while `tokens` are computed."""
    ahead_s = sum(cost.prefill_s(0, other) for other in traffic.prompts if other <= tokens)
    stretched_s = (option.compute_s + ahead_s) * (1 / traffic.prefill_share - 1) if traffic.streams else 0.0
    return replace(option, others_s=ahead_s + stretched_s)
