"""A medium that fails for a while, in one place, or that no longer answers: misses, and nothing lost that is still there."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from appliance.errors import TierIO
from appliance.kv.breaker import Breaker
from appliance.kv.store import TieredStore
from appliance.kv.tiers.base import Extent
from tests.support.faulty import eio
from tests.support.kv import NS, faulty, fill, opened, prompt, restored

TOKENS, OTHER = prompt(1, 16 * 6), prompt(2, 16 * 2)


class Clock:
    """Of the breaker for loads."""

    def __init__(self, store: TieredStore) -> None:
        self.now_s = 100.0
        store._below.loads.breaker._monotonic = lambda: self.now_s

    def pass_retry_time(self) -> None:
        self.now_s += 3600


def test_the_retry_time_doubles_with_each_try_not_with_each_failure() -> None:
    now_s = 100.0
    breaker = Breaker(lambda: now_s)
    assert [breaker.failed() for _ in range(3)] == [1, 1, 1]
    assert not breaker.allows
    now_s += 1
    assert breaker.allows
    assert [breaker.failed() for _ in range(3)] == [2, 2, 2]
    breaker.worked()
    assert breaker.allows
    assert breaker.failed() == 1


async def _stored(home: Path) -> None:
    async with opened(home) as store:
        await fill(store, TOKENS)
        await fill(store, OTHER)


async def test_an_outage_costs_no_blocks_however_long(tmp_path: Path) -> None:
    await _stored(tmp_path)
    async with opened(tmp_path) as store:
        tier, clock = faulty(store), Clock(store)
        for _ in range(2):
            for _ in range(3):
                tier.fail("read", 100)
                assert await restored(store, TOKENS) == 0
                await store._below.tasks.settle()
                clock.pass_retry_time()
            tier.heal()
            assert await restored(store, OTHER) == len(OTHER), "the medium is back"
            store.evict_dram()
        assert store.counters()["quarantined_total"] == 0
        assert await restored(store, TOKENS) == len(TOKENS)


async def test_a_bad_sector_costs_the_block_on_it(tmp_path: Path) -> None:
    await _stored(tmp_path)
    async with opened(tmp_path) as store:
        tier, clock = faulty(store), Clock(store)
        third = store.lookup(NS, TOKENS).hits[2].block
        bad = store._below.entries([third])[third].extent

        def unreadable(extent: Extent, _: memoryview) -> None:
            if extent.segment == bad.segment and extent.offset < bad.end and bad.offset < extent.end:
                raise eio()

        tier.spoil = unreadable
        for _ in range(4):
            await restored(store, TOKENS)
            await store._below.tasks.settle()
            clock.pass_retry_time()
        assert store.counters()["quarantined_total"] == 1
        assert await restored(store, TOKENS) == 32
        assert [new.start for new in await fill(store, TOKENS)] == [32], "its neighbours are still there"


async def test_a_medium_that_does_not_answer_is_left_alone_until_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.kv.patience.PATIENCE_S", 0.05)
    await _stored(tmp_path)
    async with opened(tmp_path) as store:
        tier, clock = faulty(store), Clock(store)
        gate = tier.hold("read")
        try:
            assert await asyncio.gather(restored(store, TOKENS), restored(store, TOKENS)) == [0, 0]
            assert store.usage()[1].state == "degraded"
            assert store.lookup(NS, TOKENS).tokens == 0, "neither what is below nor what is being read"
            assert await restored(store, OTHER) == 0
            clock.pass_retry_time()
            assert await restored(store, TOKENS) == 0, "the next try waits no longer either"
            assert store.usage()[1].state == "degraded"
        finally:
            gate.open()
        await store._below.tasks.settle()
        assert store.usage()[1].state == "ok"
        assert await restored(store, TOKENS) == len(TOKENS)
        assert store._dram._pinned == 0


async def test_a_pool_full_of_reads_that_hang_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.kv.patience.PATIENCE_S", 0.05)
    async with opened(tmp_path) as store:
        for n in range(3):
            await fill(store, prompt(n, 16))
    async with opened(tmp_path, slots=2) as store:
        tier, clock = faulty(store), Clock(store)
        gate = tier.hold("read")
        try:
            for n in range(3):
                assert await restored(store, prompt(n, 16)) == 0
                clock.pass_retry_time()
            assert not store._dram.has_room("default")
        finally:
            gate.open()
        await store._below.tasks.settle()
        assert [await restored(store, prompt(n, 16)) for n in range(3)] == [16] * 3


async def test_a_block_stored_anew_replaces_a_record_that_could_not_be_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as store:
        await fill(store, TOKENS)
        await store.flush(5)
        store.evict_dram()
        before = store.usage()[1]

        def refuse(changes: object) -> None:
            raise TierIO("injected")

        with monkeypatch.context() as broken:
            broken.setattr(store._below.index, "apply", refuse)
            store._below.quarantine(store.lookup(NS, TOKENS).hits[1].block)
            await store._below.tasks.settle()
        assert [new.start for new in await fill(store, TOKENS)] == [16]
        await store.flush(5)
        store.evict_dram()
        assert await restored(store, TOKENS) == len(TOKENS)
        after = store.usage()[1]
        assert (after.used_bytes, after.tokens) == (before.used_bytes, before.tokens)
