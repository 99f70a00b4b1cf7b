"""What must not go: what is being read, what the index still names, and the last slots."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

import pytest

from appliance.errors import TierIO
from appliance.kv.record import record_bytes
from tests.support.kv import LAYOUT, NS, faulty, fill, opened, prompt, restored

OLD, NEW = prompt(1, 32), prompt(2, 32)


async def test_what_is_being_read_stays_although_it_is_the_oldest(tmp_path: Path) -> None:
    capacity = 4 * record_bytes(LAYOUT, 16) + 8192
    async with opened(tmp_path, capacity=capacity, segment=2**20) as store:
        for tokens in (OLD, NEW):
            await fill(store, tokens)
            await store.flush(5)
        store.evict_dram()
        gate = faulty(store).hold("read")
        reading = asyncio.ensure_future(restored(store, OLD))
        try:
            await asyncio.to_thread(gate.reached.wait)
            store.touch(store.lookup(NS, NEW).hits)
            await fill(store, prompt(3, 32))
            assert await store.flush(5)
        finally:
            gate.open()
        assert await reading == 32
        assert store.lookup(NS, NEW).tokens == 0


async def test_bytes_go_after_the_index_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path) as store:
        await fill(store, OLD)
        await store.flush(5)
        store.evict_dram()

        def refuse(changes: object) -> None:
            raise TierIO("injected")

        blocks = [hit.block for hit in store.lookup(NS, OLD).hits]
        with monkeypatch.context() as broken:
            broken.setattr(store._below.index, "apply", refuse)
            with pytest.raises(TierIO):
                await store._below.drop(blocks)
        assert await restored(store, OLD) == 32


async def test_stagings_leave_a_slot_to_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.kv.patience.PATIENCE_S", 0.05)
    tokens = prompt(1, 16 * 8)
    async with opened(tmp_path, slots=4) as store:
        await fill(store, tokens)
        await store.flush(5)
        store.evict_dram()
        async with aclosing(store.stage(NS, tokens, store.lookup(NS, tokens).hits)) as runs:
            staged = await anext(runs)
            assert len(staged.slots) == 3
            store.abort(await store.reserve(NS, store.missing(NS, NEW)))
            store.unpin(staged)


@pytest.mark.parametrize("nvme", [True, False])
async def test_dram_weighs_depth_only_where_nothing_below_keeps_what_it_gives_up(tmp_path: Path, nvme: bool) -> None:
    deep, shallow = prompt(1, 16 * 6), prompt(2, 16)
    async with opened(tmp_path, nvme=nvme, cost=lambda position: 1.0 + position) as store:
        for tokens in (deep, shallow, prompt(3, 16), prompt(4, 16)):
            await fill(store, tokens)
            await store.flush(5)
        assert bool(store.in_dram(store.names(NS, shallow))) is nvme, "used after the deep one"
        assert len(store.in_dram(store.names(NS, deep))) == (5 if nvme else 6)
