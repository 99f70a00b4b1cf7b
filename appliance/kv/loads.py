"""Reading records into DRAM slots: which are being read, which could not be, and whether the medium is worth asking.

Threading: event loop only; the reads themselves run in the transfer pool.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from appliance.errors import TierError, TierFull
from appliance.kv.breaker import Breaker
from appliance.kv.tiers.base import Extent
from appliance.kv.tiers.sealed import Loaded, Plain, SealedTier
from appliance.kv.transfer import Priority, TransferPool
from appliance.types import BlockId, BlockLayout, Tier


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
        """Could not be read. Read alone next time, and dropped if that fails too: a bad sector must not cost the tier."""
        self.breaker = Breaker(asyncio.get_running_loop().time)
        self._sealed = sealed
        self._transfers = transfers
        self._layout = layout
        self._counts = counts
        self._quarantine = quarantine
        self._tier = sealed.tier.properties.tier

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
            failed(self._counts, self._tier, error)
            self.breaker.failed()
            if len(names) == 1 and names[0] in self.suspects:
                self._quarantine(names[0])
            self.suspects.update(names)
            return Loaded(0, 0, 0.0, None)
        finally:
            self.reading.subtract(names)
            self.reading += Counter()  # keeps what is still being read
        self.breaker.worked()
        self.suspects.difference_update(names)
        self._counts[f'load_bytes_total{{tier="{self._tier}"}}'] += loaded.nbytes
        self._counts[f'load_seconds_total{{tier="{self._tier}"}}'] += loaded.seconds  # type: ignore[assignment]
        if loaded.fault is not None:
            self._counts[f'integrity_failures_total{{reason="{loaded.fault}"}}'] += 1
            self._quarantine(names[loaded.opened])
        return loaded


def failed(counts: Counter[str], tier: Tier, error: TierError) -> None:
    """Count an operation of the medium or its index that failed."""
    reason = "full" if isinstance(error, TierFull) else "io"
    counts[f'tier_failures_total{{tier="{tier}",reason="{reason}"}}'] += 1
