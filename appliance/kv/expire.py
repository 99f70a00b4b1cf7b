"""Erases blocks that nobody wants kept any longer, in DRAM and below, in the background.

Such a block is a miss at once (find.py); here it gives its room back. Invariant: what a request holds or a load reads stays
until it is let go. Threading: event loop only.
"""

from __future__ import annotations

import asyncio

from appliance.kv.below import Below
from appliance.kv.retention import Retention
from appliance.kv.tiers.dram import DramTable
from appliance.types import BlockId

PERIOD_S = 1.0
AT_ONCE = 4096
"""Blocks of one index transaction."""


class Expiry:
    def __init__(self, retention: Retention, dram: DramTable, below: Below | None) -> None:
        self._retention = retention
        self._dram = dram
        self._below = below

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(PERIOD_S)
            self.sweep()

    def sweep(self) -> None:
        over = self._retention.over()
        for start in range(0, len(over), AT_ONCE):
            self.erase(over[start : start + AT_ONCE])
        self._retention.prune(self._held)

    def erase(self, blocks: list[BlockId]) -> None:
        """Of these, what can go now."""
        for block in blocks:
            entry = self._dram.get(block)
            if entry is not None and self._dram.evictable(entry):
                self._dram.evict(entry, "expired")
        if self._below is not None:
            self._below.expire(blocks)
        for block in blocks:
            if not self._held(block):
                self._retention.forget(block)

    def _held(self, block: BlockId) -> bool:
        return self._dram.get(block) is not None or (self._below is not None and block in self._below)
