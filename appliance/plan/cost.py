"""What time costs on this box with this model: measured at the first start, learned from what really happens.

Each is a line (line.py):

  prefill of positions [a, b)   c0 * (b - a) + c1 * (b*b - a*a) / 2     weights per token, attention per token and depth
  one decode step at depth d    d0 + d1 * d
  a load of n bytes of a tier   n / rate + latency                      from the tier to the engine's cells

A load beside other requests has a line of its own: the engine moves blocks between their steps. Until something was
measured, loading from a tier is assumed to be worth trying once.

Invariant: every estimate is finite and >= 0. Threading: event loop only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from appliance.plan.line import Line
from appliance.types import Tier

LOAD_FORGET = 0.8
"""Media change faster than compute."""
FORGIVE = 1.1
"""A tier that was not worth loading from is thought faster by this each time, until it is tried again."""
MIN_LOAD_BYTES = 64 * 1024
"""Smaller loads say what the event loop did besides."""
MIN_PREFILL_TOKENS = 64
"""Shorter prefills say little of long ones: a few tokens cost as much as many."""


@dataclass
class CostModel:
    """Estimates for the planner, `kvctl inspect` and X-Kvctl-Explain. All results in seconds."""

    prefill: Line
    decode: Line
    loads: dict[Tier, Line] = field(default_factory=dict)
    """While no other request runs."""
    shared_loads: dict[Tier, Line] = field(default_factory=dict)

    @classmethod
    def calibrated(cls, prefill_tokens_per_s: float, decode_step_s: float) -> CostModel:
        return cls(Line(1.0 / max(prefill_tokens_per_s, 1e-9)), Line(max(decode_step_s, 0.0)))

    # --- estimates -----------------------------------------------------------------------------------------------

    def prefill_s(self, start: int, stop: int) -> float:
        return self.prefill.at(stop - start, (stop * stop - start * start) / 2) if stop > start else 0.0

    def decode_s(self, depth: int) -> float:
        return self.decode.at(1, depth)

    def first_token_s(self, present: int, prompt_tokens: int) -> float:
        """To compute what is missing, the last token always: its step is what even a single one takes."""
        last = prompt_tokens - 1
        return self.prefill_s(present, last) + self.decode_s(last)

    def load_s(self, tier: Tier, nbytes: int, *, shared: bool = False) -> float:
        """0 for a tier never loaded from: unknown is worth a try, and the try is the measurement."""
        line = self._load(tier, shared)
        return line.at(nbytes, 1.0) if line is not None and nbytes > 0 else 0.0

    def _load(self, tier: Tier, shared: bool) -> Line | None:
        alone = self.loads.get(tier)
        return self.shared_loads.get(tier, alone) if shared else alone or self.shared_loads.get(tier)

    # --- observations --------------------------------------------------------------------------------------------

    def saw_prefill(self, start: int, stop: int, seconds: float) -> None:
        if stop - start < MIN_PREFILL_TOKENS:
            return
        self.prefill.observe(stop - start, (stop * stop - start * start) / 2, seconds)

    def saw_decode(self, depth: int, step_s: float) -> None:
        self.decode.observe(1, depth, step_s)

    def saw_load(self, nbytes: dict[Tier, int], seconds: float, *, shared: bool = False) -> None:
        """One load of so many bytes of each tier: of several, each is taken to have had its part as it was expected."""
        if sum(nbytes.values()) < MIN_LOAD_BYTES or seconds <= 0:
            return
        expected = {tier: self.load_s(tier, n, shared=shared) for tier, n in nbytes.items() if n > 0}
        if not all(expected.values()):
            expected = {tier: float(nbytes[tier]) for tier in expected}
        total = sum(expected.values())
        lines = self.shared_loads if shared else self.loads
        for tier, part in expected.items():
            line = lines.get(tier)
            if line is None:
                known = self._load(tier, shared)
                line = Line(known.slope0, known.slope1, LOAD_FORGET) if known else Line(0.0, 0.0, LOAD_FORGET)
                lines[tier] = line
            line.observe(nbytes[tier], 1.0, seconds * part / total)

    def passed_over(self, tier: Tier) -> None:
        """Its blocks were computed instead, so it could not show what it can do today."""
        for lines in (self.loads, self.shared_loads):
            if tier in lines:
                lines[tier].forgive(FORGIVE)

    # --- kept between starts -------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        return {
            "prefill": vars(self.prefill),
            "decode": vars(self.decode),
            "loads": {tier.value: vars(line) for tier, line in self.loads.items()},
            "shared_loads": {tier.value: vars(line) for tier, line in self.shared_loads.items()},
        }

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> CostModel:
        """ValueError, KeyError, TypeError or AttributeError when `saved` is not what to_json wrote."""
        loads, shared_loads = (
            {Tier(name): _line(line) for name, line in saved[key].items()} for key in ("loads", "shared_loads")
        )
        return cls(_line(saved["prefill"]), _line(saved["decode"]), loads, shared_loads)


def _line(saved: dict[str, Any]) -> Line:
    line = Line(**saved)
    if not all(isinstance(n, int | float) and math.isfinite(n) and n >= 0 for n in vars(line).values()):
        raise ValueError("a calibration holds finite numbers >= 0")
    return line
