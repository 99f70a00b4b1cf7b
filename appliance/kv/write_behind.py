"""Write-behind: committed blocks wait here, readable, until their records are durable.

Invariant: the payload of blocks that are promised or whose fate is open stays within the bound, or is one block's. What
cannot be written stays in DRAM, evictable, and is tried again when the medium may have recovered. Threading: event loop only.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable

from appliance.errors import TierError, frames_of
from appliance.kv.below import Below
from appliance.kv.breaker import FIRST_RETRY_S
from appliance.kv.counts import reason
from appliance.kv.patience import Patience
from appliance.kv.quotas import Quotas
from appliance.kv.record import record_bytes
from appliance.kv.tiers.dram import DramTable, Entry, SlotState
from appliance.kv.tiers.sealed import Plain
from appliance.types import BlockId, BlockLayout

log = logging.getLogger(__name__)

BATCH_BYTES = 64 * 2**20
"""Records made durable by one index transaction; less in a small tier, where a batch must not push out the rest."""


class WriteBehind:
    def __init__(
        self,
        dram: DramTable,
        below: Below,
        layout: BlockLayout,
        plain: Callable[[Entry], Plain],
        counts: Counter[str],
        patience: Patience,
        quotas: Quotas,
        bound_bytes: int,
    ) -> None:
        self._dram = dram
        self._below = below
        self._layout = layout
        self._plain = plain
        self._counts = counts
        self._patience = patience
        self._quotas = quotas
        self._bound_bytes = bound_bytes
        self._batch_bytes = min(BATCH_BYTES, below.sealed.tier.properties.capacity_bytes // 8)
        self._queue: dict[BlockId, Entry] = {}
        self._unsaved: dict[BlockId, Entry] = {}
        self._writing = 0
        self._work = asyncio.Event()
        self._retry: asyncio.TimerHandle | None = None
        self._closing = False
        self._task = asyncio.ensure_future(self._run())
        self.dirty_bytes = 0
        """Payload of committed blocks whose fate is open."""
        self.promised_bytes = 0
        """Payload of blocks that slots are reserved for."""

    @property
    def pending_blocks(self) -> int:
        return len(self._queue) + self._writing

    @property
    def all_durable(self) -> bool:
        return not self.pending_blocks and not any(self._is_unsaved(entry) for entry in self._unsaved.values())

    def has_room(self, nbytes: int) -> bool:
        """Whether payload of so many bytes more may wait here: within the bound, or alone."""
        waiting = self.promised_bytes + self.dirty_bytes
        return not waiting or waiting + nbytes <= self._bound_bytes

    def put(self, entry: Entry) -> None:
        """A block that is readable from now on."""
        self._dram.set_state(entry, SlotState.DIRTY)
        self._queue[entry.block] = entry
        self.dirty_bytes += self._payload_bytes(entry)
        self._work.set()

    def keep(self, blocks: Iterable[BlockId]) -> list[BlockId]:
        """Write what was to stay in memory only, now or when there is room; what is not there yet as soon as it is. Returns
        what that is."""
        kept: list[BlockId] = []
        for block in blocks:
            entry = self._dram.get(block)
            if entry is None or entry.durable:
                continue
            entry.durable = True
            kept.append(block)
            if entry.state is not SlotState.CLEAN:
                continue
            if self.has_room(self._payload_bytes(entry)):
                self.put(entry)
            else:
                self._unsaved[block] = entry
                if self._retry is None:
                    self._retry_in(FIRST_RETRY_S)
        return kept

    def withdraw(self, entry: Entry) -> bool:
        """Not worth writing any more; False if its record is being written already."""
        if self._queue.pop(entry.block, None) is None:
            return False
        self.dirty_bytes -= self._payload_bytes(entry)
        return True

    def lost_patience(self) -> None:
        """Somebody waited in vain. If for the medium, it fails until a batch ends well."""
        if self._writing:
            self._below.stores.failed()

    async def drain(self) -> None:
        """Until nothing waits or is being written."""
        while self.pending_blocks:
            await self._dram.change()

    async def close(self) -> None:
        """Begin no batch any more. Ends with the one that is being written: nobody may close its medium before."""
        self._closing = True
        self._work.set()
        await self._task
        if self._retry is not None:
            self._retry.cancel()

    async def _run(self) -> None:
        while await self._work.wait() and not self._closing:
            batch = self._next_batch()
            if not batch:
                self._work.clear()
                continue
            self._writing = len(batch)
            failure = await self._write(batch)
            self._writing = 0
            self._patience.moved()
            for entry in batch:
                self.dirty_bytes -= self._payload_bytes(entry)
                self._dram.set_state(entry, SlotState.CLEAN)
            if failure is None:
                self._requeue()
            else:
                self._unsaved.update((entry.block, entry) for entry in batch)
                self._counts[f'store_failures_total{{tier="nvme",reason="{failure}"}}'] += len(batch)

    async def _write(self, batch: list[Entry]) -> str | None:
        """None if the batch is durable, else why not."""
        stores = self._below.stores
        if not stores.allows:
            return "degraded"
        try:
            await self._below.store([self._plain(entry) for entry in batch])
        except TierError as error:
            failure, said = reason(error), str(error)
        except Exception as error:  # noqa: BLE001 - a bug costs these blocks, not all that wait behind them
            failure, said = "bug", frames_of(error)
        else:
            stores.worked()
            return None
        retry_s = stores.failed()
        log.warning("%d blocks stay in DRAM only, next try in %.0f s: %s", len(batch), retry_s, said)
        self._retry_in(retry_s)
        return failure

    def _next_batch(self) -> list[Entry]:
        """The oldest waiting blocks, of one tenant."""
        batch: list[Entry] = []
        nbytes = 0
        for entry in self._queue.values():
            full = nbytes >= self._batch_bytes or len(batch) >= self._quotas.nvme(entry.ns.tenant)
            if batch and (entry.ns.tenant != batch[0].ns.tenant or full):
                break
            batch.append(entry)
            nbytes += record_bytes(self._layout, len(entry.tokens))
        for entry in batch:
            del self._queue[entry.block]
        return batch

    def _retry_in(self, delay_s: float) -> None:
        if self._retry is not None:
            self._retry.cancel()
        self._retry = asyncio.get_running_loop().call_later(delay_s, self._requeue)

    def _requeue(self) -> None:
        """One batch of what could not be written, as far as there is room; the next one follows if that works."""
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        limit_bytes = self.dirty_bytes + self._batch_bytes
        for entry in list(self._unsaved.values()):
            if self.dirty_bytes >= limit_bytes or not self.has_room(self._payload_bytes(entry)):
                break
            del self._unsaved[entry.block]
            if self._is_unsaved(entry):
                self.put(entry)
        if self._unsaved and not self.pending_blocks:  # what is promised takes all the room
            self._retry_in(FIRST_RETRY_S)

    def _is_unsaved(self, entry: Entry) -> bool:
        return self._dram.get(entry.block) is entry and entry.block not in self._below

    def _payload_bytes(self, entry: Entry) -> int:
        return self._layout.payload_bytes(len(entry.tokens))
