"""Write-behind under pressure: its bound, its patience, and media too small or filled by others."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from appliance.errors import StoreBusy, TierFull
from appliance.kv.record import RecordIdentity, record_bytes
from appliance.kv.store import TieredStore
from appliance.kv.tiers.sealed import Plain
from tests.support.faulty import full
from tests.support.kv import FINGERPRINT, LAYOUT, NS, faulty, fill, opened, prompt, restored

BLOCK_BYTES = LAYOUT.payload_bytes(16)
SMALL_BYTES = 10 * record_bytes(LAYOUT, 16) + 8192
"""Ten blocks."""
EVICTED = 'evicted_blocks_total{tier="nvme",reason="capacity"}'


async def _tried_again(store: TieredStore) -> bool:
    store._below.stores.worked()
    store._writer._requeue()
    return await store.flush(5)


async def test_what_is_tried_again_stays_within_the_bound(tmp_path: Path) -> None:
    bound = 3 * BLOCK_BYTES
    async with opened(tmp_path, slots=32, write_behind=bound) as store:
        tier = faulty(store)
        tier.fail("write", 100)
        prompts = [prompt(n, 64) for n in range(4)]
        for tokens in prompts:
            await fill(store, tokens)
        assert not await store.flush(5)
        tier.heal()
        reserved = await store.reserve(NS, store.missing(NS, prompt(9, 32)))
        store._below.stores.worked()
        store._writer._requeue()
        assert store._writer.dirty_bytes == BLOCK_BYTES, "the rest is promised"
        store.abort(reserved)
        assert await store.flush(5)
        store.evict_dram()
        assert [await restored(store, tokens) for tokens in prompts] == [64] * 4


async def test_patience_begins_with_the_wait(tmp_path: Path) -> None:
    async with opened(tmp_path, slots=4) as store:
        store._storing._patience._moved_s -= 3600  # nothing moved, as nothing was to be done
        held = await store.reserve(NS, store.missing(NS, prompt(1, 64)))
        waiting = asyncio.ensure_future(store.reserve(NS, store.missing(NS, prompt(2, 64))))
        await asyncio.sleep(0)
        store.abort(held)
        store.abort(await waiting)


async def test_hits_beside_it_do_not_hide_a_medium_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.kv.patience.PATIENCE_S", 0.05)
    async with opened(tmp_path, write_behind=BLOCK_BYTES) as store:
        gate = faulty(store).hold("write")
        try:
            await fill(store, hot := prompt(1, 16))
            waiting = asyncio.ensure_future(store.reserve(NS, store.missing(NS, prompt(2, 16))))
            while not waiting.done():  # pins and unpins all the time
                assert await restored(store, hot) == 16
                await asyncio.sleep(0)
            with pytest.raises(StoreBusy):
                await waiting
            assert store.usage()[1].state == "degraded"
        finally:
            gate.open()
        assert await store.flush(5)
        assert store.usage()[1].state == "ok"


async def test_a_bug_costs_the_batch_it_hits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(tmp_path, slots=16) as store:

        def wrong(*_: object) -> None:
            raise AssertionError("content")

        with monkeypatch.context() as broken, caplog.at_level(logging.DEBUG):
            broken.setattr(store._below.sealed, "store", wrong)
            await fill(store, prompt(1, 40))
            assert not await store.flush(5)
        assert "AssertionError" in caplog.text
        assert "content" not in caplog.text
        assert store.counters()['store_failures_total{tier="nvme",reason="bug"}'] == 3
        await fill(store, prompt(2, 40))
        assert await _tried_again(store)
        store.evict_dram()
        assert (await restored(store, prompt(1, 40)), await restored(store, prompt(2, 40))) == (40, 40)


async def test_a_prompt_larger_than_the_tier_leaves_it_full_not_empty(tmp_path: Path) -> None:
    async with opened(tmp_path, slots=64, capacity=SMALL_BYTES, segment=2**20) as store:
        for n in (1, 2):
            await fill(store, prompt(n, 64))
            await store.flush(5)
        await fill(store, prompt(3, 16 * 12))
        assert await store.flush(5)
        assert store.usage()[1].blocks >= 8
        assert store.usage()[1].state == "ok"


async def test_what_can_never_fit_evicts_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path, slots=64, capacity=SMALL_BYTES, segment=2**20) as store:
        await fill(store, prompt(1, 64))
        await store.flush(5)
        slot = memoryview(bytearray(LAYOUT.slot_bytes))
        blocks = [
            Plain(RecordIdentity("default", NS.name, new.block, new.parent, new.start, new.tokens, FINGERPRINT), slot)
            for new in store.missing(NS, prompt(3, 16 * 12))
        ]
        with pytest.raises(TierFull):
            await store._below.store(blocks)
        assert store.usage()[1].blocks == 4


async def test_a_disk_that_others_keep_full_costs_old_blocks_once(tmp_path: Path) -> None:
    async with opened(tmp_path, slots=32) as store:
        for n in range(4):
            await fill(store, prompt(n, 64))
            await store.flush(5)
        tier = faulty(store)
        tier.fail("write", 100, error=full)
        await fill(store, prompt(9, 32))
        assert not await store.flush(5)
        once = store.counters()[EVICTED]
        assert once >= 2
        for _ in range(3):
            assert not await _tried_again(store)
        assert store.counters()[EVICTED] == once
        tier.heal()
        assert await _tried_again(store)
        tier.fail("write", 1, error=full)
        await fill(store, prompt(8, 32))
        assert await store.flush(5)
        assert store.counters()[EVICTED] > once, "what helped once may help again"
