"""Keeps a failing medium out of the way, and lets one try through when it may have recovered.

Invariant: after a failure nothing is allowed until the retry time, which doubles with each try in a row that fails.
No threads, no I/O; its owner serialises calls.
"""

from __future__ import annotations

from collections.abc import Callable

FIRST_RETRY_S = 1.0
LAST_RETRY_S = 60.0


class Breaker:
    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._retry_s = 0.0
        self._retry_at = 0.0

    @property
    def failing(self) -> bool:
        """The last try failed."""
        return self._retry_s > 0

    @property
    def allows(self) -> bool:
        """Works, or it is time to try."""
        return not self.failing or self._monotonic() >= self._retry_at

    def failed(self) -> float:
        """Seconds until the next try. What fails before that began before the failure, and tells nothing new."""
        if self.allows:
            self._retry_s = min(LAST_RETRY_S, max(FIRST_RETRY_S, self._retry_s * 2))
            self._retry_at = self._monotonic() + self._retry_s
        return self._retry_at - self._monotonic()

    def worked(self) -> None:
        self._retry_s = 0.0
