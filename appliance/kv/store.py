"""The KV store across tiers: names, finds, stages and writes behind (the contract is base.py).

Invariant: a block is in DRAM (`DramTable`), below (`Below`), both or neither; both tables change on the event loop only,
so a lookup sees one moment. Bytes move on the transfer pool's threads. Threading: event loop only.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from appliance.api.control import VerifyProgress
from appliance.errors import StoreBusy
from appliance.kv.base import NOTHING_VERIFIED, Hit, KVStore, Lookup, NewBlock, PoolShape, Reservation, Staged
from appliance.kv.below import Below
from appliance.kv.erase import erase, free
from appliance.kv.fair import FairShare
from appliance.kv.find import Finder
from appliance.kv.patience import Patience
from appliance.kv.record import RecordIdentity
from appliance.kv.recovery import Recovered
from appliance.kv.stage import Limits, Stage
from appliance.kv.tiers.dram import DramPool, DramTable, Entry, SlotState
from appliance.kv.tiers.sealed import Plain, SealedTier
from appliance.kv.transfer import TransferPool
from appliance.kv.verify import verify
from appliance.kv.write_behind import WriteBehind
from appliance.security.keyring import Keyring
from appliance.types import BlockId, BlockLayout, Fingerprint, Namespace, Tier, TierUsage, Tokens

ERASE_WAIT_S = 30.0
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
        self._patience = Patience()
        self._reserve_turn = asyncio.Lock()
        self._closing = False
        self._dram = DramTable(pool, self.pool, policy)
        self._below: Below | None = None
        self._writer: WriteBehind | None = None
        if sealed is not None and recovered is not None:
            self._below = Below(sealed, recovered, transfers, layout, self._counts, clock)
            self._writer = WriteBehind(
                self._dram, self._below, layout, self._plain, self._counts, self._patience, write_behind_bytes
            )
        self._finder = Finder(keyring, fingerprint, layout, self._dram, self._below)

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

    async def reserve(self, ns: Namespace, blocks: Sequence[NewBlock], *, durable: bool = True) -> list[Reservation]:
        reserved: list[Reservation] = []
        since_s = time.monotonic()
        try:
            async with self._reserve_turn:
                for new in blocks:
                    while not self._finder.holds(new) and not self._room_for(new):
                        if reserved and not (self._writer and self._writer.pending_blocks):
                            return reserved  # only what this call or a pin holds is in the way
                        await self._patiently(since_s)
                    if not self._finder.holds(new):
                        state, now_us = SlotState.RESERVED, self._now_us()
                        entry = self._dram.put(ns, new.block, new.parent, new.start, new.tokens, state, now_us)
                        entry.durable = durable
                        self._promise(self._payload_bytes(new))
                        reserved.append(Reservation(new, entry.slot))
        except BaseException:
            self.abort(reserved)
            raise
        return reserved

    async def _patiently(self, since_s: float) -> None:
        """Wait for a change of slots, as long as batches or reservations end now and then: pins come and go regardless."""
        if not await self._patience.wait(self._dram.change(), since_s):
            self._counts["store_busy_total"] += 1
            if self._writer is not None:
                self._writer.lost_patience()
            raise StoreBusy("write-behind does not move")

    def _promise(self, nbytes: int) -> None:
        if self._writer is not None:
            self._writer.promised_bytes += nbytes

    def keep(self, ns: Namespace, tokens: Tokens) -> None:
        if self._writer is not None:
            self._writer.keep(hit.block for hit in self.lookup(ns, tokens).hits)

    def commit(self, reservations: Sequence[Reservation]) -> None:
        for entry in self._ended(reservations):
            if self._writer is None or not entry.durable:
                self._dram.set_state(entry, SlotState.CLEAN)
            else:
                self._writer.put(entry)
            self._drop_superseded(entry)
        self._dram.touch([reservation.new.block for reservation in reservations], self._now_us(), counts=False)

    def abort(self, reservations: Sequence[Reservation]) -> None:
        for entry in self._ended(reservations):
            self._dram.drop(entry)

    def _ended(self, reservations: Sequence[Reservation]) -> Iterator[Entry]:
        for reservation in reservations:
            entry = self._dram.get(reservation.new.block)
            assert entry is not None, "a reservation ends once"
            assert entry.state is SlotState.RESERVED, "a reservation ends once"
            self._promise(-self._payload_bytes(reservation.new))
            self._patience.moved()
            yield entry

    def _drop_superseded(self, entry: Entry) -> None:
        """Tails in DRAM whose tokens the new block begins with; below they go with its record. Indivisible ones stay."""
        for other in list(self._dram.children(entry.parent)) if self._layout.divisible else ():
            replaces = len(other.tokens) < len(entry.tokens) and other.tokens == entry.tokens[: len(other.tokens)]
            if replaces and not other.pins and entry.durable >= other.durable:
                unwritten = self._writer is not None and self._writer.withdraw(other)
                if unwritten or self._dram.evictable(other):
                    self._dram.drop(other)

    def _room_for(self, new: NewBlock) -> bool:
        """Whether a slot is to be had, and write-behind has room."""
        return self._dram.has_room() and (self._writer is None or self._writer.has_room(self._payload_bytes(new)))

    # --- upkeep ----------------------------------------------------------------------------------------------------

    def in_dram(self, blocks: Iterable[BlockId]) -> set[BlockId]:
        return {block for block in blocks if (entry := self._dram.get(block)) is not None and entry.state.readable}

    def evict_dram(self) -> int:
        return free(self._dram, self._below, divisible=self._layout.divisible)

    async def erase(self, ns: Namespace, tokens: Tokens) -> int:
        await self.flush(ERASE_WAIT_S)  # what is being written cannot go
        hits = self.lookup(ns, tokens).hits
        return await erase(self._dram, self._below, [hit.block for hit in hits if hit.use_tokens == hit.n_tokens])

    def usage(self) -> list[TierUsage]:
        dram = self._dram.usage(self._now_us())
        if self._below is None or self._writer is None:
            return [dram, TierUsage(Tier.NVME, 0, 0, 0, 0, state="off", notes=self._notes)]
        nvme = self._below.usage(self._writer.pending_blocks)
        return [dram, replace(nvme, pending_bytes=self._writer.dirty_bytes, notes=(*nvme.notes, *self._notes))]

    def counters(self) -> Mapping[str, float]:
        return {**self._counts, 'evicted_blocks_total{tier="dram"}': self._dram.evicted}

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
            step = await asyncio.shield(below.spawn(asyncio.to_thread(next, steps, None)))
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
        if self._writer is not None:
            await self._writer.close()
        if self._below is not None:
            await self._below.settle()
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

    def _payload_bytes(self, new: NewBlock) -> int:
        return self._layout.payload_bytes(len(new.tokens))

    def _now_us(self) -> int:
        return int(self._clock() * 1e6)
