"""Blocks that were brought into DRAM ahead of need, and what became of each: hit, late or wasted.

A block is late if a request came for it while it was still moving; wasted if it was evicted, or expired, before any
request came. Invariant: moved = hit + late + wasted + those that still wait. Threading: event loop only.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Container, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from appliance.kv.base import Hit, KVStore, Staged
from appliance.types import BlockId, Namespace, Tier, Tokens

EXPIRES_S = 1800.0
"""What is not asked for so long was not needed."""
CROWD = 1024
"""So many are remembered before those that are gone are looked for."""


@dataclass
class PrefetchTotals:
    """Blocks since start."""

    moved: int = 0
    moved_bytes: int = 0
    hit: int = 0
    late: int = 0
    wasted: int = 0


class Prefetched:
    def __init__(self, store: KVStore, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._totals = PrefetchTotals()
        self._moving: set[BlockId] = set()
        self._late: set[BlockId] = set()
        """Still moving, and asked for."""
        self._waiting: OrderedDict[BlockId, float] = OrderedDict()
        """In DRAM since when, the oldest first."""
        self._crowd = CROWD

    async def stage(
        self, ns: Namespace, tokens: Tokens, hits: Sequence[Hit], sparing: Container[BlockId]
    ) -> AsyncGenerator[Staged, None]:
        """As the store does it, sparing these blocks; and remember what was brought up."""
        absent = [hit.block for hit in hits if hit.tier is not Tier.DRAM]
        self._moving.update(absent)
        try:
            async with aclosing(self._store.stage(ns, tokens, hits, sparing=sparing)) as runs:
                async for staged in runs:
                    if staged.seconds:  # it was not in DRAM yet
                        self._moved(staged)
                    yield staged
        finally:
            self._moving.difference_update(absent)
            self._late.difference_update(absent)

    def asked(self, ns: Namespace, prompt: Tokens) -> None:
        """A request for this prompt has come."""
        if not self._moving and not self._waiting:
            return
        for hit in self._store.lookup(ns, prompt).hits:
            if hit.block in self._moving:
                self._late.add(hit.block)
            elif self._waiting.pop(hit.block, None) is not None:
                if hit.tier is Tier.DRAM:
                    self._totals.hit += 1
                else:
                    self._totals.wasted += 1

    def expired(self, blocks: Iterable[BlockId]) -> None:
        """Nobody is expected to ask for them any more."""
        for block in blocks:
            self._totals.wasted += self._waiting.pop(block, None) is not None

    def totals(self) -> PrefetchTotals:
        self._sweep()
        return self._totals

    def counters(self) -> Mapping[str, float]:
        totals = self.totals()
        return {
            "prefetch_blocks_total": totals.moved,
            "prefetch_bytes_total": totals.moved_bytes,
            "prefetch_hit_blocks_total": totals.hit,
            "prefetch_late_blocks_total": totals.late,
            "prefetch_wasted_blocks_total": totals.wasted,
        }

    def _moved(self, staged: Staged) -> None:
        self._totals.moved += len(staged.hits)
        self._totals.moved_bytes += staged.nbytes
        for block in (hit.block for hit in staged.hits):
            self._moving.discard(block)
            if block in self._late:
                self._late.discard(block)
                self._totals.late += 1
            elif block not in self._waiting:
                self._waiting[block] = self._clock()
            else:
                self._totals.wasted += 1  # evicted since it was brought up before
        if len(self._waiting) > self._crowd:
            self._sweep()
            self._crowd = 2 * len(self._waiting) + CROWD

    def _sweep(self) -> None:
        """Count what is gone, so that no more is remembered than DRAM holds."""
        if self._waiting:
            self.expired(self._waiting.keys() - self._store.in_dram(self._waiting))
            before_s = self._clock() - EXPIRES_S
            self.expired([block for block, since_s in self._waiting.items() if since_s < before_s])
