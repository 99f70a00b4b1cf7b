"""What is asked to stay in memory only is never written; who wants more for the same blocks gets it."""

from __future__ import annotations

from pathlib import Path

from tests.support.kv import NS, fill, opened, prompt, restored

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
