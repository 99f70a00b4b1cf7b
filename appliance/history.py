"""What the last requests were decided to do, what that was expected to take, and what it took.

Invariant: no content, only counts and times; a bounded number of requests. Threading: event loop only.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass

from appliance.request import Finished

KEPT = 2000
CLOSE = 0.25
"""An estimate is close if it is off by no more than this share of what it took,"""
UNNOTICED_S = 0.02
"""or by so little that nobody notices."""


@dataclass(frozen=True)
class Record:
    request_id: str
    tenant: str
    prompt_tokens: int
    ended_s: float
    """Unix time."""
    finished: Finished


@dataclass
class Accuracy:
    """Estimates against what happened, since start."""

    requests: int = 0
    close: int = 0
    error_s: float = 0.0
    """Sum of what they were off by."""
    actual_s: float = 0.0

    def add(self, estimated_s: float, actual_s: float) -> None:
        off_s = abs(estimated_s - actual_s)
        self.requests += 1
        self.close += off_s <= max(CLOSE * actual_s, UNNOTICED_S)
        self.error_s += off_s
        self.actual_s += actual_s


class History:
    def __init__(self) -> None:
        self.service = Accuracy()
        """Load and compute, what the request itself cost."""
        self.first_token = Accuracy()
        """From its cells to its first token, others' work included."""
        self._records: OrderedDict[str, Record] = OrderedDict()

    def add(self, request_id: str, tenant: str, prompt_tokens: int, finished: Finished) -> None:
        self._records[request_id] = Record(request_id, tenant, prompt_tokens, time.time(), finished)
        self._records.move_to_end(request_id)
        while len(self._records) > KEPT:
            self._records.popitem(last=False)
        timings = finished.timings
        if timings.paused_ms or not timings.service_ms:
            return  # what it took then was decided later, or was never begun
        chosen = finished.decision.chosen
        self.service.add(chosen.service_s, timings.service_ms / 1e3)
        self.first_token.add(chosen.total_s, timings.prompt_ms / 1e3)

    def of_call(self, call_id: str) -> list[Record]:
        """The requests of an API call, one per choice, by the id its client sees; or the one of exactly this id."""
        if call_id in self._records:
            return [self._records[call_id]]
        return [record for name, record in self._records.items() if name.rpartition("-")[0] == call_id]

    def last(self, n: int) -> list[Record]:
        """The newest first."""
        return [record for record, _ in zip(reversed(self._records.values()), range(n), strict=False)]
