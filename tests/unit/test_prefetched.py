"""What became of prefetched blocks: hit, late, wasted; and nothing is counted twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from appliance.kv.store import TieredStore
from appliance.prefetched import EXPIRES_S, Prefetched
from appliance.types import Tokens
from tests.support.kv import LAYOUT, NS, faulty, fill, opened, prompt
from tests.support.stub_runtime import until

pytestmark = pytest.mark.asyncio

LONG = prompt(1, 16 * 4)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[TieredStore]:
    async with opened(tmp_path, slots=8) as store:
        for seed in range(1, 4):
            await fill(store, prompt(seed, len(LONG)))
            await store.flush(5)
            store.evict_dram()
        yield store
        assert store._dram._pinned == 0


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


async def bring(prefetched: Prefetched, store: TieredStore, tokens: Tokens) -> None:
    async for staged in prefetched.stage(NS, tokens, store.lookup(NS, tokens).hits, set()):
        store.unpin(staged)


def counts(prefetched: Prefetched) -> tuple[int, int, int, int]:
    totals = prefetched.totals()
    assert totals.moved == totals.hit + totals.late + totals.wasted + len(prefetched._waiting)
    return totals.moved, totals.hit, totals.late, totals.wasted


async def test_a_block_that_is_asked_for_in_time_is_a_hit_once(store: TieredStore) -> None:
    prefetched = Prefetched(store)
    await bring(prefetched, store, LONG)
    assert counts(prefetched) == (4, 0, 0, 0)
    assert prefetched.counters()["prefetch_bytes_total"] == 4 * LAYOUT.payload_bytes(16)
    for _ in range(2):
        prefetched.asked(NS, LONG)
    assert counts(prefetched) == (4, 4, 0, 0)
    await bring(prefetched, store, LONG)
    assert counts(prefetched) == (4, 4, 0, 0), "they were in DRAM already"


async def test_only_what_a_request_shares_is_a_hit(store: TieredStore) -> None:
    prefetched = Prefetched(store)
    await bring(prefetched, store, LONG)
    prefetched.asked(NS, LONG[:32] + prompt(9, 32))
    assert counts(prefetched) == (4, 2, 0, 0)


async def test_a_block_that_still_moves_when_it_is_asked_for_is_late(store: TieredStore) -> None:
    gate = faulty(store).hold("read")
    prefetched = Prefetched(store)
    moving = asyncio.ensure_future(bring(prefetched, store, LONG))
    await until(gate.reached.is_set)
    prefetched.asked(NS, LONG)
    gate.open()
    await moving
    assert counts(prefetched) == (4, 0, 4, 0)
    prefetched.asked(NS, LONG)
    assert counts(prefetched) == (4, 0, 4, 0)


async def test_a_block_that_is_evicted_or_expires_before_it_is_asked_for_is_wasted(store: TieredStore) -> None:
    clock = Clock()
    prefetched = Prefetched(store, clock)
    await bring(prefetched, store, LONG)
    store.evict_dram()
    assert counts(prefetched) == (4, 0, 0, 4)
    await bring(prefetched, store, LONG)
    clock.now_s += EXPIRES_S + 1
    assert counts(prefetched) == (8, 0, 0, 8)
    prefetched.asked(NS, LONG)
    assert counts(prefetched) == (8, 0, 0, 8)


async def test_a_read_that_fails_is_nothing_and_leaves_nothing(store: TieredStore) -> None:
    faulty(store).fail("read", 9)
    prefetched = Prefetched(store)
    await bring(prefetched, store, LONG)
    assert counts(prefetched) == (0, 0, 0, 0)
    assert not prefetched._moving


async def test_blocks_to_spare_are_spared_and_room_is_not_waited_for(store: TieredStore) -> None:
    needed = prompt(2, len(LONG))
    async for staged in store.stage(NS, needed, store.lookup(NS, needed).hits):
        store.unpin(staged)
    spared = {hit.block for hit in store.lookup(NS, needed).hits}
    third = prompt(3, len(LONG))
    for tokens in (LONG, third):
        hits = store.lookup(NS, tokens).hits
        came = 0
        async for staged in Prefetched(store).stage(NS, tokens, hits, spared):
            came += len(staged.hits)
            store.unpin(staged)
        assert came == 4
        assert store.in_dram(spared) == spared
    everything = spared | {hit.block for hit in store.lookup(NS, third).hits}
    staging = Prefetched(store).stage(NS, LONG, store.lookup(NS, LONG).hits, everything)
    assert await asyncio.wait_for(anext(staging, None), 5) is None
    assert store.in_dram(everything) == everything
