"""What is asked to stay in memory only is never written; who wants more for the same blocks gets it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.support.kv import LAYOUT, NS, fill, opened, payload, prompt, restored, view

TOKENS = prompt(1, 16 * 3 + 5)


async def test_what_stays_in_memory_only_is_found_there_and_not_after_a_restart(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await fill(store, TOKENS, durable=False)
        assert await store.flush(5)
        assert await restored(store, TOKENS) == 53
        assert store.counters()['store_bytes_total{tier="nvme"}'] == 0
    async with opened(tmp_path) as store:
        assert store.lookup(NS, TOKENS).tokens == 0


async def test_it_makes_room_like_anything_else(tmp_path: Path) -> None:
    async with opened(tmp_path, slots=4) as store:
        await fill(store, TOKENS, durable=False)
        await fill(store, prompt(2, 64))
        assert store.lookup(NS, prompt(2, 64)).tokens == 64


async def test_the_longer_wish_counts(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await fill(store, TOKENS, durable=False)
        assert await fill(store, TOKENS) == [], "nothing is computed again"
    async with opened(tmp_path) as store:
        assert await restored(store, TOKENS) == 53
        await fill(store, TOKENS, durable=False)
    async with opened(tmp_path) as store:
        assert await restored(store, TOKENS) == 53


async def test_a_longer_tail_in_memory_does_not_take_a_shorter_ones_place_below(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await fill(store, TOKENS[:50])
        await fill(store, TOKENS, durable=False)
        assert store.lookup(NS, TOKENS).tokens == 53
    async with opened(tmp_path) as store:
        assert await restored(store, TOKENS[:50]) == 50


async def test_who_keeps_a_block_while_another_stores_it_in_memory_only_has_it_written(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        reserved = await store.reserve(NS, store.missing(NS, TOKENS), durable=False)
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
        await fill(store, TOKENS, durable=False)
        store.keep(NS, TOKENS)
        assert store.usage()[1].pending_bytes <= block
        for _ in range(500):
            if await store.flush(5):
                break
            await asyncio.sleep(0.01)
    async with opened(tmp_path) as store:
        assert await restored(store, TOKENS) == 53
