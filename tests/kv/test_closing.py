"""A store that is closed while its threads are at work: they end first, and what they wrote is whole."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

import pytest

from appliance.kv.store import TieredStore
from tests.support.faulty import FaultyTier, Gate
from tests.support.kv import NS, faulty, fill, opened, prompt, restored

TOKENS = prompt(1, 16 * 4 + 3)


async def _closes_only_after(gate: Gate, store: TieredStore, tier: FaultyTier) -> None:
    await asyncio.to_thread(gate.reached.wait)
    closing = asyncio.ensure_future(store.close())
    try:
        ended, _ = await asyncio.wait({closing}, timeout=0.1)
        assert not ended
        assert "close" not in tier.calls
    finally:
        gate.open()
        await closing
    assert tier.calls["close"] == 1


@pytest.mark.parametrize("op", ["reserve", "write", "sync"])
async def test_a_batch_that_is_being_written_ends_before_the_medium_closes(tmp_path: Path, op: str) -> None:
    async with opened(tmp_path, slots=16) as store:
        tier = faulty(store)
        gate = tier.hold(op)
        await fill(store, TOKENS)
        await _closes_only_after(gate, store, tier)
    async with opened(tmp_path) as store:
        assert await restored(store, TOKENS) == len(TOKENS), "and it is committed"


async def test_no_batch_begins_while_the_store_closes(tmp_path: Path) -> None:
    async with opened(tmp_path, slots=16) as store:
        tier = faulty(store)
        gate = tier.hold("write")
        await fill(store, TOKENS)
        await asyncio.to_thread(gate.reached.wait)
        await fill(store, prompt(2, 16))
        await _closes_only_after(gate, store, tier)
        assert tier.calls["write"] == 1
    async with opened(tmp_path) as store:
        assert store.lookup(NS, prompt(2, 16)).tokens == 0


async def test_a_verification_that_was_left_ends_before_the_medium_closes(tmp_path: Path) -> None:
    async with opened(tmp_path, slots=16) as store:
        await fill(store, TOKENS)
        await store.flush(5)
        tier = faulty(store)
        gate = tier.hold("read")

        async def look() -> None:
            async with aclosing(store.verify(repair=False)) as steps:
                async for _ in steps:
                    pass

        looking = asyncio.ensure_future(look())
        await asyncio.to_thread(gate.reached.wait)
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
        await _closes_only_after(gate, store, tier)


async def test_a_read_that_was_left_ends_before_the_medium_closes(tmp_path: Path) -> None:
    async with opened(tmp_path, slots=16) as store:
        await fill(store, TOKENS)
        await store.flush(5)
        store.evict_dram()
        tier = faulty(store)
        gate = tier.hold("read")
        reading = asyncio.ensure_future(restored(store, TOKENS))
        await asyncio.to_thread(gate.reached.wait)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await _closes_only_after(gate, store, tier)
