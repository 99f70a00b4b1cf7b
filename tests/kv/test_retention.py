"""What is asked to stay in memory only is never written; who wants more for the same blocks gets it."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

import pytest

from appliance.kv.retention import Retention
from appliance.types import BlockId
from tests.support.kv import LAYOUT, NS, fill, opened, payload, prompt, restored, view

TOKENS, OTHER = prompt(1, 16 * 3 + 5), prompt(2, 32)


async def test_what_stays_in_memory_only_is_found_there_and_not_after_a_restart(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await fill(store, TOKENS, retention_s=0)
        assert await store.flush(5)
        assert await restored(store, TOKENS) == 53
        assert store.counters()['store_bytes_total{tier="nvme"}'] == 0
    async with opened(tmp_path) as store:
        assert store.lookup(NS, TOKENS).tokens == 0


async def test_it_makes_room_like_anything_else(tmp_path: Path) -> None:
    async with opened(tmp_path, slots=4) as store:
        await fill(store, TOKENS, retention_s=0)
        await fill(store, prompt(2, 64))
        assert store.lookup(NS, prompt(2, 64)).tokens == 64


async def test_the_longer_wish_counts(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await fill(store, TOKENS, retention_s=0)
        assert await fill(store, TOKENS) == [], "nothing is computed again"
    async with opened(tmp_path) as store:
        assert await restored(store, TOKENS) == 53
        await fill(store, TOKENS, retention_s=0)
    async with opened(tmp_path) as store:
        assert await restored(store, TOKENS) == 53


async def test_a_longer_tail_in_memory_does_not_take_a_shorter_ones_place_below(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await fill(store, TOKENS[:50])
        await fill(store, TOKENS, retention_s=0)
        assert store.lookup(NS, TOKENS).tokens == 53
    async with opened(tmp_path) as store:
        assert await restored(store, TOKENS[:50]) == 50


async def test_who_keeps_a_block_while_another_stores_it_in_memory_only_has_it_written(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        reserved = await store.reserve(NS, store.missing(NS, TOKENS), retention_s=0)
        store.keep(NS, TOKENS)
        for reservation in reserved:
            kv = payload(reservation.new.tokens, reservation.new.start)
            view(store, reservation.slot)[: len(kv)] = kv
        store.commit(reserved)
    async with opened(tmp_path) as store:
        assert await restored(store, TOKENS) == 53


async def test_what_is_kept_while_write_behind_is_at_its_bound_is_written_later(tmp_path: Path) -> None:
    block = LAYOUT.payload_bytes(16)
    async with opened(tmp_path, write_behind=block) as store:
        await fill(store, TOKENS, retention_s=0)
        store.keep(NS, TOKENS)
        assert store.usage()[1].pending_bytes <= block
        for _ in range(500):
            if await store.flush(5):
                break
            await asyncio.sleep(0.01)
    async with opened(tmp_path) as store:
        assert await restored(store, TOKENS) == 53


class Clock:
    def __init__(self) -> None:
        self.now_s = 1e9

    def __call__(self) -> float:
        return self.now_s


async def test_what_expired_is_a_miss_at_once_and_gone_soon_after(tmp_path: Path) -> None:
    clock = Clock()
    async with opened(tmp_path, clock=clock) as store:
        await fill(store, TOKENS, retention_s=60)
        await fill(store, OTHER)
        await store.flush(5)
        clock.now_s += 59
        assert store.lookup(NS, TOKENS).tokens == 53
        clock.now_s += 1
        assert store.lookup(NS, TOKENS).tokens == 0
        assert len(store.missing(NS, TOKENS)) == 4
        store._storing._expiry.sweep()
        assert [tier.blocks for tier in store.usage()] == [2, 2], "what is kept for ever"
        assert await restored(store, OTHER) == 32
        counters = store.counters()
        assert [counters[f'evicted_blocks_total{{tier="{tier}",reason="expired"}}'] for tier in ("dram", "nvme")] == [
            4,
            4,
        ]
        assert len(store._retention) == 0


@pytest.mark.parametrize("swept", [False, True])
async def test_what_expired_can_be_stored_anew(tmp_path: Path, swept: bool) -> None:
    clock = Clock()
    async with opened(tmp_path, clock=clock) as store:
        await fill(store, TOKENS, retention_s=60)
        await store.flush(5)
        clock.now_s += 61
        if swept:
            store._storing._expiry.sweep()
        assert len(await fill(store, TOKENS)) == 4
        await store.flush(5)
        clock.now_s += 1000
        store._storing._expiry.sweep()
        store.evict_dram()
        assert await restored(store, TOKENS) == 53
    async with opened(tmp_path, clock=clock) as store:
        assert await restored(store, TOKENS) == 53


async def test_the_time_counts_from_the_last_use_and_the_longest_wish_counts(tmp_path: Path) -> None:
    clock = Clock()
    async with opened(tmp_path, clock=clock) as store:
        await fill(store, TOKENS, retention_s=60)
        clock.now_s += 40
        assert await fill(store, TOKENS, retention_s=60) == []
        clock.now_s += 40
        assert store.lookup(NS, TOKENS).tokens == 53
        await fill(store, TOKENS[:32], retention_s=600)
        await fill(store, TOKENS[:32], retention_s=1)
        clock.now_s += 100
        assert store.lookup(NS, TOKENS).tokens == 32, "only what the two share was wanted for longer"
        await fill(store, TOKENS[:16])
        clock.now_s += 1000
        assert store.lookup(NS, TOKENS).tokens == 16, "of which the first block is wanted for ever"


async def test_a_retention_survives_a_restart_and_runs_on_meanwhile(tmp_path: Path) -> None:
    clock = Clock()
    async with opened(tmp_path, clock=clock) as store:
        await fill(store, TOKENS, retention_s=60)
        await fill(store, OTHER, retention_s=60)
        await store.flush(5)
        clock.now_s += 30
        await fill(store, OTHER, retention_s=100)
    clock.now_s += 29
    async with opened(tmp_path, clock=clock) as store:
        assert store.lookup(NS, TOKENS).tokens == 53
    clock.now_s += 2
    async with opened(tmp_path, clock=clock) as store:
        assert store.lookup(NS, TOKENS).tokens == 0
        assert await restored(store, OTHER) == 32
        assert store.usage()[1].blocks == 2
        clock.now_s += 100
        assert store.lookup(NS, OTHER).tokens == 0


async def test_the_profile_says_how_long_where_a_request_does_not(tmp_path: Path) -> None:
    clock = Clock()
    async with opened(tmp_path, clock=clock, retention_s=60) as store:
        await fill(store, TOKENS)
        await fill(store, OTHER, retention_s=600)
        await store.flush(5)
        clock.now_s += 61
        assert store.lookup(NS, TOKENS).tokens == 0
        assert store.lookup(NS, OTHER).tokens == 32
    async with opened(tmp_path / "memory", clock=clock, retention_s=0) as store:
        await fill(store, TOKENS)
        assert await store.flush(5)
        assert store.lookup(NS, TOKENS).tokens == 53
        assert store.usage()[1].blocks == 0


async def test_a_rebuilt_index_knows_the_profiles_retention_only(tmp_path: Path) -> None:
    clock = Clock()
    async with opened(tmp_path, clock=clock) as store:
        await fill(store, TOKENS, retention_s=60)
    (tmp_path / "store" / "index" / "index.lmdb").unlink()
    clock.now_s += 61
    async with opened(tmp_path, clock=clock, retention_s=100) as store:
        assert store.lookup(NS, TOKENS).tokens == 53
        clock.now_s += 40
        assert store.lookup(NS, TOKENS).tokens == 0


async def test_a_longer_block_that_is_kept_shorter_does_not_take_a_tails_place(tmp_path: Path) -> None:
    clock = Clock()
    async with opened(tmp_path, clock=clock) as store:
        await fill(store, TOKENS[:50])
        await store.flush(5)
        await fill(store, TOKENS, retention_s=60)
        await store.flush(5)
        clock.now_s += 61
        store._storing._expiry.sweep()
        assert await restored(store, TOKENS[:50]) == 50


async def test_what_a_request_holds_goes_when_it_lets_go(tmp_path: Path) -> None:
    clock = Clock()
    async with opened(tmp_path, clock=clock) as store:
        await fill(store, TOKENS, retention_s=60)
        await store.flush(5)
        async with aclosing(store.stage(NS, TOKENS, store.lookup(NS, TOKENS).hits)) as runs:
            staged = await anext(runs)
            clock.now_s += 61
            store._storing._expiry.sweep()
            assert len(store.in_dram([hit.block for hit in staged.hits])) == len(staged.hits)
            store.unpin(staged)
        store._storing._expiry.sweep()
        assert [tier.blocks for tier in store.usage()] == [0, 0]


def test_what_no_tier_holds_takes_no_memory_for_long() -> None:
    retention = Retention(None, lambda: 1e9)
    for n in range(20_000):
        retention.begin(BlockId(b"%032d" % n), retention.wished(60))
        retention.prune(lambda block: False)
    assert len(retention) < 10_000
