"""Opens the store of a home: pool, medium, index, start-up recovery, and the store on top of them.

Invariant: what cannot be used below DRAM costs the tier, not the start; the store then says so in its usage.
Threading: `open_below` and `look_below` block (recovery reads segments); a store belongs to the running event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from appliance.config import KVSection, NvmeSection
from appliance.errors import ConfigError, StateError, TierError
from appliance.kv.costs import CostAware, TokenSeconds
from appliance.kv.fair import FairShare
from appliance.kv.policy import LeafFirstLru
from appliance.kv.record import MAX_FRAMES, MAX_RECORD_BYTES, record_bytes
from appliance.kv.recovery import Recovered, recover
from appliance.kv.retention import Retention
from appliance.kv.store import TieredStore
from appliance.kv.tiers.dram import DramPool
from appliance.kv.tiers.nvme import NvmeTier
from appliance.kv.tiers.readonly import ReadOnlyNvme
from appliance.kv.tiers.sealed import SealedTier, superblock_maker
from appliance.kv.transfer import TransferPool
from appliance.security.files import write_private
from appliance.security.keyring import Keyring
from appliance.types import BlockId, BlockLayout, Fingerprint

log = logging.getLogger(__name__)

_INDEX_FOLDER = "index"
_SEGMENT_FOLDER = "store"
_RECORD = "store.json"


def store_folder(home: Path, nvme: NvmeSection) -> Path:
    """Where a home's segments and their index are: another path is another store."""
    return Path(nvme.path).expanduser().absolute() if nvme.path else home / _SEGMENT_FOLDER


def open_below(
    home: Path,
    keyring: Keyring,
    nvme: NvmeSection,
    clock: Callable[[], float] = time.time,
    policy: FairShare[BlockId] | None = None,
    retention_s: float | None = None,
) -> tuple[SealedTier, Recovered]:
    """The medium below DRAM and its index, made to agree. TierError if it cannot be used at all. Blocking.

    `policy`: an empty one, least recently used if there is none. `retention_s` as in recover().
    """
    sealed = SealedTier(_medium(NvmeTier, home, keyring, nvme), keyring, clock)
    index = store_folder(home, nvme) / _INDEX_FOLDER
    policy = FairShare(LeafFirstLru) if policy is None else policy
    return sealed, recover(sealed, keyring, index, index, policy, int(clock() * 1e6), retention_s)


def look_below(home: Path, keyring: Keyring, nvme: NvmeSection, scratch: Path) -> tuple[SealedTier, Recovered]:
    """The same without changing anything: the index is a copy in folder `scratch`, and segments stay as they are."""
    sealed = SealedTier(_medium(ReadOnlyNvme, home, keyring, nvme), keyring)
    source = store_folder(home, nvme) / _INDEX_FOLDER
    return sealed, recover(sealed, keyring, source, scratch, FairShare(LeafFirstLru), int(time.time() * 1e6))


def _medium(kind: type[NvmeTier], home: Path, keyring: Keyring, nvme: NvmeSection) -> NvmeTier:
    return kind(
        store_folder(home, nvme),
        capacity_bytes=nvme.capacity,
        segment_bytes=nvme.segment,
        superblock=superblock_maker(keyring),
        direct=nvme.direct,
    )


def last_opened(home: Path) -> NvmeSection | None:
    """The settings of the store this home served from last. StateError if the note of it is damaged."""
    path = home / _RECORD
    try:
        return NvmeSection.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise StateError(f"{path} cannot be read; remove it and start the appliance once") from None


def _note_opened(home: Path, nvme: NvmeSection) -> None:
    kept = nvme.model_copy(update={"path": str(store_folder(home, nvme))}) if nvme.path else nvme
    try:
        write_private(home / _RECORD, kept.model_dump_json().encode())
    except OSError as error:
        log.warning("kvctl verify will not find this store when it is stopped: %s", error.strerror)


def _check_size(layout: BlockLayout) -> None:
    frames, nbytes = len(layout.frames(layout.block_tokens)), record_bytes(layout, layout.block_tokens)
    if frames > MAX_FRAMES or nbytes > MAX_RECORD_BYTES:
        raise ConfigError(
            f"kv.block_tokens: a block of {layout.block_tokens} tokens of this model takes {nbytes} bytes in {frames} "
            f"parts; a record holds {MAX_RECORD_BYTES} bytes in {MAX_FRAMES} parts"
        )


def _policy(kv: KVSection, token_s: TokenSeconds) -> FairShare[BlockId]:
    return FairShare(LeafFirstLru if kv.eviction == "lru" else lambda: CostAware(token_s))


def _alike(position: int) -> float:
    """What DRAM gives up while a tier below keeps it is loaded again, and that costs the same at every depth."""
    return 1.0


async def open_store(
    home: Path,
    keyring: Keyring,
    fingerprint: Fingerprint,
    layout: BlockLayout,
    pool: DramPool,
    kv: KVSection,
    nvme: NvmeSection,
    token_s: TokenSeconds,
    clock: Callable[[], float] = time.time,
) -> TieredStore:
    """The store of one model; `token_s` is what eviction weighs blocks by. ConfigError if its blocks are too large for pool or record, or its folder has no place."""
    _check_size(layout)
    if not store_folder(home, nvme).parent.is_dir():
        parent = store_folder(home, nvme).parent
        raise ConfigError(f"tiers.nvme.path: {parent} does not exist; create it, or mount what belongs there")
    shape = pool.partition(layout.slot_bytes)
    sealed: SealedTier | None = None
    recovered: Recovered | None = None
    notes: list[str] = []
    if nvme.enabled:
        try:
            sealed, recovered = await asyncio.to_thread(
                open_below, home, keyring, nvme, clock, _policy(kv, token_s), kv.retention
            )
        except TierError as error:
            notes.append(f"nothing is stored below DRAM: {error}")
            log.error("%s", notes[-1])
        else:
            await asyncio.to_thread(_note_opened, home, nvme)
    buffer_bytes = max(kv.read_size, record_bytes(layout, layout.block_tokens))
    store = TieredStore(
        keyring=keyring,
        fingerprint=fingerprint,
        layout=layout,
        pool=pool,
        shape=shape,
        transfers=TransferPool(kv.transfer_threads, buffer_bytes),
        sealed=sealed,
        recovered=recovered,
        policy=_policy(kv, token_s if sealed is None else _alike),
        write_behind_bytes=kv.write_behind,
        read_bytes=buffer_bytes,
        pin_budget_bytes=kv.pin_budget.of(nvme.capacity if recovered else pool.capacity_bytes),
        retention=Retention(kv.retention, clock, recovered.kept if recovered else None),
        clock=clock,
        notes=notes,
    )
    try:
        await store.enforce_quotas()
    except TierError as error:  # it is tried again with each block that is stored
        log.warning("quotas that were lowered do not hold yet: %s", error)
    return store
