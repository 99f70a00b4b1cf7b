"""How long blocks are kept: one moment for each, whichever tiers hold it.

Invariant: of several wishes for a block the longest counts; a block that is not in here is kept for ever, so that only
those that end take memory. Threading: event loop only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from heapq import heapify, heappop, heappush

from appliance.types import BlockId

FOR_EVER = 2**63
"""In place of a moment, which is in microseconds since 1970: until room is needed."""
PINNED = 2**64 - 1
"""Until it is unpinned, whoever needs room."""
_PRUNED_FROM = 4096


class Retention:
    def __init__(
        self, default_s: float | None, clock: Callable[[], float], kept: Mapping[BlockId, int] | None = None
    ) -> None:
        """`default_s`: after the last use, for whoever says nothing; None: for ever. `kept`: from an earlier life."""
        self._default_s = default_s
        self._clock = clock
        self._until = dict(kept or {})
        self._pinned = {block for block, until in self._until.items() if until == PINNED}
        self._queue = [(until, block) for block, until in self._until.items()]
        heapify(self._queue)
        self._over: set[BlockId] = set()
        self._pruned_at = _PRUNED_FROM

    def in_memory_only(self, wish_s: float | None) -> bool:
        return (self._default_s if wish_s is None else wish_s) == 0

    def wished(self, wish_s: float | None) -> int:
        """Until when what is used now is kept. `wish_s` None: as the default says."""
        seconds = self._default_s if wish_s is None else wish_s
        if not seconds:  # in memory only: until it is evicted there
            return FOR_EVER
        return int(min(FOR_EVER, (self._clock() + seconds) * 1e6))

    def until(self, block: BlockId) -> int:
        return self._until.get(block, FOR_EVER)

    def outlasts(self, block: BlockId, other: BlockId) -> bool:
        """Whether `block` is kept for at least as long as the other, which is wanted no less."""
        return self.until(block) >= self.until(other)

    def is_over(self, block: BlockId) -> bool:
        until = self._until.get(block)
        return until is not None and until <= self._clock() * 1e6

    def begin(self, block: BlockId, until: int) -> None:
        """It is stored anew: earlier wishes do not count, but for a pin."""
        if block in self._pinned:
            return
        self.forget(block)
        if until < FOR_EVER:
            self._until[block] = until
            heappush(self._queue, (until, block))

    def extend(self, block: BlockId, until: int) -> bool:
        """One more wish. Whether it is a longer one."""
        known = self._until.get(block)
        if known is None or known >= until:
            return False
        if until < FOR_EVER:
            self._until[block] = until  # the queue learns of it when the earlier moment comes
        else:
            self.forget(block)
        return True

    def pinned(self) -> Set[BlockId]:
        return self._pinned

    def set(self, moments: Mapping[BlockId, int]) -> None:
        """Whatever was wished before."""
        for block, until in moments.items():
            self._pinned.discard(block)
            self.begin(block, until)
            if until == PINNED:
                self._until[block] = until
                self._pinned.add(block)

    def forget(self, block: BlockId) -> None:
        self._until.pop(block, None)
        self._pinned.discard(block)
        self._over.discard(block)

    def over(self) -> list[BlockId]:
        """Blocks whose time is over, until they are forgotten."""
        now_us = self._clock() * 1e6
        while self._queue and self._queue[0][0] <= now_us:
            _, block = heappop(self._queue)
            until = self._until.get(block)
            if until is None:
                continue
            if until > now_us:
                heappush(self._queue, (until, block))
            else:
                self._over.add(block)
        self._over = {block for block in self._over if self.is_over(block)}
        return list(self._over)

    def prune(self, held: Callable[[BlockId], bool]) -> None:
        """Forget what no tier holds any more; does nothing while there cannot be much of it."""
        if len(self._until) < self._pruned_at and len(self._queue) < 2 * self._pruned_at:
            return
        self._until = {block: until for block, until in self._until.items() if held(block)}
        self._pinned.intersection_update(self._until)
        self._queue = [(until, block) for block, until in self._until.items()]
        heapify(self._queue)
        self._pruned_at = max(_PRUNED_FROM, 2 * len(self._until))

    def __len__(self) -> int:
        return len(self._until)
