"""Opens the store of a home: pool, medium, index, start-up recovery, and the store on top of them.

Invariant: what cannot be used below DRAM costs the tier, not the start; the store then says so in its usage.
Threading: `open_store` and `open_below` block (recovery reads segments); the result belongs to the running event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from appliance.config import KVSection, NvmeSection
from appliance.errors import TierError
from appliance.kv.record import record_bytes
from appliance.kv.recovery import Recovered, recover
from appliance.kv.store import TieredStore
from appliance.kv.tiers.dram import DramPool
from appliance.kv.tiers.nvme import NvmeTier
from appliance.kv.tiers.sealed import SealedTier, superblock_maker
from appliance.kv.transfer import TransferPool
from appliance.security.keyring import Keyring
from appliance.types import BlockLayout, Fingerprint

log = logging.getLogger(__name__)

_INDEX_FOLDER = "index"
_SEGMENT_FOLDER = "store"


def open_below(
    home: Path, keyring: Keyring, nvme: NvmeSection, clock: Callable[[], float] = time.time
) -> tuple[SealedTier, Recovered]:
    """The medium below DRAM and its index, made to agree. TierError if it cannot be used at all. Blocking."""
    folder = Path(nvme.path).expanduser() if nvme.path else home / _SEGMENT_FOLDER
    tier = NvmeTier(
        folder,
        capacity_bytes=nvme.capacity,
        segment_bytes=nvme.segment,
        superblock=superblock_maker(keyring),
        direct=nvme.direct,
    )
    sealed = SealedTier(tier, keyring, clock)
    return sealed, recover(sealed, keyring, home / _INDEX_FOLDER)


async def open_store(
    home: Path,
    keyring: Keyring,
    fingerprint: Fingerprint,
    layout: BlockLayout,
    pool: DramPool,
    kv: KVSection,
    nvme: NvmeSection,
    clock: Callable[[], float] = time.time,
) -> TieredStore:
    """The store of one model. ConfigError if the pool is too small for its blocks."""
    shape = pool.partition(layout.slot_bytes)
    sealed: SealedTier | None = None
    recovered: Recovered | None = None
    notes: list[str] = []
    if nvme.enabled:
        try:
            sealed, recovered = await asyncio.to_thread(open_below, home, keyring, nvme, clock)
        except TierError as error:
            notes.append(f"nothing is stored below DRAM: {error}")
            log.error("%s", notes[-1])
    buffer_bytes = max(kv.read_size, record_bytes(layout, layout.block_tokens))
    return TieredStore(
        keyring=keyring,
        fingerprint=fingerprint,
        layout=layout,
        pool=pool,
        shape=shape,
        transfers=TransferPool(kv.transfer_threads, buffer_bytes),
        sealed=sealed,
        recovered=recovered,
        write_behind_bytes=kv.write_behind,
        read_bytes=buffer_bytes,
        clock=clock,
        notes=notes,
    )
