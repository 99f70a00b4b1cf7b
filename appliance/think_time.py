"""How long the user of a session thinks, and so how likely the next turn comes soon.

Think times are long-tailed: their logarithms are averaged, with exponential weights, and taken to be normal. A session
that had n turns comes back at all with a chance of n / (n + 1). Invariant: pure, no clock. Threading: any.
"""

from __future__ import annotations

import math

TYPICAL_S = 20.0
"""Think time of a user nobody knows yet."""
SPREAD = 1.2
"""Of its logarithm."""
LEAST_SPREAD = 0.3
"""Nobody is a clock."""
WEIGHT = 0.3
"""Of the latest think time, at least."""
SHORTEST_S = 0.05


class ThinkTime:
    def __init__(self) -> None:
        self._seen = 0
        self._mean = math.log(TYPICAL_S)
        self._variance = SPREAD**2

    @property
    def typical_s(self) -> float:
        return math.exp(self._mean)

    def saw(self, gap_s: float) -> None:
        """From the end of an answer to the next prompt."""
        self._seen += 1
        weight = max(WEIGHT, 1 / (self._seen + 1))
        off = math.log(max(gap_s, SHORTEST_S)) - self._mean
        self._mean += weight * off
        self._variance = (1 - weight) * (self._variance + weight * off**2)

    def chance(self, idle_s: float, within_s: float, turns: int) -> float:
        """That the next turn comes within so many seconds, as it did not come for `idle_s`."""
        returns = turns / (turns + 1)
        not_yet = 1 - returns * self._come_by(idle_s)
        return returns * (self._come_by(idle_s + within_s) - self._come_by(idle_s)) / not_yet

    def _come_by(self, seconds: float) -> float:
        """Share of the turns that come, which have come by then."""
        if seconds <= 0:
            return 0.0
        spread = max(math.sqrt(self._variance), LEAST_SPREAD)
        return 0.5 * math.erfc((self._mean - math.log(seconds)) / (spread * math.sqrt(2)))
