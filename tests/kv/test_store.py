"""The store as a request sees it, with tiny pools."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

from appliance.kv.record import record_bytes
from appliance.types import Fingerprint, Namespace, Tier, Tokens
from tests.support.kv import LAYOUT, NS, faulty, fill, keyring, opened, payload, prompt, restored, view


async def test_a_prompt_survives_eviction_and_restart(tmp_path: Path) -> None:
    tokens = prompt(1, 16 * 5 + 7)
    async with opened(tmp_path) as store:
        assert store.lookup(NS, tokens).tokens == 0
        assert len(await fill(store, tokens)) == 6
        assert {h.tier for h in store.lookup(NS, tokens).hits} == {Tier.DRAM}
        assert await restored(store, tokens) == len(tokens)
        assert await store.flush(5)
        assert store.evict_dram() == 6
        assert {h.tier for h in store.lookup(NS, tokens).hits} == {Tier.NVME}
        assert await restored(store, tokens) == len(tokens)
    async with opened(tmp_path) as store:
        lookup = store.lookup(NS, tokens)
        assert lookup.by_tier() == {Tier.NVME: len(tokens)}
        assert await restored(store, tokens) == len(tokens)
        assert all(h.tier is Tier.DRAM for h in store.lookup(NS, tokens).hits)
        reports = [step.report async for step in store.verify(repair=False)]
        assert reports[-1] is not None
        assert reports[-1].clean
        assert reports[-1].ok == 6


async def test_a_lookup_changes_nothing(tmp_path: Path) -> None:
    tokens = prompt(1, 16 * 4 + 3)
    async with opened(tmp_path) as store:
        await fill(store, tokens)
        await store.flush(5)
        store.evict_dram()
        before = (store.lookup(NS, tokens), store.counters(), list(store._below.policy.oldest_first()))
        stamps = dict(store._below._stamps._used)
        for other in (tokens, tokens[:30], prompt(2, 50)):
            store.lookup(NS, other)
            store.missing(NS, other)
        assert (store.lookup(NS, tokens), store.counters(), list(store._below.policy.oldest_first())) == before
        assert store._below._stamps._used == stamps


async def test_a_hit_reaches_to_the_token(tmp_path: Path) -> None:
    first = prompt(1, 16 * 3 + 9)
    async with opened(tmp_path) as store:
        await fill(store, first)
        for in_dram in (True, False):
            for shared in range(1, len(first) + 1):
                other = first[:shared] + prompt(9, 40)
                assert store.lookup(NS, other).tokens == shared
                assert await restored(store, other) == shared
                assert store.lookup(NS, first[:shared]).tokens == shared
            assert store.lookup(NS, prompt(2, 30)).tokens == 0
            if in_dram:
                await store.flush(5)
                store.evict_dram()


async def test_a_longer_sequence_supersedes_the_tail(tmp_path: Path) -> None:
    turn1, turn2 = prompt(1, 16 + 5), prompt(1, 16 + 11)
    async with opened(tmp_path) as store:
        await fill(store, turn1)
        await store.flush(5)
        assert [b.start for b in await fill(store, turn2)] == [16]
        await store.flush(5)
        nvme = store.usage()[1]
        assert (nvme.blocks, nvme.tokens) == (2, 27)
        assert store.lookup(NS, turn1).tokens == 21
        assert store.missing(NS, turn1) == []
        store.evict_dram()
        assert await restored(store, turn2) == 27
    async with opened(tmp_path) as store:
        assert store.usage()[1].blocks == 2
        assert await restored(store, turn1) == 21


async def test_namespaces_and_tenants_do_not_share(tmp_path: Path) -> None:
    ring = keyring(tmp_path, "default", "other")
    tokens = prompt(1, 70)
    others = [Namespace("other"), Namespace("default", "second"), Namespace("default", salt=b"s")]
    async with opened(tmp_path, ring=ring) as store:
        await fill(store, tokens)
        await store.flush(5)
        counters = store.counters()
        assert [store.lookup(ns, tokens).tokens for ns in others] == [0, 0, 0]
        assert store.counters() == counters
        for ns in others:
            await fill(store, tokens, ns)
        await store.flush(5)
        store.evict_dram()
        assert [await restored(store, tokens, ns) for ns in (NS, *others)] == [70] * 4


async def test_a_slot_is_zeroed_for_another_tenant(tmp_path: Path) -> None:
    ring = keyring(tmp_path, "default", "other")
    async with opened(tmp_path, slots=2, ring=ring, nvme=False) as store:
        await fill(store, prompt(1, 32))
        missing = store.missing(Namespace("other"), prompt(2, 32))
        reserved = await store.reserve(Namespace("other"), missing)
        assert all(bytes(view(store, r.slot)) == bytes(LAYOUT.slot_bytes) for r in reserved)
        store.abort(reserved)


async def test_another_model_misses(tmp_path: Path) -> None:
    tokens = prompt(1, 70)
    async with opened(tmp_path) as store:
        await fill(store, tokens)
    async with opened(tmp_path, fingerprint=Fingerprint(bytes(32), bytes([2]) * 32)) as store:
        assert store.lookup(NS, tokens).tokens == 0
        assert store.usage()[1].blocks == 5


async def test_concurrent_stagings_load_once(tmp_path: Path) -> None:
    tokens = prompt(1, 16 * 5)
    async with opened(tmp_path) as store:
        await fill(store, tokens)
        await store.flush(5)
        store.evict_dram()
        got = await asyncio.gather(*(restored(store, tokens) for _ in range(6)))
        assert got == [80] * 6
        assert store.counters()['load_bytes_total{tier="nvme"}'] == 5 * LAYOUT.payload_bytes(16)


async def test_a_context_larger_than_the_pool_streams_through_it(tmp_path: Path) -> None:
    tokens = prompt(1, 16 * 30 + 4)
    async with opened(tmp_path, slots=4) as store:
        await fill(store, tokens)
        await store.flush(5)
        assert store.usage()[0].blocks == 4
        for _ in range(2):
            assert await restored(store, tokens) == len(tokens)
        assert await asyncio.gather(*(restored(store, tokens) for _ in range(3))) == [len(tokens)] * 3


async def test_a_staging_left_early_holds_nothing(tmp_path: Path) -> None:
    tokens = prompt(1, 16 * 12)
    async with opened(tmp_path, slots=16, read_size=8192) as store:
        await fill(store, tokens)
        await store.flush(5)
        store.evict_dram()
        async with aclosing(store.stage(NS, tokens, store.lookup(NS, tokens).hits)) as runs:
            store.unpin(await anext(runs))
        while any(not entry.state.readable for entry in store._dram.entries()):
            await store._dram.change()
        assert store._dram._pinned == 0
        assert store.evict_dram() > 0
        assert store.usage()[0].blocks == 0


async def test_a_block_on_its_way_is_found_and_waited_for(tmp_path: Path) -> None:
    tokens = prompt(1, 32)
    async with opened(tmp_path) as store:
        reserved = await store.reserve(NS, store.missing(NS, tokens))
        assert store.missing(NS, tokens) == []
        assert store.lookup(NS, tokens).tokens == 32
        waiting = asyncio.ensure_future(restored(store, tokens))
        aborted = asyncio.ensure_future(restored(store, tokens))
        await asyncio.sleep(0)
        for r in reserved:
            kv = payload(r.new.tokens, r.new.start)
            view(store, r.slot)[: len(kv)] = kv
        store.commit(reserved[:1])
        store.abort(reserved[1:])
        assert await waiting == 16
        assert await aborted == 16


async def test_write_behind_is_bounded_and_loses_nothing(tmp_path: Path) -> None:
    bound = 3 * LAYOUT.payload_bytes(16)
    prompts = [prompt(n, 16 * 6) for n in range(6)]
    async with opened(tmp_path, slots=8, write_behind=bound) as store:
        seen = 0

        async def watch(tokens: Tokens) -> None:
            nonlocal seen
            await fill(store, tokens)
            seen = max(seen, store._writer.dirty_bytes + store._writer.promised_bytes)

        await asyncio.gather(*(watch(tokens) for tokens in prompts))
        assert 0 < seen <= bound
        assert await store.flush(5)
        assert [await restored(store, tokens) for tokens in prompts] == [96] * 6


async def test_reserve_waits_for_slots_in_order(tmp_path: Path) -> None:
    async with opened(tmp_path, slots=2, nvme=False) as store:
        held = await store.reserve(NS, store.missing(NS, prompt(1, 32)))
        first = asyncio.ensure_future(store.reserve(NS, store.missing(NS, prompt(2, 16))))
        second = asyncio.ensure_future(store.reserve(NS, store.missing(NS, prompt(3, 16))))
        await asyncio.sleep(0.01)
        assert not first.done()
        store.abort(held[:1])
        (kept,) = await first
        assert not second.done()
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        store.abort([*held[1:], kept])
        assert len(await store.reserve(NS, store.missing(NS, prompt(4, 64)))) == 2, "the pool holds no more"


async def test_dram_alone_works(tmp_path: Path) -> None:
    tokens = prompt(1, 60)
    async with opened(tmp_path, slots=4, nvme=False) as store:
        await fill(store, tokens)
        assert await restored(store, tokens) == 60
        assert store.evict_dram() == 0, "there is no copy below"
        await fill(store, prompt(2, 64))
        assert store.lookup(NS, tokens).tokens == 0
        assert [u.state for u in store.usage()] == ["ok", "off"]
        assert await store.flush(1)
        (step,) = [step async for step in store.verify(repair=True)]
        assert step.report is not None
        assert (step.report.records, step.report.clean) == (0, True)


async def test_nvme_evicts_the_oldest_and_deepest_first(tmp_path: Path) -> None:
    record = record_bytes(LAYOUT, 16)
    capacity = 9 * record + 8192
    old, new = prompt(1, 16 * 5), prompt(2, 16 * 4)
    async with opened(tmp_path, slots=16, capacity=capacity, segment=2**20) as store:
        await fill(store, old)
        await fill(store, new)
        await store.flush(5)
        store.evict_dram()
        assert await restored(store, old) == 80
        store.evict_dram()
        await fill(store, prompt(3, 16 * 3))
        await store.flush(5)
        store.evict_dram()
        assert store.lookup(NS, old).tokens == 80, "used last"
        assert store.lookup(NS, new).tokens == 16, "three of its blocks had to go, the deepest"
        assert store.counters()['evicted_blocks_total{tier="nvme",reason="capacity"}'] == 3
    async with opened(tmp_path, capacity=4 * record + 16384, segment=2**20) as store:
        usage = store.usage()[1]
        assert usage.used_bytes <= usage.capacity_bytes
        assert store.lookup(NS, prompt(3, 48)).tokens == 48
        assert store.lookup(NS, new).tokens == 0


async def test_recency_survives_a_restart(tmp_path: Path) -> None:
    record = record_bytes(LAYOUT, 16)
    async with opened(tmp_path, slots=16) as store:
        for n in (1, 2):
            await fill(store, prompt(n, 32))
            await store.flush(5)
        assert await restored(store, prompt(1, 32)) == 32
    async with opened(tmp_path, capacity=2 * record + 8192) as store:
        assert store.lookup(NS, prompt(1, 32)).tokens == 32
        assert store.lookup(NS, prompt(2, 32)).tokens == 0


async def test_ages_are_told(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        assert [(u.oldest_s, u.newest_s) for u in store.usage()] == [(None, None)] * 2
        await fill(store, prompt(1, 32))
        await store.flush(5)
        for usage in store.usage():
            assert usage.oldest_s is not None
            assert usage.newest_s is not None
            assert 0 <= usage.newest_s <= usage.oldest_s < 60


async def test_verify_runs_beside_serving(tmp_path: Path) -> None:
    async with opened(tmp_path, slots=16) as store:
        for n in range(4):
            await fill(store, prompt(n, 48))
        await store.flush(5)
        store.evict_dram()
        tier = faulty(store)
        victim = next(iter(store._below.index.entries()))[1].extent

        def flip(extent: object, data: memoryview) -> None:
            if extent == victim:
                data[5000] ^= 1

        tier.spoil = flip
        verdicts = [s.report async for s in store.verify(repair=True) if s.report]
        assert verdicts[0].bad == {"tag": 1}
        assert verdicts[0].repaired == 1
        verdicts = [s.report async for s in store.verify(repair=False) if s.report]
        assert verdicts[0].clean
        assert verdicts[0].ok == 11
