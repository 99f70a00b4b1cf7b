"""When blocks below were used and how long they are kept since, until it is written down with the next records.

Threading: event loop only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from appliance.kv.fair import FairShare
from appliance.kv.index import LastUse
from appliance.kv.retention import Retention
from appliance.types import BlockId


class Stamps:
    def __init__(self, policy: FairShare[BlockId], retention: Retention, newest_us: int) -> None:
        self._policy = policy
        self._retention = retention
        self._used: dict[BlockId, int] = {}
        self.newest_us = newest_us
        """The latest use of any block."""

    def used(self, blocks: Iterable[BlockId], us: int) -> None:
        for block in blocks:
            self._used[block] = us
            self.newest_us = max(self.newest_us, us)

    def changed(self, blocks: Iterable[BlockId], us: int) -> None:
        """What is known of them otherwise than when they were used."""
        for block in blocks:
            self._used.setdefault(block, us)

    def take(self) -> dict[BlockId, int]:
        """What is to be written down now; give it back if that fails."""
        used, self._used = self._used, {}
        return used

    def give_back(self, used: Mapping[BlockId, int]) -> None:
        self._used = {**used, **self._used}

    def get(self, block: BlockId) -> int | None:
        return self._used.get(block)

    def last_uses(self, used: Mapping[BlockId, int]) -> dict[BlockId, LastUse]:
        """As the index keeps them, of blocks that are still there."""
        policy, until = self._policy, self._retention.until
        return {
            block: LastUse(us, *policy.standing(block)[:2], until(block))
            for block, us in used.items()
            if block in policy
        }
