"""What time costs on this box with this model, learned from what really happened.

Two lines, each fitted by least squares with forgetting:

  prefill of positions [a, b)   c0 * (b - a) + c1 * (b*b - a*a) / 2     weights per token, attention per token and depth
  one decode step at depth d    d0 + d1 * d

and per tier seconds = bytes / rate, the rate a moving average. Until something was observed the values of the start
calibration are used; with no rate for a tier, loading from it is assumed to be worth trying once.

Invariant: every estimate is finite and >= 0. Threading: event loop only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from appliance.types import Tier

FORGET = 0.98
"""Weight of the past at each observation: about the last 50 count."""
RATE_SMOOTHING = 0.2
FORGIVE = 1.1
"""A tier that was not worth loading from is thought faster by this each time, until it is tried again."""
MIN_RATE_BYTES = 1 << 20
"""Smaller loads say more about latency than about rate."""
MIN_PREFILL_TOKENS = 64
"""The same of prefills: a few tokens cost as much as many."""


@dataclass
class Line:
    """seconds = slope0 * u + slope1 * v over observations (u, v, seconds), both slopes kept >= 0."""

    slope0: float
    slope1: float = 0.0
    uu: float = 0.0
    uv: float = 0.0
    vv: float = 0.0
    us: float = 0.0
    vs: float = 0.0

    def at(self, u: float, v: float) -> float:
        return max(0.0, self.slope0 * u + self.slope1 * v)

    def observe(self, u: float, v: float, seconds: float) -> None:
        """Each observation is scaled by 1/u, so that a long prefill does not outweigh all short ones."""
        if u <= 0 or seconds <= 0 or not math.isfinite(seconds):
            return
        v, seconds = v / u, seconds / u
        for name, value in (("uu", 1.0), ("uv", v), ("vv", v * v), ("us", seconds), ("vs", v * seconds)):
            setattr(self, name, FORGET * getattr(self, name) + value)
        spread = self.uu * self.vv - self.uv * self.uv
        if spread > 1e-6 * self.uu * self.vv:
            slope1 = (self.uu * self.vs - self.uv * self.us) / spread
            slope0 = (self.us - slope1 * self.uv) / self.uu
            if slope0 >= 0 and slope1 >= 0:
                self.slope0, self.slope1 = slope0, slope1
                return
        # one depth only, or noise that would make a slope negative: keep the depth term, move the constant
        self.slope0 = max(0.0, (self.us - self.slope1 * self.uv) / self.uu)


@dataclass
class CostModel:
    """Estimates for the planner, `kvctl inspect` and X-Kvctl-Explain. All results in seconds."""

    prefill: Line
    decode: Line
    rates: dict[Tier, float] = field(default_factory=dict)
    """Bytes per second from each tier to the engine's cells."""

    @classmethod
    def calibrated(cls, prefill_tokens_per_s: float, decode_step_s: float) -> CostModel:
        return cls(Line(1.0 / max(prefill_tokens_per_s, 1e-9)), Line(max(decode_step_s, 0.0)))

    def prefill_s(self, start: int, stop: int) -> float:
        return self.prefill.at(stop - start, (stop * stop - start * start) / 2) if stop > start else 0.0

    def decode_s(self, depth: int) -> float:
        return self.decode.at(1, depth)

    def load_s(self, tier: Tier, nbytes: int) -> float:
        """0 for a tier never loaded from: unknown is worth a try, and the try is the measurement."""
        rate = self.rates.get(tier, 0.0)
        return nbytes / rate if rate > 0 else 0.0

    def saw_prefill(self, start: int, stop: int, seconds: float) -> None:
        if stop - start < MIN_PREFILL_TOKENS:
            return
        self.prefill.observe(stop - start, (stop * stop - start * start) / 2, seconds)

    def saw_decode(self, depth: int, step_s: float) -> None:
        self.decode.observe(1, depth, step_s)

    def saw_load(self, tier: Tier, nbytes: int, seconds: float) -> None:
        if nbytes < MIN_RATE_BYTES or seconds <= 0:
            return
        rate = nbytes / seconds
        known = self.rates.get(tier)
        self.rates[tier] = rate if known is None else known + RATE_SMOOTHING * (rate - known)

    def passed_over(self, tier: Tier) -> None:
        """Its blocks were computed instead, so it could not show what it can do today."""
        if tier in self.rates:
            self.rates[tier] *= FORGIVE

    def to_json(self) -> dict[str, Any]:
        return {
            "prefill": vars(self.prefill),
            "decode": vars(self.decode),
            "rates": {tier.value: rate for tier, rate in self.rates.items()},
        }

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> CostModel:
        """ValueError, KeyError or TypeError when `saved` is not what to_json wrote."""
        prefill, decode = Line(**saved["prefill"]), Line(**saved["decode"])
        rates = {Tier(name): float(rate) for name, rate in saved["rates"].items()}
        numbers = [*vars(prefill).values(), *vars(decode).values(), *rates.values()]
        if not all(isinstance(n, int | float) and math.isfinite(n) and n >= 0 for n in numbers):
            raise ValueError("a calibration holds finite numbers >= 0")
        return cls(prefill, decode, rates)
