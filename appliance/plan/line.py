"""A line through what was seen, which forgets, and believes a surprise only when it comes twice.

Invariant: both slopes are finite and >= 0. Threading: event loop only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SURPRISE = 4.0
"""So many times more or less than expected is not believed at once."""
KNOWN = 3
"""Observations before anything can be a surprise."""


@dataclass
class Line:
    """seconds = slope0 * u + slope1 * v over observations (u, v, seconds), both slopes kept >= 0."""

    slope0: float
    slope1: float = 0.0
    forget: float = 0.98
    """Weight of the past at each observation: about the last 1 / (1 - forget) count."""
    uu: float = 0.0
    uv: float = 0.0
    vv: float = 0.0
    us: float = 0.0
    vs: float = 0.0
    seen: int = 0
    doubted: int = 0
    """The last observation was a surprise: 1 slower, 2 faster, 0 none."""

    def at(self, u: float, v: float) -> float:
        return max(0.0, self.slope0 * u + self.slope1 * v)

    def observe(self, u: float, v: float, seconds: float) -> None:
        """Each observation is scaled by 1/u, so that a long one does not outweigh all short ones."""
        if u <= 0 or seconds <= 0 or not math.isfinite(seconds) or self._surprising(u, v, seconds):
            return
        self.seen += 1
        v, seconds = v / u, seconds / u
        for name, value in (("uu", 1.0), ("uv", v), ("vv", v * v), ("us", seconds), ("vs", v * seconds)):
            setattr(self, name, self.forget * getattr(self, name) + value)
        spread = self.uu * self.vv - self.uv * self.uv
        if spread > 1e-6 * self.uu * self.vv:
            slope1 = (self.uu * self.vs - self.uv * self.us) / spread
            slope0 = (self.us - slope1 * self.uv) / self.uu
            if slope0 >= 0 and slope1 >= 0:
                self.slope0, self.slope1 = slope0, slope1
                return
        # one place only, or noise that would make a slope negative: move both by what they are off together
        expected = self.slope0 * self.uu + self.slope1 * self.uv
        if expected > 0:
            self._scale(self.us / expected)
        else:
            self.slope0 = self.us / self.uu

    def forgive(self, factor: float) -> None:
        """It is thought cheaper by this, and what was seen counts less."""
        self._scale(1 / factor)
        for name in ("uu", "uv", "vv", "us", "vs"):
            setattr(self, name, getattr(self, name) / factor**2)
        for name in ("us", "vs"):
            setattr(self, name, getattr(self, name) / factor)

    def _surprising(self, u: float, v: float, seconds: float) -> bool:
        """Whether to wait for a second one. Then the past is as good as forgotten: another medium, another load."""
        expected = self.at(u, v)
        if self.seen < KNOWN or expected <= 0:
            return False
        ratio = seconds / expected
        if 1 / SURPRISE <= ratio <= SURPRISE:
            self.doubted = 0
            return False
        direction = 1 if ratio > 1 else 2
        if self.doubted != direction:
            self.doubted = direction
            return True
        self.doubted = 0
        self._scale(ratio)
        self.uu = self.uv = self.vv = self.us = self.vs = 0.0
        return False

    def _scale(self, factor: float) -> None:
        self.slope0 *= factor
        self.slope1 *= factor
