"""Where a request's time went.

Invariant: a pause, from preemption until it computes again, counts as neither prompt nor generation, but it is part of
the time to the first token if it came before that. Threading: event loop only.
"""

from __future__ import annotations

import time

from appliance.request import Timings


class Clock:
    def __init__(self, arrived_s: float) -> None:
        """All times are those of time.perf_counter()."""
        self.load_s = 0.0
        self.compute_s = 0.0
        """Of the engine's steps that computed its prompt."""
        self.beside_s = 0.0
        """Of compute_s: while blocks were loaded."""
        self.paused_s = 0.0
        self._arrived_s = arrived_s
        self._admitted_s: float | None = None
        self._first_token_s: float | None = None
        self._paused_before_first_s = 0.0
        self._pause_began_s: float | None = None
        self._last_token_s = arrived_s

    def admitted(self) -> None:
        """It has cells. Only the first time counts."""
        if self._admitted_s is None:
            self._admitted_s = time.perf_counter()

    def computing(self) -> None:
        """It computes, maybe again."""
        if self._pause_began_s is not None:
            self.paused_s += time.perf_counter() - self._pause_began_s
            self._pause_began_s = None

    def paused(self) -> None:
        self._pause_began_s = time.perf_counter()

    def token(self) -> None:
        """Another one, or the end."""
        self._last_token_s = time.perf_counter()
        if self._first_token_s is None:
            self._first_token_s = self._last_token_s
            self._paused_before_first_s = self.paused_s

    def timings(self, decode_s: float, staged_ahead_s: float) -> Timings:
        """`decode_s`: as the engine measured it, good for a request that was never paused."""
        assert self._admitted_s is not None and self._first_token_s is not None, "it ended"
        if self.paused_s:
            pauses_s = self.paused_s - self._paused_before_first_s
            decode_s = self._last_token_s - self._first_token_s - pauses_s
        return Timings(
            queue_ms=(self._admitted_s - self._arrived_s) * 1e3,
            load_ms=self.load_s * 1e3,
            prompt_ms=(self._first_token_s - self._admitted_s - self._paused_before_first_s) * 1e3,
            predicted_ms=decode_s * 1e3,
            ttft_ms=(self._first_token_s - self._arrived_s) * 1e3,
            staged_ahead_ms=staged_ahead_s * 1e3,
            paused_ms=self.paused_s * 1e3,
            compute_ms=self.compute_s * 1e3,
            service_ms=(self.load_s + self.compute_s - self.beside_s) * 1e3,
        )
