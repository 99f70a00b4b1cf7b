"""Who must make room, so that no tenant waits long while another is served more.

Invariant: at most one request is asked to stop per look. Threading: event loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from appliance.turns import Turns

PATIENCE_S = 5.0
"""So long a request waits for those of tenants that were served more: a preemption costs an export and a load."""


class Pressure:
    def __init__(self, turns: Turns, preempt: Callable[[str], object]) -> None:
        """`preempt(request_id)` must not wait."""
        self._turns = turns
        self._preempt = preempt
        self._watching = False

    def watch(self) -> None:
        """Somebody waits from now on."""
        if not self._watching:
            self._watching = True
            asyncio.get_running_loop().call_later(PATIENCE_S / 2, self._look)

    def _look(self) -> None:
        self._watching = False
        if not self._turns.crowded:
            return
        if (turn := self._turns.overdue(PATIENCE_S)) is not None:
            self._preempt(turn.request_id)
        self.watch()
