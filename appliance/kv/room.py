"""Which blocks of a tier go so that new ones fit.

Invariant: none of them is being read, or pinned. Nothing here changes anything but the age of the eviction policy. Threading: event
loop only.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from appliance.errors import TierFull
from appliance.kv.fair import FairShare
from appliance.kv.quotas import Quotas
from appliance.kv.record import record_bytes
from appliance.kv.tiers.dram import Either
from appliance.kv.tiers.sealed import SealedTier
from appliance.types import BlockId, BlockLayout


class Room:
    def __init__(
        self,
        sealed: SealedTier,
        policy: FairShare[BlockId],
        protected: tuple[Container[BlockId], Container[BlockId]],
        quotas: Quotas,
        layout: BlockLayout,
    ) -> None:
        self._sealed = sealed
        self._policy = policy
        self._protected = Either(*protected)
        self._quotas = quotas
        self._block_bytes = record_bytes(layout, layout.block_tokens)

    def beyond_quota(self, tenant: str, coming: int = 0) -> list[BlockId]:
        """Blocks of the tenant that go so that it holds no more than its quota with so many new ones, but for what is
        pinned or being read."""
        over = self._policy.count(tenant) + coming - self._quotas.nvme(tenant)
        return self._policy.evict_own(over, self._protected, tenant) if over > 0 else []

    def victims(self, tenant: str, lengths: Sequence[int]) -> list[BlockId]:
        """Some of the blocks that go before records of these lengths of `tenant` fit; none if they fit. TierFull if they
        never will."""
        tier = self._sealed.tier
        short = tier.shortfall(self._sealed.lane(tenant), lengths)
        if short > tier.usage().used_bytes:
            raise TierFull(f"the {tier.properties.tier} tier is smaller than {len(lengths)} blocks")
        return self.worth(short, tenant) if short else []

    def worth(self, nbytes: int, tenant: str) -> list[BlockId]:
        """Blocks worth `nbytes` for new ones of `tenant`, or what there is of them; TierFull if there is none."""
        n = max(1, min(-(-nbytes // self._block_bytes), len(self._policy)))
        victims = self._policy.evict(n, self._protected, tenant) or self._policy.evict(1, self._protected, tenant)
        if not victims:
            raise TierFull(f"the {self._sealed.tier.properties.tier} tier is full and nothing in it can go")
        return victims
