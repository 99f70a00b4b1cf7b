"""What the store does when the medium, the records or the index are bad: fewer blocks, never other bytes."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pytest

from appliance.config import NvmeSection
from appliance.kv.opening import open_below
from appliance.kv.recovery import Mended
from appliance.kv.tiers.base import Extent
from appliance.kv.verify import verify
from tests.support.faulty import full
from tests.support.forked import lines_until_killed
from tests.support.kv import LAYOUT, NS, faulty, fill, keyring, opened, prompt, restored

TOKENS = prompt(1, 16 * 6 + 5)
OTHER = prompt(2, 16 * 6 + 5)


async def _stored(home: Path) -> None:
    async with opened(home) as store:
        await fill(store, TOKENS)
        await fill(store, OTHER)


def _segments(home: Path) -> list[Path]:
    return sorted((home / "store").glob("*.seg"))


async def _usable(home: Path) -> tuple[int, int]:
    """Whatever is damaged: it opens, serves right bytes or none, stores anew, and then verifies clean."""
    async with opened(home) as store:
        reached = await restored(store, TOKENS), await restored(store, OTHER)
        await fill(store, TOKENS)
        await fill(store, OTHER)
        await store.flush(5)
        store.evict_dram()
        assert (await restored(store, TOKENS), await restored(store, OTHER)) == (len(TOKENS), len(OTHER))
    return reached


def _overwrite(home: Path, extent: Extent, offset: int, data: bytes) -> None:
    with open(home / "store" / f"{extent.segment:016x}.seg", "r+b") as file:
        file.seek(extent.offset + offset)
        file.write(data)


def _clean(home: Path, capacity: int = 2**20) -> bool:
    sealed, recovered = open_below(home, keyring(home), NvmeSection(capacity=capacity, segment=2**16))
    report = list(verify(sealed, recovered.index, drop=None))[-1].report
    recovered.index.close()
    sealed.tier.close()
    assert report is not None
    return not report.bad and not report.index_dangling and report.ok == report.records


def _flip(data: bytearray, at: int) -> None:
    data[at] ^= 1 << (at % 8)


def _zero_sector(data: bytearray, at: int) -> None:
    start = at // 4096 * 4096
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))


def _cut(data: bytearray, at: int) -> None:
    del data[at:]


@pytest.mark.parametrize("damage", [_flip, _zero_sector, _cut])
async def test_damage_anywhere_in_a_segment(tmp_path: Path, damage: Callable[[bytearray, int], None]) -> None:
    await _stored(tmp_path)
    segments = _segments(tmp_path)
    originals = {path: path.read_bytes() for path in segments}
    index = tmp_path / "store" / "index" / "index.lmdb"
    whole_index = index.read_bytes()
    chance = random.Random(1)
    for n in range(8):
        for path in _segments(tmp_path):
            path.unlink()
        for path, data in originals.items():
            path.write_bytes(data)
        path = chance.choice(segments)
        data = bytearray(originals[path])
        damage(data, chance.randrange(len(data)))
        path.write_bytes(data)
        index.unlink()
        if n % 2:
            index.write_bytes(whole_index)
        await _usable(tmp_path)
        assert _clean(tmp_path)
        for path in (tmp_path / "store" / "quarantine").iterdir():
            path.unlink()


async def test_damage_while_indexed_is_quarantined_and_counted(tmp_path: Path) -> None:
    await _stored(tmp_path)
    async with opened(tmp_path) as store:
        entries = store._below.entries(h.block for h in store.lookup(NS, TOKENS).hits)
        third = next(e.extent for e in entries.values() if e.start == 32)
        _overwrite(tmp_path, third, 4500, b"x")
        assert await restored(store, TOKENS) == 32
        assert store.lookup(NS, TOKENS).tokens == 32
        counters = store.counters()
        assert counters['integrity_failures_total{reason="tag"}'] == 1
        assert counters["quarantined_total"] == 1
        assert [new.start for new in await fill(store, TOKENS)] == [32], "what follows it is found again"
        assert await restored(store, TOKENS) == len(TOKENS)


@pytest.mark.parametrize("where", ["same place of another prompt", "neighbour", "head of another"])
async def test_another_record_in_its_place(tmp_path: Path, where: str) -> None:
    await _stored(tmp_path)
    async with opened(tmp_path) as store:
        mine = store._below.entries(h.block for h in store.lookup(NS, TOKENS).hits)
        theirs = store._below.entries(h.block for h in store.lookup(NS, OTHER).hits)
        at = next(e.extent for e in mine.values() if e.start == 16)
        source = mine if where == "neighbour" else theirs
        start = 48 if where == "neighbour" else 16
        other = next(e.extent for e in source.values() if e.start == start)
        whole = (tmp_path / "store" / f"{other.segment:016x}.seg").read_bytes()
        n = 4096 if where == "head of another" else other.length
        _overwrite(tmp_path, at, 0, whole[other.offset : other.offset + n])
        assert await restored(store, TOKENS) == 16
        assert sum(n for name, n in store.counters().items() if name.startswith("integrity_failures_total")) == 1


@pytest.mark.parametrize("damage", [_flip, _zero_sector, _cut])
async def test_damage_anywhere_in_the_index(tmp_path: Path, damage: Callable[[bytearray, int], None]) -> None:
    await _stored(tmp_path)
    path = tmp_path / "store" / "index" / "index.lmdb"
    original = path.read_bytes()
    chance = random.Random(2)
    for _ in range(6):
        data = bytearray(original)
        damage(data, chance.randrange(len(data)))
        path.write_bytes(data)
        assert await _usable(tmp_path) == (len(TOKENS), len(OTHER)), "the segments still have everything"
        assert _clean(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"not a map", bytes(65536)])
async def test_no_index_is_rebuilt_from_the_heads(tmp_path: Path, content: bytes | None) -> None:
    await _stored(tmp_path)
    path = tmp_path / "store" / "index" / "index.lmdb"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    sealed, recovered = open_below(tmp_path, keyring(tmp_path), NvmeSection(capacity=2**20, segment=2**16))
    assert recovered.mended == Mended(found=14)
    recovered.index.close()
    sealed.tier.close()
    assert await _usable(tmp_path) == (len(TOKENS), len(OTHER))


async def test_an_index_that_is_behind_adopts_what_was_written(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await fill(store, TOKENS)
    path = tmp_path / "store" / "index" / "index.lmdb"
    old = path.read_bytes()
    async with opened(tmp_path) as store:
        await fill(store, OTHER)
    path.write_bytes(old)
    torn = _segments(tmp_path)[-1]
    torn.write_bytes(torn.read_bytes() + os.urandom(8192))  # begun and not finished
    sealed, recovered = open_below(tmp_path, keyring(tmp_path), NvmeSection(capacity=2**20, segment=2**16))
    assert recovered.mended == Mended()
    recovered.index.close()
    sealed.tier.close()
    assert await _usable(tmp_path) == (len(TOKENS), len(OTHER))


async def test_an_index_that_is_ahead_drops_what_is_gone(tmp_path: Path) -> None:
    await _stored(tmp_path)
    last = _segments(tmp_path)[-1]
    os.truncate(last, last.stat().st_size - 4096)
    sealed, recovered = open_below(tmp_path, keyring(tmp_path), NvmeSection(capacity=2**20, segment=2**16))
    assert recovered.mended == Mended(dangling=1)
    recovered.index.close()
    sealed.tier.close()
    for path in _segments(tmp_path):
        path.unlink()
    async with opened(tmp_path) as store:
        assert store.lookup(NS, TOKENS).tokens == store.lookup(NS, OTHER).tokens == 0


async def test_a_foreign_segment_is_set_aside(tmp_path: Path) -> None:
    await _stored(tmp_path / "a")
    await _stored(tmp_path / "b")
    (tmp_path / "b" / "store" / "index" / "index.lmdb").unlink()
    foreign = _segments(tmp_path / "a")[0]
    (tmp_path / "b" / "store" / "00000000000000ff.seg").write_bytes(foreign.read_bytes())
    async with opened(tmp_path / "b") as store:
        assert await restored(store, TOKENS) == len(TOKENS)
        assert store.counters()["quarantined_segments_total"] == 1
        assert store.usage()[1].used_bytes <= 2**20
    assert (tmp_path / "b" / "store" / "quarantine" / "00000000000000ff.seg").exists()


async def test_a_store_whose_key_is_gone_is_not_misread(tmp_path: Path) -> None:
    await _stored(tmp_path)
    for name in ("keyring.a", "keyring.b", "unlock.key"):
        (tmp_path / name).unlink()
    async with opened(tmp_path) as store:
        assert store.lookup(NS, TOKENS).tokens == 0
        await fill(store, TOKENS)
        assert await restored(store, TOKENS) == len(TOKENS)


async def test_a_read_error_is_a_miss_until_it_heals(tmp_path: Path) -> None:
    await _stored(tmp_path)
    async with opened(tmp_path) as store:
        tier = faulty(store)
        now = 100.0
        store._below.loads.breaker._monotonic = lambda: now
        tier.fail("read", 100)
        assert await restored(store, TOKENS) == 0
        assert store.usage()[1].state == "degraded"
        assert store.lookup(NS, TOKENS).tokens == 0, "hits in a degraded tier are misses"
        reads = tier.calls["read"]
        assert await restored(store, OTHER) == 0
        assert tier.calls["read"] == reads, "and it is left alone"
        assert store.counters()['tier_failures_total{tier="nvme",reason="io"}'] >= 1
        await fill(store, TOKENS)
        assert await restored(store, TOKENS) == len(TOKENS)
        tier.heal()
        now += 3600
        assert await restored(store, OTHER) == len(OTHER)
        assert store.usage()[1].state == "ok"


@pytest.mark.parametrize("op", ["reserve", "write", "sync"])
@pytest.mark.parametrize("error", ["io", "full"])
async def test_a_write_error_leaves_blocks_in_dram_and_is_tried_again(tmp_path: Path, op: str, error: str) -> None:
    async with opened(tmp_path, slots=16) as store:
        tier = faulty(store)
        tier.fail(op, 100, **({"error": full} if error == "full" else {}))
        await fill(store, TOKENS)
        assert not await store.flush(5)
        assert store.usage()[1].state == "degraded"
        assert store.counters()[f'store_failures_total{{tier="nvme",reason="{error}"}}'] == 7
        assert store.usage()[1].used_bytes == 0, "rolled back"
        assert await restored(store, TOKENS) == len(TOKENS)
        assert store.evict_dram() == 0
        tier.heal()
        store._below.stores.worked()
        store._writer._requeue()
        assert await store.flush(5)
        assert store.evict_dram() == 7
        assert await restored(store, TOKENS) == len(TOKENS)


async def test_a_disk_that_others_filled_costs_old_blocks_only(tmp_path: Path) -> None:
    async with opened(tmp_path, slots=16) as store:
        await fill(store, OTHER)
        await store.flush(5)
        tier = faulty(store)
        tier.fail("write", 1, error=full)
        await fill(store, TOKENS)
        assert await store.flush(5)
        assert store.counters()['evicted_blocks_total{tier="nvme",reason="capacity"}'] == 7
        store.evict_dram()
        assert await restored(store, TOKENS) == len(TOKENS)


@pytest.mark.parametrize("spoil", ["truncated", "swapped", "stale"])
async def test_reads_that_lie(tmp_path: Path, spoil: str) -> None:
    await _stored(tmp_path)
    async with opened(tmp_path, read_size=8192) as store:
        tier = faulty(store)
        previous = bytearray(LAYOUT.slot_bytes * 4)

        def lie(extent: Extent, data: memoryview) -> None:
            n = extent.length
            mine = bytes(data[:n])
            if spoil == "truncated":
                data[n // 2 : n] = bytes(n - n // 2)
            elif spoil == "stale":
                data[:n] = bytes(n)
            else:
                data[:n] = previous[:n]
            previous[:n] = mine

        tier.spoil = lie
        assert await restored(store, TOKENS) == 0
        await store._below.tasks.settle()  # what was read ahead
        tier.heal()
        await fill(store, TOKENS)
        await fill(store, OTHER)
        assert (await restored(store, TOKENS), await restored(store, OTHER)) == (len(TOKENS), len(OTHER))


async def test_an_unusable_folder_costs_the_tier_not_the_start(tmp_path: Path) -> None:
    keyring(tmp_path)
    (tmp_path / "store").write_bytes(b"a file where the folder should be")
    async with opened(tmp_path) as store:
        await fill(store, TOKENS)
        assert await restored(store, TOKENS) == len(TOKENS)
        assert store.usage()[1].state == "off"
        assert "nothing is stored below DRAM" in store.usage()[1].notes[0]


def test_kill_at_random_moments(tmp_path: Path) -> None:
    """Whatever a process said was durable reads back equal in the next one, killed over and over in one home."""
    keyring(tmp_path)
    chance = random.Random(3)
    acknowledged: list[int] = []
    for cycle in range(24):
        wanted = 1 + chance.randrange(12)
        lines = lines_until_killed(partial(_child, tmp_path, cycle, acknowledged), wanted)
        assert len(lines) >= wanted, "the child died by itself: what was durable before did not read back"
        acknowledged += [int(line) for line in lines]
    assert _clean(tmp_path, capacity=2**24)


def _child(home: Path, cycle: int, expected: list[int], out: BinaryIO) -> None:
    asyncio.run(_write_on(home, cycle, expected, out))


async def _write_on(home: Path, cycle: int, expected: list[int], out: BinaryIO) -> None:
    """Check what was durable, then write prompts until killed, telling of each once the store said it is durable."""
    async with opened(home, capacity=2**24) as store:
        for seed in expected:
            assert await restored(store, tokens := prompt(seed, 16 * 3 + seed % 16)) == len(tokens)
        for seed in range(cycle * 10_000, cycle * 10_000 + 10_000):
            await fill(store, prompt(seed, 16 * 3 + seed % 16))
            if await store.flush(10):
                out.write(b"%d\n" % seed)
                out.flush()
