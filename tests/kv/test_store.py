"""The store as a request sees it, with tiny pools."""

from __future__ import annotations

from pathlib import Path

from appliance.kv.base import LookupState
from appliance.types import Tier
from tests.support.kv import NS, fill, opened, prompt, restored


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
        assert all(h.state is LookupState.HIT and h.tier is Tier.DRAM for h in store.lookup(NS, tokens).hits)
        reports = [step.report async for step in store.verify(repair=False)]
        assert reports[-1] is not None
        assert reports[-1].clean
        assert reports[-1].ok == 6
