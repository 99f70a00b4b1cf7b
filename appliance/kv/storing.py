"""New blocks: slots for them, what is wanted of them, and their way to write-behind.

Invariant: a reservation ends once, by commit() or abort(); reservations are made in the order they were asked for.
Threading: event loop only.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from appliance.errors import StoreBusy
from appliance.kv.base import NewBlock, Reservation
from appliance.kv.below import Below
from appliance.kv.expire import Expiry
from appliance.kv.find import Finder
from appliance.kv.patience import Patience
from appliance.kv.quotas import Quotas
from appliance.kv.retention import Retention
from appliance.kv.tiers.dram import DramTable, Entry, SlotState
from appliance.kv.write_behind import WriteBehind
from appliance.types import BlockLayout, Namespace, Tokens


class Storing:
    def __init__(
        self,
        dram: DramTable,
        below: Below | None,
        writer: WriteBehind | None,
        finder: Finder,
        retention: Retention,
        quotas: Quotas,
        expiry: Expiry,
        patience: Patience,
        layout: BlockLayout,
        counts: Counter[str],
        now_us: Callable[[], int],
    ) -> None:
        self._dram = dram
        self._below = below
        self._writer = writer
        self._finder = finder
        self._retention = retention
        self._quotas = quotas
        self._expiry = expiry
        self._patience = patience
        self._layout = layout
        self._counts = counts
        self._now_us = now_us
        self._turn = asyncio.Lock()

    async def reserve(self, ns: Namespace, blocks: Sequence[NewBlock], retention_s: float | None) -> list[Reservation]:
        reserved: list[Reservation] = []
        since_s = time.monotonic()
        try:
            async with self._turn:
                for new in blocks:
                    while not self._finder.holds(new) and not self._room_for(ns, new):
                        if reserved and not (self._writer and self._writer.pending_blocks):
                            return reserved  # only what this call or a pin holds is in the way
                        await self._patiently(since_s)
                    if not self._finder.holds(new):
                        reserved.append(self._reserve(ns, new, retention_s))
        except BaseException:
            self.abort(reserved)
            raise
        return reserved

    def _reserve(self, ns: Namespace, new: NewBlock, retention_s: float | None) -> Reservation:
        if self._retention.is_over(new.block):
            self._expiry.erase([new.block])
        state, now_us = SlotState.RESERVED, self._now_us()
        entry = self._dram.put(ns, new.block, new.parent, new.start, new.tokens, state, now_us)
        entry.durable = not self._retention.in_memory_only(retention_s) and self._quotas.nvme(ns.tenant) > 0
        if self._below is None or new.block not in self._below:  # else it is there, and its medium fails
            self._retention.begin(new.block, self._retention.wished(retention_s))
        self._promise(self._payload_bytes(new))
        return Reservation(new, entry.slot)

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

    def keep(self, ns: Namespace, tokens: Tokens, retention_s: float | None) -> None:
        if self._retention.in_memory_only(retention_s) or not self._quotas.nvme(ns.tenant):
            return
        blocks, until = [hit.block for hit in self._finder.lookup(ns, tokens).hits], self._retention.wished(retention_s)
        if self._writer is not None:
            for block in self._writer.keep(blocks):
                self._retention.begin(block, until)
        longer = [block for block in blocks if self._retention.extend(block, until)]
        if self._below is not None:
            self._below.stamp(longer)

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
            outlasts = entry.durable >= other.durable and self._retention.outlasts(entry.block, other.block)
            if replaces and not other.pins and outlasts:
                unwritten = self._writer is not None and self._writer.withdraw(other)
                if unwritten or self._dram.evictable(other):
                    self._dram.drop(other)

    def _room_for(self, ns: Namespace, new: NewBlock) -> bool:
        """Whether a slot is to be had, and write-behind has room."""
        return self._dram.has_room(ns.tenant) and (
            self._writer is None or self._writer.has_room(self._payload_bytes(new))
        )

    def _payload_bytes(self, new: NewBlock) -> int:
        return self._layout.payload_bytes(len(new.tokens))
