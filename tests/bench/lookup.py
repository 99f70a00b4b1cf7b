"""Time to find a 1M-token prompt among 1M blocks: names, tables and the partial block at the end. No engine computes.

The index is filled as the store fills it, one record per block named but not written: a lookup reads no record.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from appliance.kv.base import NewBlock
from appliance.kv.fair import FairShare
from appliance.kv.index import FILE_NAME, Changes, Index, IndexEntry, LastUse
from appliance.kv.policy import LeafFirstLru
from appliance.kv.recovery import NOTHING_MENDED, Recovered
from appliance.kv.store import TieredStore
from appliance.kv.tiers.base import Extent
from appliance.kv.tiers.dram import DramPool
from appliance.kv.tiers.nvme import NvmeTier
from appliance.kv.tiers.sealed import SealedTier, superblock_maker
from appliance.kv.transfer import TransferPool
from appliance.security.keyring import Keyring
from appliance.types import BlockId, BlockLayout, Fingerprint, Namespace, Tokens
from tests.support.kv import keyring

BLOCKS = 1_000_000
PROMPT_TOKENS = 1_000_000
LOOKUPS = 21
LAYOUT = BlockLayout(256, token_bytes=(12288,), fixed_bytes=(0,))
RECORD_BYTES = 3 * 2**20 + 8192
NS = Namespace("default")
_BATCH = 20_000


@dataclass(frozen=True)
class LookupTimes:
    blocks: int
    prompt_tokens: int
    median_s: float
    worst_s: float


def measure(folder: Path) -> LookupTimes:
    """Works in a new folder inside `folder`: about 2 GB."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        return asyncio.run(_measure(Path(name)))


async def _measure(home: Path) -> LookupTimes:
    ring = keyring(home)
    prompt = Tokens(os.urandom(4 * PROMPT_TOKENS))
    index = Index(
        home / FILE_NAME, index_key=os.urandom(32), store_uuid=ring.store_uuid, map_bytes=16 * 2**30, create=True
    )
    policy = _fill(index, _store(home / "empty", ring, index, FairShare(LeafFirstLru)).missing(NS, prompt))
    store = _store(home / "full", ring, index, policy)
    times = []
    for _ in range(LOOKUPS):
        started_s = time.perf_counter()
        found = store.lookup(NS, prompt)
        times.append(time.perf_counter() - started_s)
        if len(found.hits) != PROMPT_TOKENS // LAYOUT.block_tokens:
            raise SystemExit(f"the lookup found {len(found.hits)} blocks")
    return LookupTimes(len(policy), PROMPT_TOKENS, statistics.median(times), max(times))


def _store(folder: Path, ring: Keyring, index: Index, policy: FairShare[BlockId]) -> TieredStore:
    pool = DramPool(4 * LAYOUT.slot_bytes, lock=False)
    tier = NvmeTier(folder, capacity_bytes=2**42, segment_bytes=2**28, superblock=superblock_maker(ring))
    return TieredStore(
        keyring=ring,
        fingerprint=Fingerprint(bytes(32), bytes(32)),
        layout=LAYOUT,
        pool=pool,
        shape=pool.partition(LAYOUT.slot_bytes),
        transfers=TransferPool(1, RECORD_BYTES),
        sealed=SealedTier(tier, ring, time.time),
        recovered=Recovered(index, policy, tokens=0, newest_us=0, mended=NOTHING_MENDED),
        policy=FairShare(LeafFirstLru),
        write_behind_bytes=2**30,
        read_bytes=2**23,
        clock=time.time,
    )


def _fill(index: Index, prompt: Sequence[NewBlock]) -> FairShare[BlockId]:
    """The prompt's full blocks spread among others."""
    ours = iter(new for new in prompt if len(new.tokens) == LAYOUT.block_tokens)
    stride = BLOCKS // len(prompt)
    policy: FairShare[BlockId] = FairShare(LeafFirstLru)
    batch: dict[BlockId, tuple[IndexEntry, Tokens]] = {}
    for n in range(BLOCKS):
        new = next(ours, None) if n % stride == 0 else None
        if new is None:
            new = NewBlock(BlockId(os.urandom(32)), BlockId(os.urandom(32)), 0, Tokens(os.urandom(1024)))
        extent = Extent(n // 80, 4096 + n % 80 * RECORD_BYTES, RECORD_BYTES)
        entry = IndexEntry(extent, 3 * 2**20, len(new.tokens), new.start, new.parent, LastUse(n))
        policy.add("default", new.block, new.parent, new.start)
        batch[new.block] = (entry, new.tokens)
        if len(batch) == _BATCH:
            index.apply(Changes(added=batch))
            batch = {}
    index.apply(Changes(added=batch))
    return policy
