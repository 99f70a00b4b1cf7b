"""The durable side of the store: index, sealed medium and order of eviction, kept in step.

Invariant: a block is in `policy` exactly while it is indexed and not on its way out; what is on its way out is not found
any more, and its bytes are freed only when no load reads them. Threading: event loop only; the jobs it hands to the
transfer pool touch index and medium, and only one of those that write runs at a time.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from appliance.errors import TierError, TierFull
from appliance.kv.breaker import Breaker
from appliance.kv.counts import TierCounts
from appliance.kv.durable import Durable
from appliance.kv.index import Changes, IndexEntry, LastUse
from appliance.kv.loads import Loads
from appliance.kv.quotas import Quotas
from appliance.kv.record import record_bytes
from appliance.kv.recovery import Recovered
from appliance.kv.retention import Retention
from appliance.kv.room import Room
from appliance.kv.siblings import strict_prefixes
from appliance.kv.stamps import Stamps
from appliance.kv.tasks import Tasks
from appliance.kv.tiers.sealed import Plain, SealedTier
from appliance.kv.transfer import Priority, TransferPool
from appliance.types import BlockId, BlockLayout, TierUsage, Tokens

T = TypeVar("T")

INDEX_ROOM_BYTES = 128 * 2**10
"""On a medium that is full the index needs pages too, to forget and to add."""


class Below:
    def __init__(
        self,
        sealed: SealedTier,
        recovered: Recovered,
        transfers: TransferPool,
        layout: BlockLayout,
        counts: Counter[str],
        retention: Retention,
        quotas: Quotas,
        clock: Callable[[], float],
    ) -> None:
        self.sealed = sealed
        self.index = recovered.index
        self._durable = Durable(sealed, recovered.index)
        self._counts = counts
        self.policy = recovered.policy
        self._transfers = transfers
        self._layout = layout
        self._retention = retention
        self._clock = clock
        self._tier = sealed.tier.properties.tier
        self._count = TierCounts(counts, self._tier)
        self._notes = recovered.mended.notes
        counts["index_rebuilds_total"] += recovered.mended.found > 0
        counts["quarantined_segments_total"] += recovered.mended.quarantined
        self._count.evicted("capacity", recovered.mended.evicted)
        self._count.evicted("expired", recovered.mended.expired)
        self._tokens = recovered.tokens
        self._stamps = Stamps(recovered.policy, retention, recovered.newest_us)
        self._leaving: dict[BlockId, str | None] = {}
        """Whose they are."""
        self.loads = Loads(sealed, transfers, layout, counts, self.quarantine)
        self._room = Room(sealed, recovered.policy, (self.loads.reading, retention.pinned()), quotas, layout)
        self._crowded = False
        """Somebody else fills the medium, and what was evicted last did not help: no more goes for them."""
        self._turn = asyncio.Lock()
        self.tasks = Tasks()
        self.stores = Breaker(asyncio.get_running_loop().time)

    # --- finding ---------------------------------------------------------------------------------------------------

    def __contains__(self, block: BlockId) -> bool:
        return block in self.policy

    def entries(self, blocks: Iterable[BlockId]) -> dict[BlockId, IndexEntry]:
        return self._read(lambda: self.index.get_many(b for b in blocks if b not in self._leaving), {})

    def children(self, parent: BlockId) -> list[tuple[bytes, BlockId]]:
        nothing: list[tuple[bytes, BlockId]] = []
        found = self._read(lambda: self.index.children(parent), nothing)
        return [child for child in found if child[1] not in self._leaving] if self._leaving else found

    def child_tokens(self, parent: BlockId, block: BlockId) -> Tokens | None:
        return self._read(lambda: self.index.child_tokens(parent, block), None)

    def _read(self, read: Callable[[], T], nothing: T) -> T:
        """An index that cannot be read holds nothing, for now."""
        try:
            return read()
        except TierError as error:
            self._count.failed(error)
            return nothing

    def touch(self, blocks: Sequence[BlockId], used_us: int, *, counts: bool) -> None:
        """A prefix that ends with the last of these blocks is used now; `counts`: by one more request."""
        self._stamps.used(self.policy.touch(blocks, counts=counts), used_us)

    def stamp(self, blocks: Iterable[BlockId]) -> None:
        """How long these are kept has changed: it is written down with the next records."""
        self._stamps.changed((block for block in blocks if block in self.policy), self._now_us())

    async def write_stamps(self, blocks: Sequence[BlockId]) -> None:
        """Write down now how long these are kept. TierError if the index refuses."""
        async with self._turn:
            used = {block: self._stamps.get(block) or entry.used.us for block, entry in self.entries(blocks).items()}
            changes = Changes(used=self._stamps.last_uses(used))
            await asyncio.wrap_future(self._transfers.submit(Priority.STORE, lambda _: self.index.apply(changes)))

    # --- storing ---------------------------------------------------------------------------------------------------

    def quarantine(self, block: BlockId) -> None:
        """Offer it no more until it was computed and stored anew, which also makes its children found again."""
        self._counts["quarantined_total"] += 1
        self._leave([block])
        self.tasks.spawn(self._drop_left([block]))

    def expire(self, blocks: Sequence[BlockId]) -> None:
        """Their time is over: they are not found any more, and their bytes go in the background. What is being read stays."""
        going = [block for block in blocks if block in self.policy and not self.loads.reading[block]]
        if going:
            self._count.evicted("expired", len(going))
            self._leave(going)
            self.tasks.spawn(self._drop_left(going))

    async def _drop_left(self, blocks: Sequence[BlockId]) -> None:
        async with self._turn:
            try:
                await self._erase(blocks)
            except TierError as error:  # on its way out until it is stored anew, or the next start
                self._count.failed(error)

    async def store(self, blocks: Sequence[Plain]) -> None:
        """Make blocks of one tenant durable, evicting what must go. TierError: none of them is stored."""
        async with self._turn:
            blocks = [plain for plain in blocks if plain.identity.block not in self.policy]
            if not blocks:
                return
            for plain in blocks:  # to store a block is to use the prefix it ends
                self.touch([plain.identity.parent], self._now_us(), counts=False)
            lengths = [record_bytes(self._layout, len(plain.identity.tokens)) for plain in blocks]
            superseded = self._superseded(blocks)
            self._leave(superseded)
            try:
                await self._make_room(blocks[0].identity.tenant, lengths)
                try:
                    await self._append(blocks, superseded)
                except TierFull:  # the medium is smaller than our capacity: somebody else filled it
                    if self._crowded:
                        raise
                    self._crowded = True
                    await self._evict(self._room.worth(sum(lengths) + INDEX_ROOM_BYTES, blocks[0].identity.tenant))
                    await self._append(blocks, superseded)
                self._crowded = False
            except BaseException:
                self._return(superseded)
                raise
            await self._evict(self._room.beyond_quota(blocks[0].identity.tenant), "quota")

    async def drop(self, blocks: Sequence[BlockId], why: str | None = None) -> None:
        """Forget blocks, now; counted as evicted if `why` says for what. TierError if the index refuses."""
        async with self._turn:
            known = [block for block in blocks if block in self.policy and not self.loads.reading[block]]
            await self._forget(known)
            if why is not None:
                self._count.evicted(why, len(known))

    async def _make_room(self, tenant: str, lengths: Sequence[int]) -> None:
        await self._evict(self._room.beyond_quota(tenant, len(lengths)), "quota")
        while victims := self._room.victims(tenant, lengths):
            await self._evict(victims)

    async def enforce(self, tenant: str) -> None:
        """Forget what is beyond its quota. TierError if the index refuses."""
        async with self._turn:
            await self._evict(self._room.beyond_quota(tenant), "quota")

    async def _evict(self, victims: Sequence[BlockId], why: str = "capacity") -> None:
        if victims:
            await self._forget(victims)
            self._count.evicted(why, len(victims))

    def _superseded(self, blocks: Sequence[Plain]) -> list[BlockId]:
        """Tails whose tokens a new sibling begins with, and which are not to be kept for longer. Indivisible ones stay: each
        is another place to go on."""
        found: set[BlockId] = set()
        outlasts = self._retention.outlasts
        for identity in (plain.identity for plain in blocks) if self._layout.divisible else ():
            tails = strict_prefixes(self.children(identity.parent), identity.tokens)
            found.update(tail for tail in tails if outlasts(identity.block, tail))
        return [block for block in found if block in self.policy and not self.loads.reading[block]]

    async def _append(self, blocks: Sequence[Plain], superseded: Sequence[BlockId]) -> None:
        now_us, clock = self._now_us(), self.policy.clock(blocks[0].identity.tenant)
        names = [plain.identity.block for plain in blocks]
        uses = [LastUse(now_us, clock=clock, until_us=self._retention.until(block)) for block in names]
        used = self._stamps.take()
        stamps = self._stamps.last_uses(used)

        def job(buffer: memoryview) -> int:
            return self._durable.append(blocks, self._layout, uses, buffer, superseded=superseded, used=stamps)

        try:
            gone_tokens = await asyncio.wrap_future(self._transfers.submit(Priority.STORE, job))
        except BaseException:
            self._stamps.give_back(used)
            raise
        for block in (*superseded, *names):
            self._leaving.pop(block, None)
        parents = {plain.identity.parent for plain in blocks}
        for identity in (plain.identity for plain in blocks):
            self.policy.add(identity.tenant, identity.block, identity.parent, identity.start)
        for block in names:
            if block not in parents:
                self.touch([block], now_us, counts=False)
        self._tokens += sum(len(plain.identity.tokens) for plain in blocks) - gone_tokens
        self._stamps.newest_us = max(self._stamps.newest_us, now_us)
        nbytes = sum(self._layout.payload_bytes(len(plain.identity.tokens)) for plain in blocks)
        self._count.add("store_bytes_total", nbytes)

    async def _forget(self, blocks: Sequence[BlockId]) -> None:
        self._leave(blocks)
        try:
            await self._erase(blocks)
        except BaseException:
            self._return(blocks)
            raise

    async def _erase(self, blocks: Sequence[BlockId]) -> None:
        gone_tokens = await asyncio.wrap_future(
            self._transfers.submit(Priority.STORE, lambda _: self._durable.erase(blocks))
        )
        self._tokens -= gone_tokens
        for block in blocks:
            self._leaving.pop(block, None)

    def _leave(self, blocks: Iterable[BlockId]) -> None:
        for block in blocks:
            self._leaving.setdefault(block, self.policy.owner(block))
            self.policy.remove(block)

    def _return(self, blocks: Iterable[BlockId]) -> None:
        """They could not go. Their place in the order is lost: they are the newest now."""
        entries = self.index.get_many(blocks)
        for block, entry in entries.items():
            owner = self._leaving.pop(block, None)
            if owner is not None:
                self.policy.add(owner, block, entry.parent, entry.start)

    # --- the rest --------------------------------------------------------------------------------------------------

    def usage(self, pending_blocks: int) -> TierUsage:
        medium = self.sealed.tier.usage()
        now_us = self._now_us()
        heads = self.entries(self.policy.heads())
        oldest_us = min((self._stamps.get(block) or entry.used.us for block, entry in heads.items()), default=None)
        return TierUsage(
            tier=self._tier,
            capacity_bytes=self.sealed.tier.properties.capacity_bytes,
            used_bytes=medium.used_bytes,
            blocks=len(self.policy),
            tokens=self._tokens,
            pending_blocks=pending_blocks,
            state="degraded" if self.loads.breaker.failing or self.stores.failing else "ok",
            notes=(*medium.notes, *self._notes),
            oldest_s=None if oldest_us is None else max(0, now_us - oldest_us) / 1e6,
            newest_s=None if oldest_us is None else max(0, now_us - self._stamps.newest_us) / 1e6,
        )

    async def close(self) -> None:
        """Write down when blocks were last used, and let go of index and medium. Nothing may be using them."""
        try:
            await asyncio.to_thread(self.index.apply, Changes(used=self._stamps.last_uses(self._stamps.take())))
        except TierError as error:  # stamps only: the next start evicts in a poorer order
            self._count.failed(error)
        await asyncio.to_thread(self._durable.close)

    def _now_us(self) -> int:
        return int(self._clock() * 1e6)
