"""What is pinned stays, whoever needs room, over restarts, within a budget; unpinned, it goes like anything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance.errors import RequestError
from tests.support.kv import NS, fill, opened, prompt, restored

PINNED = prompt(1, 16 * 3 + 5)
CAPACITY = 40 * 8192


async def crowd(store: object, first: int = 10) -> None:
    for seed in range(first, first + 30):
        await fill(store, prompt(seed, 48))  # type: ignore[arg-type]


@pytest.mark.parametrize("eviction", ["cost", "lru"])
async def test_a_pinned_prompt_stays_whoever_needs_room(tmp_path: Path, eviction: str) -> None:
    async with opened(tmp_path, capacity=CAPACITY, eviction=eviction) as store:  # type: ignore[arg-type]
        await fill(store, PINNED)
        assert await store.pin_prompt(NS, PINNED) == 53
        await crowd(store)
        assert await restored(store, PINNED) == 53
    async with opened(tmp_path, capacity=CAPACITY, eviction=eviction) as store:  # type: ignore[arg-type]
        assert store.usage()[1].pinned_blocks == 4
        await crowd(store, 50)
        assert await restored(store, PINNED) == 53
        assert await store.unpin_prompt(NS, PINNED) == 4
        await crowd(store, 90)
        assert store.lookup(NS, PINNED).tokens == 0
        assert store.usage()[1].pinned_bytes == 0


async def test_without_a_tier_below_it_stays_in_dram(tmp_path: Path) -> None:
    async with opened(tmp_path, nvme=False) as store:
        await fill(store, PINNED)
        assert await store.pin_prompt(NS, PINNED) == 53
        await crowd(store)
        assert store.evict_dram() == 0
        assert await restored(store, PINNED) == 53
        assert await store.unpin_prompt(NS, PINNED) == 4
        await crowd(store)
        assert store.lookup(NS, PINNED).tokens == 0


async def test_pins_are_refused_beyond_their_budget_and_change_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path, slots=40, capacity=CAPACITY) as store:
        for seed in range(8):
            await fill(store, prompt(seed, 48))
        seed = 0
        while store.usage()[1].pinned_bytes + 3 * 8192 <= CAPACITY // 2:
            assert await store.pin_prompt(NS, prompt(seed, 48)) == 48
            seed += 1
        before = store.usage()[1]
        with pytest.raises(
            RequestError, match=r"0\.0 MiB more .*0\.1 MiB are, and kv\.pin_budget allows 0\.2"
        ) as refused:
            await store.pin_prompt(NS, prompt(seed, 48))
        assert refused.value.status == 409
        now = store.usage()[1]
        assert (now.pinned_blocks, now.pinned_bytes) == (before.pinned_blocks, before.pinned_bytes)
        assert 0 < now.pinned_bytes <= now.pin_budget_bytes == CAPACITY // 2


async def test_what_two_pinned_prompts_share_stays_until_both_are_unpinned(tmp_path: Path) -> None:
    other = PINNED[:32] + prompt(3, 16)
    async with opened(tmp_path) as store:
        for tokens in (PINNED, other):
            await fill(store, tokens)
            await store.pin_prompt(NS, tokens)
        assert store.usage()[1].pinned_blocks == 5
        assert await store.unpin_prompt(NS, PINNED) == 2
        assert store.usage()[1].pinned_blocks == 3
        assert await store.unpin_prompt(NS, other) == 3


async def test_a_pinned_tail_is_not_superseded_and_not_erased(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await fill(store, PINNED)
        await store.pin_prompt(NS, PINNED)
        await fill(store, PINNED + prompt(4, 20))
        await store.flush(5)
        assert await store.erase(NS, PINNED) == 0
        assert store.usage()[1].pinned_blocks == 4
        assert await restored(store, PINNED) == 53


async def test_a_smaller_capacity_takes_what_is_not_pinned_first(tmp_path: Path) -> None:
    async with opened(tmp_path, capacity=CAPACITY) as store:
        await fill(store, PINNED)
        await store.pin_prompt(NS, PINNED)
        for seed in range(10, 16):
            await fill(store, prompt(seed, 48))
    async with opened(tmp_path, capacity=CAPACITY // 3) as store:
        assert await restored(store, PINNED) == 53


async def test_what_was_in_memory_only_or_ends_is_kept_when_it_is_pinned(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await fill(store, PINNED, retention_s=0)
        assert await store.pin_prompt(NS, PINNED) == 53
        assert await store.pin_prompt(NS, prompt(9, 40)) == 0
    async with opened(tmp_path) as store:
        assert await restored(store, PINNED) == 53
