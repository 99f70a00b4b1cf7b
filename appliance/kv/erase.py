"""Forgets blocks in DRAM and below because somebody asked, and not to make room.

Invariant: what a request holds or a load reads stays. Threading: event loop only.
"""

from __future__ import annotations

from collections.abc import Sequence

from appliance.kv.below import Below
from appliance.kv.tiers.dram import DramTable
from appliance.types import BlockId


async def erase(dram: DramTable, below: Below | None, blocks: Sequence[BlockId]) -> int:
    """Returns the blocks that no tier holds any more. TierError if the index refuses."""
    held = [block for block in blocks if (entry := dram.get(block)) is not None and not dram.evictable(entry)]
    going = [block for block in blocks if block not in held]
    for block in going:
        entry = dram.get(block)
        if entry is not None:
            dram.drop(entry)
    if below is not None:
        await below.drop(going)
    return sum(below is None or block not in below for block in going)
