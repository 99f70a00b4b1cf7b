"""Reading records into DRAM slots: which are being read, which could not be, and whether the medium is worth asking.

Threading: event loop only; the reads themselves run in the transfer pool.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from appliance.errors import TierError, TierIO
from appliance.kv.breaker import Breaker
from appliance.kv.counts import TierCounts
from appliance.kv.patience import Patience
from appliance.kv.tiers.base import Extent
from appliance.kv.tiers.sealed import Loaded, Plain, SealedTier
from appliance.kv.transfer import Priority, TransferPool
from appliance.types import BlockId, BlockLayout


class Loads:
    def __init__(
        self,
        sealed: SealedTier,
        transfers: TransferPool,
        layout: BlockLayout,
        counts: Counter[str],
        quarantine: Callable[[BlockId], None],
    ) -> None:
        self.reading: Counter[BlockId] = Counter()
        """Loads of each block that have not ended: its bytes must stay."""
        self.suspects: set[BlockId] = set()
        """Could not be read. Read alone next time, and dropped if that fails between two reads that work: so a bad sector
        does not cost the tier, nor an outage the blocks."""
        self._accused: BlockId | None = None
        self.breaker = Breaker(asyncio.get_running_loop().time)
        self._sealed = sealed
        self._transfers = transfers
        self._layout = layout
        self._counts = counts
        self._quarantine = quarantine
        self._count = TierCounts(counts, sealed.tier.properties.tier)
        self._patience = Patience()

    def load(self, blocks: Sequence[Plain], extents: Sequence[Extent]) -> Coroutine[Any, Any, Loaded]:
        """Read adjacent records into their slots. What fails is counted; a record that does not verify is quarantined.

        From this call on, until the coroutine ended, the records' bytes stay.
        """
        names = [plain.identity.block for plain in blocks]
        self.reading.update(names)
        return self._load(names, blocks, extents)

    async def _load(self, names: list[BlockId], blocks: Sequence[Plain], extents: Sequence[Extent]) -> Loaded:
        try:
            job = partial(self._sealed.load, blocks, extents, self._layout)
            loaded = await asyncio.wrap_future(self._transfers.submit(Priority.LOAD, job))
        except TierError as error:
            alone = len(names) == 1 and names[0] in self.suspects
            self._accused = names[0] if alone and not self.breaker.failing else None
            self.suspects.update(names)
            self._failed(error)
            return Loaded(0, 0, 0.0, None)
        finally:
            self._patience.moved()
            self.reading.subtract(names)
            self.reading += Counter()  # keeps what is still being read
        self.breaker.worked()
        self.suspects.difference_update(names)
        if self._accused is not None and self._accused not in names:
            self._quarantine(self._accused)
        self._accused = None
        self._count.add("load_bytes_total", loaded.nbytes)
        self._count.add("load_seconds_total", loaded.seconds)
        if loaded.fault is not None:
            self._counts[f'integrity_failures_total{{reason="{loaded.fault}"}}'] += 1
            self._quarantine(names[loaded.opened])
        return loaded

    async def answered(self, read: asyncio.Future[Any]) -> bool:
        """Whether a read ended, well or not. If the medium does not answer it fails, until it does."""
        if await self._patience.wait(read):
            return True
        self._failed(TierIO("the medium does not answer"))
        return False

    def _failed(self, error: TierError) -> None:
        self._count.failed(error)
        self.breaker.failed()
