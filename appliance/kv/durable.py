"""Index and sealed medium of one tier, kept in step: data before index, and bytes go after their index entry.

Threading: blocking; one writer at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from appliance.kv.index import Changes, Index, IndexEntry, LastUse
from appliance.kv.tiers.sealed import Plain, SealedTier
from appliance.types import BlockId, BlockLayout, Tokens


@dataclass(frozen=True)
class Durable:
    sealed: SealedTier
    index: Index

    def append(
        self,
        blocks: Sequence[Plain],
        layout: BlockLayout,
        uses: Sequence[LastUse],
        buffer: memoryview,
        *,
        superseded: Sequence[BlockId],
        used: dict[BlockId, LastUse],
    ) -> int:
        """Store blocks of one tenant, forget what they supersede or replace, and stamp what was used. Returns the tokens
        that went.

        `uses`: the first of each block. `buffer` is scratch for the sealed bytes. TierError: nothing changed.
        """
        extents = self.sealed.store(blocks, layout, buffer)
        added: dict[BlockId, tuple[IndexEntry, Tokens]] = {}
        ends: dict[int, int] = {}
        for plain, extent, now in zip(blocks, extents, uses, strict=True):
            identity = plain.identity
            n_tokens = len(identity.tokens)
            entry = IndexEntry(extent, layout.payload_bytes(n_tokens), n_tokens, identity.start, identity.parent, now)
            added[identity.block] = (entry, identity.tokens)
            ends[extent.segment] = max(ends.get(extent.segment, 0), extent.end)
        try:
            gone = self.index.get_many([*superseded, *added])
            self.index.apply(Changes(added, list(gone), used, ends))
        except BaseException:
            self.sealed.tier.free(extents)
            raise
        return self._free(gone)

    def erase(self, blocks: Sequence[BlockId]) -> int:
        """Forget blocks. Returns the tokens that went. TierError: nothing changed."""
        gone = self.index.get_many(blocks)
        self.index.apply(Changes(removed=list(blocks)))
        return self._free(gone)

    def close(self) -> None:
        self.index.close()
        self.sealed.tier.close()

    def _free(self, gone: dict[BlockId, IndexEntry]) -> int:
        self.sealed.tier.free([entry.extent for entry in gone.values()])
        return sum(entry.n_tokens for entry in gone.values())
