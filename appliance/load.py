"""Stored blocks into a request's cells: staged in runs, and restored while the next run is read.

Invariant: every staged run is unpinned, and never while the engine may still read its slots. A tier or restore failure
only means more to compute. Threading: event loop only.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import aclosing

from appliance.answered import answered
from appliance.engine.client import EngineClient
from appliance.errors import RestoreError
from appliance.kv.base import Hit, KVStore, Staged
from appliance.request import GenerateRequest
from appliance.sources import Sources
from appliance.types import BlockId, Tier, Tokens

log = logging.getLogger(__name__)

RESTORE_RUNS = 4
"""Staged runs that may be on their way into cells while the next one is read: the engine takes them in order."""


class Load:
    """One request's blocks on their way into its cells."""

    def __init__(self, engine: EngineClient, store: KVStore, request: GenerateRequest, sources: Sources) -> None:
        self.nbytes = 0
        """KV bytes restored."""
        self.by_tier: dict[Tier, int] = {}
        """The same, by where they were."""
        self.present = 0
        """Leading tokens that are in cells."""
        self._engine = engine
        self._store = store
        self._request = request
        self._sources = sources

    async def bring(self, tokens: Tokens, hits: Sequence[Hit], tiers: Mapping[BlockId, Tier]) -> None:
        """`hits`: consecutive ones of a lookup for `tokens`, the first of them where present tokens end or before.

        `tiers`: where blocks were before they were staged ahead; of others the hit says it.
        """
        restoring: deque[asyncio.Task[bool]] = deque()
        try:
            async with aclosing(self._store.stage(self._request.ns, tokens, hits)) as runs:
                async for staged in runs:
                    restoring.append(asyncio.ensure_future(self._restore(staged, tiers)))
                    if len(restoring) > RESTORE_RUNS and not await restoring.popleft():
                        break
            await asyncio.gather(*restoring)
        finally:
            for task in restoring:
                task.cancel()
            await asyncio.gather(*restoring, return_exceptions=True)

    async def _restore(self, staged: Staged, tiers: Mapping[BlockId, Tier]) -> bool:
        try:
            blocks = [(slot, hit.n_tokens, hit.use_tokens) for slot, hit in zip(staged.slots, staged.hits, strict=True)]
            present = await answered(self._engine.restore(self._request.request_id, staged.hits[0].start, blocks))
        except RestoreError as error:
            log.warning("restore failed, computing instead: %s", error)
            return False
        finally:
            self._store.unpin(staged)
        self.present = max(self.present, present)  # blocks aside count when the front has reached them
        for hit in staged.hits:
            self._sources.reached(hit.start + hit.use_tokens, tiers.get(hit.block, hit.tier))
            self.by_tier[hit.tier] = self.by_tier.get(hit.tier, 0) + hit.payload_bytes
        self.nbytes += staged.nbytes
        return True
