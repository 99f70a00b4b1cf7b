"""One tenant's flood costs another nothing while it holds no more than its share."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from appliance.kv.fair import FairShare
from appliance.kv.policy import LeafFirstLru
from appliance.kv.record import record_bytes
from appliance.types import Namespace
from tests.support.kv import LAYOUT, fill, keyring, opened, prompt

A, B = Namespace("a"), Namespace("b")


@pytest.mark.parametrize("seed", range(20))
def test_who_holds_no_more_than_a_share_loses_nothing(seed: int) -> None:
    draw = random.Random(seed)
    tenants, capacity = [f"t{n}" for n in range(draw.randint(2, 5))], draw.randint(20, 60)
    policy: FairShare[int] = FairShare(LeafFirstLru)
    held: Counter[str] = Counter()
    for number in range(2000):
        tenant = draw.choices(tenants, weights=[10**n for n in range(len(tenants))])[0]
        if len(policy) == capacity:
            (victim,) = policy.evict(1, (), tenant)
            owner = policy.owner(victim)
            assert owner is not None
            holders = len({*(t for t in held if held[t]), tenant})
            assert owner == tenant or held[owner] > capacity / holders
            policy.remove(victim)
            held[owner] -= 1
        policy.add(tenant, number, -1, 0)
        held[tenant] += 1
    assert Counter(policy.owner(block) for block in policy.oldest_first()) == +held


def test_what_cannot_go_is_passed_over_and_others_give_instead() -> None:
    policy: FairShare[int] = FairShare(LeafFirstLru)
    for n in range(6):
        policy.add("a", n, -1, 0)
    policy.add("b", 10, -1, 0)
    assert policy.evict(2, {0, 1}, "b") == [2, 3]
    assert policy.evict(1, set(range(6)), "a") == [10]
    assert policy.evict(2, set(range(6)), "a") == []


@pytest.mark.parametrize("restart", [False, True])
async def test_a_flood_leaves_the_other_tenants_blocks_in_every_tier(tmp_path: Path, restart: bool) -> None:
    ring = keyring(tmp_path, "a", "b")
    capacity = 16 * record_bytes(LAYOUT, 16) + 3 * 8192
    mine = prompt(1, 64)
    async with opened(tmp_path, slots=12, capacity=capacity, segment=2**20, ring=ring) as store:
        await fill(store, mine, B)
        await store.flush(5)
        if not restart:
            for seed in range(2, 12):
                await fill(store, prompt(seed, 64), A)
                await store.flush(5)
            assert [str(hit.tier) for hit in store.lookup(B, mine).hits] == ["dram"] * 4
            store.evict_dram()
            assert store.lookup(B, mine).tokens == 64
    if restart:
        async with opened(tmp_path, slots=12, capacity=capacity, segment=2**20, ring=ring) as store:
            for seed in range(2, 12):
                await fill(store, prompt(seed, 64), A)
                await store.flush(5)
            assert store.lookup(B, mine).tokens == 64
