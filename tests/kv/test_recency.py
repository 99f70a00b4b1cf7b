"""Which blocks are forgotten first: a use counts wherever it was served from, and for the whole prefix, across restarts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from appliance.ahead import Ahead
from appliance.going import Going
from appliance.kv.policy import LeafFirstLru
from appliance.kv.record import record_bytes
from appliance.plan.cost import CostModel
from appliance.request import GenerateRequest
from appliance.run import Parts, RequestRun
from appliance.types import BlockId, SamplingParams
from tests.support.kv import LAYOUT, NS, fill, opened, prompt
from tests.support.stub_engine import StubEngine

RECORD = record_bytes(LAYOUT, 16)
SHARED, OTHER = prompt(1, 64), prompt(2, 32)


def room_for(blocks: int) -> int:
    return blocks * RECORD + 8192


def test_a_touched_prefix_is_newest_and_its_leaf_goes_first() -> None:
    a, b, c, other = (BlockId(bytes([n]) * 32) for n in range(1, 5))
    policy = LeafFirstLru()
    for block, parent in ((a, bytes(32)), (b, a), (c, b), (other, bytes(32))):
        policy.add(block, parent, 0)
    unknown = BlockId(b"?" * 32)
    assert policy.touch([a, b, unknown]) == [b, a], "up to the last one that is known"
    assert list(policy.oldest_first()) == [c, other, b, a]
    assert policy.touch([unknown]) == []
    assert policy.evict(2, {c}) == [other, b]
    assert policy.evict(4, {c}) == []


async def test_the_next_turn_is_a_use_of_what_it_continues(tmp_path: Path) -> None:
    async with opened(tmp_path, slots=32, segment=2**20, eviction="lru") as store:
        for tokens in (SHARED[:32], OTHER, SHARED):
            await fill(store, tokens)
            await store.flush(5)
    async with opened(tmp_path, capacity=room_for(4), segment=2**20, eviction="lru") as store:
        assert store.lookup(NS, SHARED).tokens == 64
        assert store.lookup(NS, OTHER).tokens == 0


async def test_what_a_new_block_continues_does_not_make_room_for_it(tmp_path: Path) -> None:
    async with opened(tmp_path, slots=32, capacity=room_for(4), segment=2**20, eviction="lru") as store:
        for tokens in (SHARED[:32], OTHER, SHARED):
            await fill(store, tokens)
            await store.flush(5)
        store.evict_dram()
        assert store.lookup(NS, SHARED).tokens == 64


@pytest.mark.parametrize("restart", [False, True])
async def test_a_prefix_that_hbm_serves_is_used(tmp_path: Path, restart: bool) -> None:
    async with opened(tmp_path, slots=32, capacity=room_for(6), segment=2**20, eviction="lru") as store:
        await fill(store, SHARED)
        for n in range(3, 6):
            store.touch(store.lookup(NS, SHARED).hits)
            await fill(store, prompt(n, 16))
            await store.flush(5)
        store.evict_dram()
        assert restart or store.lookup(NS, SHARED).tokens == 64
    async with opened(tmp_path, capacity=room_for(4), segment=2**20, eviction="lru") as store:
        assert store.lookup(NS, SHARED).tokens == 48, "all but its end, which goes before the newest"


class Resident(StubEngine):
    """Everything is in its cells already."""

    async def restore(self, request: str, start: int, blocks: Sequence[tuple[int, int, int]]) -> int:
        assert not blocks
        return len(self.known[request])


async def test_a_request_that_hbm_serves_says_so(tmp_path: Path) -> None:
    async with opened(tmp_path, slots=32) as store:
        for tokens in (SHARED, OTHER):
            await fill(store, tokens)
            await store.flush(5)
        cost = CostModel.calibrated(prefill_tokens_per_s=100, decode_step_s=0.1)
        engine = Resident()
        parts = Parts(engine, store, cost, Ahead(engine, store, cost, line=tuple), Going(1.0), store_completions=True)
        run = RequestRun(parts, GenerateRequest("r", NS, SHARED, SamplingParams(max_tokens=4)), arrived_s=0.0)
        await run.admit()
        await run.load()
        *_, newest = store._below.policy.oldest_first()
        assert newest == store.lookup(NS, SHARED).hits[0].block
