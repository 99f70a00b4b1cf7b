"""Forgets blocks in DRAM and below because somebody asked, and not to make room.

Invariant: what a request holds, a load reads or an operator pinned stays. Threading: event loop only.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from appliance.kv.below import Below
from appliance.kv.siblings import longest_common
from appliance.kv.tiers.dram import DramTable, Entry
from appliance.types import BlockId


def free(dram: DramTable, below: Below | None, *, divisible: bool) -> int:
    """Forget what DRAM holds of durable blocks; returns how many went."""
    victims = [entry for entry in dram.entries() if dram.evictable(entry) and _is_durable(entry, below, divisible)]
    for entry in victims:
        dram.evict(entry, "asked")
    return len(victims)


def _is_durable(entry: Entry, below: Below | None, divisible: bool) -> bool:
    """Whether all of it is below, in its own record or in that of a longer block which took its place."""
    if below is None or entry.block in below:
        return below is not None
    nearest = longest_common(below.children(entry.parent), entry.tokens)
    return divisible and nearest is not None and nearest[0] == len(entry.tokens)


async def erase(dram: DramTable, below: Below | None, blocks: Sequence[BlockId], pinned: Container[BlockId]) -> int:
    """Returns the blocks that no tier holds any more. TierError if the index refuses."""
    blocks = [block for block in blocks if block not in pinned]
    held = [block for block in blocks if (entry := dram.get(block)) is not None and not dram.evictable(entry)]
    going = [block for block in blocks if block not in held]
    for block in going:
        entry = dram.get(block)
        if entry is not None:
            dram.evict(entry, "asked")
    if below is not None:
        await below.drop(going, "asked")
    return sum(below is None or block not in below for block in going)
