"""The KV store across tiers: names, finds, stages and writes behind (the contract is base.py).

Invariant: a block is in DRAM (`DramTable`), below (`Below`), both or neither; both tables change on the event loop only,
so a lookup sees one moment. Bytes move on the transfer pool's threads. Threading: event loop only.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from appliance.api.control import VerifyProgress
from appliance.kv.base import NOTHING_VERIFIED, Hit, KVStore, Lookup, NewBlock, PoolShape, Reservation, Staged
from appliance.kv.below import Below
from appliance.kv.counts import TierCounts
from appliance.kv.erase import erase, free
from appliance.kv.expire import Expiry
from appliance.kv.fair import FairShare
from appliance.kv.find import Finder
from appliance.kv.patience import Patience
from appliance.kv.pins import Pins
from appliance.kv.quotas import Quotas
from appliance.kv.record import RecordIdentity
from appliance.kv.recovery import Recovered
from appliance.kv.retention import Retention
from appliance.kv.stage import Limits, Stage
from appliance.kv.storing import Storing
from appliance.kv.tiers.dram import DramPool, DramTable, Entry
from appliance.kv.tiers.sealed import Plain, SealedTier
from appliance.kv.transfer import TransferPool
from appliance.kv.verify import verify
from appliance.kv.write_behind import WriteBehind
from appliance.security.keyring import Keyring
from appliance.types import BlockId, BlockLayout, Fingerprint, Namespace, Tier, TierUsage, Tokens

UPKEEP_WAIT_S = 30.0
COUNTED = (
    "quarantined_total",
    'load_bytes_total{tier="dram"}',
    'load_bytes_total{tier="nvme"}',
    'load_seconds_total{tier="nvme"}',
    'store_bytes_total{tier="nvme"}',
)
"""Shown before anything was counted, so that a rate sees the first one."""


class TieredStore(KVStore):
    def __init__(
        self,
        *,
        keyring: Keyring,
        fingerprint: Fingerprint,
        layout: BlockLayout,
        pool: DramPool,
        shape: PoolShape,
        transfers: TransferPool,
        sealed: SealedTier | None,
        recovered: Recovered | None,
        policy: FairShare[BlockId],
        write_behind_bytes: int,
        read_bytes: int,
        pin_budget_bytes: int,
        retention: Retention,
        clock: Callable[[], float],
        notes: Sequence[str] = (),
    ) -> None:
        """`policy` is for DRAM. `sealed` and `recovered` go together; without them blocks live in DRAM only and `notes`
        say why."""
        self.pool: PoolShape = shape
        self._fingerprint = fingerprint
        self._layout = layout
        self._memory = pool
        self._transfers = transfers
        self._limits = Limits(read_bytes, transfers.threads + 2)
        self._clock = clock
        self._notes = tuple(notes)
        self._counts: Counter[str] = Counter(dict.fromkeys(COUNTED, 0))
        patience = Patience()
        self._closing = False
        self._retention = retention
        self._keyring = keyring
        quotas = Quotas(keyring.quota, layout)
        self._dram = DramTable(pool, self.pool, policy, TierCounts(self._counts, Tier.DRAM), quotas)
        self._below: Below | None = None
        self._writer: WriteBehind | None = None
        if sealed is not None and recovered is not None:
            self._below = Below(sealed, recovered, transfers, layout, self._counts, retention, quotas, clock)
            self._writer = WriteBehind(
                self._dram, self._below, layout, self._plain, self._counts, patience, quotas, write_behind_bytes
            )
        self._finder = Finder(keyring, fingerprint, layout, self._dram, self._below, retention)
        expiry = Expiry(retention, self._dram, self._below)
        self._expiring = asyncio.ensure_future(expiry.run())
        self._pins = Pins(retention, self._dram, self._below, shape.slot_bytes, pin_budget_bytes)
        self._storing = Storing(
            self._dram,
            self._below,
            self._writer,
            self._finder,
            retention,
            quotas,
            expiry,
            patience,
            layout,
            self._counts,
            self._now_us,
        )

    # --- finding ---------------------------------------------------------------------------------------------------

    def root(self, ns: Namespace) -> bytes:
        return self._finder.root(ns)

    def names(self, ns: Namespace, tokens: Tokens) -> list[BlockId]:
        return self._finder.names(ns, tokens)

    def lookup(self, ns: Namespace, tokens: Tokens) -> Lookup:
        return self._finder.lookup(ns, tokens)

    def missing(self, ns: Namespace, tokens: Tokens) -> list[NewBlock]:
        return self._finder.missing(ns, tokens)

    # --- staging ---------------------------------------------------------------------------------------------------

    def touch(self, hits: Sequence[Hit]) -> None:
        self._touch(hits, counts=True)

    def _touch(self, hits: Sequence[Hit], *, counts: bool) -> None:
        blocks, now_us = [hit.block for hit in hits], self._now_us()
        self._dram.touch(blocks, now_us, counts=counts)
        if self._below is not None:
            self._below.touch(blocks, now_us, counts=counts)

    async def stage(
        self, ns: Namespace, tokens: Tokens, hits: Sequence[Hit], *, sparing: Container[BlockId] | None = None
    ) -> AsyncGenerator[Staged, None]:
        if not hits:
            return
        self._touch(hits, counts=False)  # who asked for it said so
        staging = Stage(
            self._dram,
            self._below,
            self._plain,
            self._limits,
            ns=ns,
            hash_key=self._finder.hash_key(ns),
            tokens=tokens,
            hits=hits,
            sparing=sparing,
            used_us=self._now_us(),
        )
        runs = staging.runs()
        try:
            async for staged in runs:
                if not staged.seconds:
                    self._counts['load_bytes_total{tier="dram"}'] += staged.nbytes
                yield staged
        finally:
            await runs.aclose()

    def unpin(self, staged: Staged) -> None:
        for hit in staged.hits:
            entry = self._dram.get(hit.block)
            assert entry is not None, "a pinned block stays"
            self._dram.unpin(entry)

    # --- storing ---------------------------------------------------------------------------------------------------

    async def reserve(
        self, ns: Namespace, blocks: Sequence[NewBlock], *, retention_s: float | None = None
    ) -> list[Reservation]:
        return await self._storing.reserve(ns, blocks, retention_s)

    def keep(self, ns: Namespace, tokens: Tokens, *, retention_s: float | None = None) -> None:
        self._storing.keep(ns, tokens, retention_s)

    def commit(self, reservations: Sequence[Reservation]) -> None:
        self._storing.commit(reservations)

    def abort(self, reservations: Sequence[Reservation]) -> None:
        self._storing.abort(reservations)

    # --- upkeep ----------------------------------------------------------------------------------------------------

    def in_dram(self, blocks: Iterable[BlockId]) -> set[BlockId]:
        return {block for block in blocks if (entry := self._dram.get(block)) is not None and entry.state.readable}

    def evict_dram(self) -> int:
        return free(self._dram, self._below, divisible=self._layout.divisible)

    async def erase(self, ns: Namespace, tokens: Tokens) -> int:
        await self.flush(UPKEEP_WAIT_S)  # what is being written cannot go
        hits = self.lookup(ns, tokens).hits
        whole = [hit.block for hit in hits if hit.use_tokens == hit.n_tokens]
        return await erase(self._dram, self._below, whole, self._retention.pinned())

    async def enforce_quotas(self) -> None:
        for tenant in self._keyring.tenants():
            self._dram.enforce(tenant.name)
            if self._below is not None:
                await self._below.enforce(tenant.name)

    async def pin_prompt(self, ns: Namespace, tokens: Tokens) -> int:
        self._storing.keep(ns, tokens, math.inf)
        await self.flush(UPKEEP_WAIT_S)  # what is pinned is durable
        return await self._pins.pin(self.lookup(ns, tokens).hits, tokens)

    async def unpin_prompt(self, ns: Namespace, tokens: Tokens) -> int:
        return await self._pins.unpin(self.lookup(ns, tokens).hits, tokens)

    def usage(self) -> list[TierUsage]:
        dram = self._dram.usage(self._now_us())
        if self._below is None or self._writer is None:
            return [self._with_pins(dram), TierUsage(Tier.NVME, 0, 0, 0, 0, state="off", notes=self._notes)]
        nvme = self._below.usage(self._writer.pending_blocks)
        nvme = replace(nvme, pending_bytes=self._writer.dirty_bytes, notes=(*nvme.notes, *self._notes))
        return [dram, self._with_pins(nvme)]

    def _with_pins(self, lowest: TierUsage) -> TierUsage:
        pins = self._pins
        return replace(lowest, pinned_blocks=pins.blocks, pinned_bytes=pins.nbytes, pin_budget_bytes=pins.budget_bytes)

    def counters(self) -> Mapping[str, float]:
        return dict(self._counts)

    async def verify(self, *, repair: bool) -> AsyncGenerator[VerifyProgress, None]:
        """Open every record and cross-check the index while serving; `repair` drops what is bad."""
        below, loop = self._below, asyncio.get_running_loop()
        if below is None:
            yield NOTHING_VERIFIED
            return

        def drop(blocks: Sequence[BlockId]) -> None:
            asyncio.run_coroutine_threadsafe(below.drop(blocks), loop).result()

        steps = verify(below.sealed, below.index, drop=drop if repair else None)
        while not self._closing:
            step = await asyncio.shield(below.tasks.spawn(asyncio.to_thread(next, steps, None)))
            if step is None:
                return
            yield step

    async def flush(self, timeout_s: float) -> bool:
        if self._writer is None:
            return True
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._writer.drain(), timeout_s)
        return self._writer.all_durable

    async def close(self) -> None:
        """Index and medium go last, when no thread uses them: the number of a closed file may be another's the next moment."""
        self._closing = True
        self._expiring.cancel()
        if self._writer is not None:
            await self._writer.close()
        if self._below is not None:
            await self._below.tasks.settle()
        await asyncio.to_thread(self._transfers.close)
        if self._below is not None:
            await self._below.close()

    def _plain(self, entry: Entry) -> Plain:
        identity = RecordIdentity(
            tenant=entry.ns.tenant,
            ns=entry.ns.name,
            block=entry.block,
            parent=entry.parent,
            start=entry.start,
            tokens=entry.tokens,
            fingerprint=self._fingerprint,
        )
        return Plain(identity, self._memory.view(entry.slot))

    def _now_us(self) -> int:
        return int(self._clock() * 1e6)
