"""No tenant takes more of a tier than its quota, whenever that was set; what is over goes of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance.kv.record import record_bytes
from appliance.security.keyring import Keyring
from appliance.types import Namespace
from tests.support.kv import LAYOUT, fill, keyring, opened, prompt, restored

A, B = Namespace("a"), Namespace("b")
RECORD, SLOT = record_bytes(LAYOUT, 16), LAYOUT.slot_bytes


def held(store: object, ring: Keyring) -> tuple[int, int]:
    """Blocks of tenant a in DRAM and below."""
    return store._dram.policy.count("a"), store._below.policy.count("a")  # type: ignore[attr-defined]


async def test_a_tenant_never_holds_more_than_its_quotas(tmp_path: Path) -> None:
    ring = keyring(tmp_path, "a", "b")
    ring.set_quota("a", 4 * SLOT + 1, 10 * RECORD + 1)
    async with opened(tmp_path, slots=32, capacity=2**22, ring=ring) as store:
        await fill(store, prompt(1, 48), B)
        for seed in range(2, 12):
            await fill(store, prompt(seed, 16 * 3 + 5), A)
            await store.flush(5)
            dram, nvme = held(store, ring)
            assert dram <= 4
            assert nvme <= 10
        assert await restored(store, prompt(11, 53), A) == 53
        assert await restored(store, prompt(1, 48), B) == 48, "there was room for it all the while"
        counters = store.counters()
        assert counters['evicted_blocks_total{tier="nvme",reason="quota"}'] > 0
        assert counters['evicted_blocks_total{tier="dram",reason="quota"}'] > 0
        assert counters['evicted_blocks_total{tier="nvme",reason="capacity"}'] == 0


@pytest.mark.parametrize("online", [True, False])
async def test_a_quota_that_is_lowered_holds_at_once_or_from_the_start(tmp_path: Path, online: bool) -> None:
    ring = keyring(tmp_path, "a", "b")
    async with opened(tmp_path, slots=32, capacity=2**22, ring=ring) as store:
        for ns in (A, B):
            for seed in range(4):
                await fill(store, prompt(seed, 48), ns)
        await store.flush(5)
        if online:
            ring.set_quota("a", 2 * SLOT, 5 * RECORD)
            await store.enforce_quotas()
            assert held(store, ring) == (2, 5)
            assert await restored(store, prompt(0, 48), B) == 48
    if not online:
        Keyring.open(tmp_path, tmp_path / "unlock.key").set_quota("a", None, 5 * RECORD)
    async with opened(
        tmp_path, slots=32, capacity=2**22, ring=Keyring.open(tmp_path, tmp_path / "unlock.key")
    ) as store:
        assert held(store, ring) == (0, 5)
        assert await restored(store, prompt(3, 48), B) == 48


async def test_a_context_larger_than_the_dram_quota_streams_through_it(tmp_path: Path) -> None:
    ring = keyring(tmp_path, "a", "b")
    ring.set_quota("a", 3 * SLOT, None)
    async with opened(tmp_path, slots=32, capacity=2**22, ring=ring) as store:
        await fill(store, prompt(1, 16 * 12), A)
        assert await restored(store, prompt(1, 16 * 12), A) == 16 * 12
        assert held(store, ring)[0] <= 3


async def test_less_than_a_block_below_means_in_memory_only(tmp_path: Path) -> None:
    ring = keyring(tmp_path, "a", "b")
    ring.set_quota("a", None, RECORD - 1)
    async with opened(tmp_path, ring=ring) as store:
        await fill(store, prompt(1, 48), A)
        assert await store.flush(5)
        assert await restored(store, prompt(1, 48), A) == 48
        assert held(store, ring) == (3, 0)


def test_a_quota_is_kept_in_the_keyring_and_lifted_by_zero(tmp_path: Path) -> None:
    ring = keyring(tmp_path, "a", "b")
    ring.set_quota("a", 4096, None)
    ring.set_quota("a", None, 8192)
    again = Keyring.open(tmp_path, tmp_path / "unlock.key")
    assert (again.quota("a").dram, again.quota("a").nvme) == (4096, 8192)
    assert again.set_quota("a", 0, None).dram is None
    assert Keyring.open(tmp_path, tmp_path / "unlock.key").quota("a").nvme == 8192
