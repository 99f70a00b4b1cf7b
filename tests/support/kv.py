"""A small store over an invented layout: 16-token blocks of 64 bytes a token, filled with bytes made from their tokens."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

from appliance.config import KVSection, NvmeSection
from appliance.kv.base import Hit, KVStore, NewBlock
from appliance.kv.opening import open_store
from appliance.kv.store import TieredStore
from appliance.kv.tiers.dram import DramPool
from appliance.security.keyring import Keyring, create_key_file
from appliance.types import BlockLayout, Fingerprint, Namespace, Tokens
from tests.support.faulty import FaultyTier

BLOCK_TOKENS = 16
LAYOUT = BlockLayout(BLOCK_TOKENS, token_bytes=(48, 16), fixed_bytes=(8, 0))
FINGERPRINT = Fingerprint(bytes(32), bytes([1]) * 32)
NS = Namespace("default")


def keyring(home: Path, *tenants: str) -> Keyring:
    """The keyring of `home`, created with these tenants if there is none."""
    if Keyring.exists(home):
        return Keyring.open(home, home / "unlock.key")
    home.mkdir(parents=True, exist_ok=True)
    create_key_file(home / "unlock.key")
    ring = Keyring.create(home, home / "unlock.key")
    for tenant in tenants or ("default",):
        ring.add_tenant(tenant)
    return ring


def token_s(position: int) -> float:
    """Deeper tokens take longer to compute."""
    return 1e-3 + 1e-6 * position


def payload(tokens: Tokens, start: int) -> bytes:
    """What the engine would export for this block: determined by tokens and place."""
    n = LAYOUT.payload_bytes(len(tokens))
    return hashlib.shake_128(start.to_bytes(8, "little") + tokens.data).digest(n)


def prompt(seed: int, n_tokens: int) -> Tokens:
    return Tokens.of(list(hashlib.shake_128(b"%d" % seed).digest(n_tokens)))


@asynccontextmanager
async def opened(
    home: Path,
    *,
    slots: int = 8,
    capacity: int = 2**20,
    segment: int = 2**16,
    write_behind: int = 2**20,
    read_size: int = 2**16,
    nvme: bool = True,
    eviction: Literal["cost", "lru"] = "cost",
    ring: Keyring | None = None,
    fingerprint: Fingerprint = FINGERPRINT,
    retention_s: float | None = None,
    clock: Callable[[], float] = time.time,
    cost: Callable[[int], float] = token_s,
) -> AsyncIterator[TieredStore]:
    pool = DramPool(slots * LAYOUT.slot_bytes, lock=False)
    store = await open_store(
        home,
        ring or keyring(home),
        fingerprint,
        LAYOUT,
        pool,
        KVSection(
            write_behind=write_behind,
            read_size=read_size,
            transfer_threads=2,
            eviction=eviction,
            retention=None if retention_s is None else f"{retention_s}s",
        ),
        NvmeSection(enabled=nvme, capacity=capacity, segment=segment),
        cost,
        clock,
    )
    try:
        yield store
        if not store._closing:
            await store.flush(5)
    finally:
        if not store._closing:
            await store.close()
        pool.close()


def faulty(store: TieredStore) -> FaultyTier:
    """Put a tier that can fail under a store that is open."""
    assert store._below is not None
    sealed = store._below.sealed
    sealed.tier = tier = FaultyTier(sealed.tier)
    return tier


def view(store: KVStore, slot: int) -> memoryview:
    assert isinstance(store, TieredStore)
    return store._memory.view(slot)


async def fill(
    store: KVStore, tokens: Tokens, ns: Namespace = NS, *, retention_s: float | None = None
) -> list[NewBlock]:
    """Compute and commit whatever is missing, as a request does."""
    stored: list[NewBlock] = []
    store.keep(ns, tokens, retention_s=retention_s)
    while missing := store.missing(ns, tokens):
        reserved = await store.reserve(ns, missing, retention_s=retention_s)
        assert reserved, "what is missing can be reserved"
        for reservation in reserved:
            kv = payload(reservation.new.tokens, reservation.new.start)
            view(store, reservation.slot)[: len(kv)] = kv
        store.commit(reserved)
        stored += [reservation.new for reservation in reserved]
    return stored


async def restored(store: KVStore, tokens: Tokens, ns: Namespace = NS, hits: Sequence[Hit] | None = None) -> int:
    """Stage what is stored of `tokens` and compare every byte; returns the tokens that came."""
    reached = 0
    hits = store.lookup(ns, tokens).hits if hits is None else hits
    async for staged in store.stage(ns, tokens, hits):
        for hit, slot in zip(staged.hits, staged.slots, strict=True):
            assert hit.start == reached, "blocks come in order"
            n = hit.use_tokens
            got = bytes(view(store, slot)[: hit.payload_bytes])
            if n == hit.n_tokens:
                assert got == payload(tokens[hit.start : hit.start + n], hit.start), "never other bytes"
            reached = hit.start + n
        store.unpin(staged)
    return reached
