"""Pins: blocks that eviction passes over, in the lowest tier there is, until somebody unpins them.

Invariant: what is pinned is durable where there is a tier below DRAM, and its bytes never exceed the budget; a pin is in
the index before it is confirmed. A prefix that two pinned prompts share stays pinned until both are unpinned.
Threading: event loop only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from appliance.errors import RequestError
from appliance.kv.base import Hit
from appliance.kv.below import Below
from appliance.kv.retention import PINNED, Retention
from appliance.kv.siblings import longest_common
from appliance.kv.tiers.dram import DramTable
from appliance.types import BlockId, Tokens


class Pins:
    def __init__(
        self, retention: Retention, dram: DramTable, below: Below | None, slot_bytes: int, budget_bytes: int
    ) -> None:
        self._retention = retention
        self._dram = dram
        self._below = below
        self._slot_bytes = slot_bytes
        self.budget_bytes = budget_bytes

    @property
    def blocks(self) -> int:
        return len(self._retention.pinned())

    @property
    def nbytes(self) -> int:
        return sum(self._sizes(self._retention.pinned()).values())

    async def pin(self, hits: Sequence[Hit], tokens: Tokens) -> int:
        """Pin the blocks of a stored prefix of `tokens`; returns the tokens that are pinned now. RequestError beyond the
        budget, TierError if the index refuses: then nothing is."""
        blocks: list[BlockId] = []
        reach = 0
        for hit in hits:
            block = self._kept_in(hit, tokens)
            if block is None:
                break
            blocks.append(block)
            reach = hit.start + hit.use_tokens
        pinned = self._retention.pinned()
        sizes = self._sizes([block for block in blocks if block not in pinned])
        more, held = sum(sizes.values()), self.nbytes
        if held + more > self.budget_bytes:
            raise RequestError(
                f"{_mib(more)} more would be pinned, {_mib(held)} are, and kv.pin_budget allows {_mib(self.budget_bytes)}; "
                "unpin something, or raise it",
                code="pin_budget_exceeded",
                status=409,
            )
        await self._set({block: PINNED for block in sizes})
        return reach

    async def unpin(self, hits: Sequence[Hit], tokens: Tokens) -> int:
        """Unpin them, but for what another pinned prompt begins with; returns the blocks. They are kept for as long as
        the profile says, from now on."""
        released: dict[BlockId, int] = {}
        pinned = self._retention.pinned()
        until = self._retention.wished(None)
        for hit in reversed(hits):
            block = self._kept_in(hit, tokens)
            if block is None or block not in pinned:
                continue
            if any(child in pinned and child not in released for child in self._children(block)):
                break
            released[block] = until
        await self._set(released)
        return len(released)

    def _kept_in(self, hit: Hit, tokens: Tokens) -> BlockId | None:
        """The block of the lowest tier that holds the tokens of this hit: a longer one may have taken a tail's place."""
        if self._below is None or hit.block in self._below:
            return hit.block
        wanted = tokens[hit.start : hit.start + hit.use_tokens]
        nearest = longest_common(self._below.children(hit.parent), wanted)
        return nearest[1] if nearest is not None and nearest[0] == len(wanted) else None

    async def _set(self, moments: dict[BlockId, int]) -> None:
        before = {block: self._retention.until(block) for block in moments}
        self._retention.set(moments)
        try:
            if self._below is not None:
                await self._below.write_stamps(list(moments))
        except BaseException:
            self._retention.set(before)
            raise
        if self._below is None:
            for block, until in moments.items():
                entry = self._dram.get(block)
                if entry is not None:
                    self._dram.keep(entry, kept=until == PINNED)

    def _children(self, block: BlockId) -> list[BlockId]:
        if self._below is None:
            return [entry.block for entry in self._dram.children(block)]
        return [child for _, child in self._below.children(block)]

    def _sizes(self, blocks: Collection[BlockId]) -> dict[BlockId, int]:
        """Bytes of those that are held, on the medium they are pinned in."""
        if self._below is None:
            return {block: self._slot_bytes for block in blocks if self._dram.get(block) is not None}
        return {block: entry.extent.length for block, entry in self._below.entries(blocks).items()}


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f} MiB"
