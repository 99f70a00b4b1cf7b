"""What somebody asked to forget is in no tier any more, and stays so after a restart; what is in use stays."""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path

import pytest

from tests.support.kv import NS, fill, opened, prompt, restored

GONE, KEPT = prompt(1, 16 * 3 + 5), prompt(2, 16 * 3)


@pytest.mark.parametrize("nvme", [False, True])
async def test_an_erased_prompt_is_in_no_tier(tmp_path: Path, nvme: bool) -> None:
    async with opened(tmp_path, nvme=nvme) as store:
        for tokens in (GONE, KEPT):
            await fill(store, tokens)
        assert await store.erase(NS, GONE) == 4, "although it was being written"
        assert store.lookup(NS, GONE).tokens == 0
        assert await restored(store, KEPT) == 48
        assert await store.erase(NS, GONE) == 0
    async with opened(tmp_path, nvme=nvme) as store:
        assert store.lookup(NS, GONE).tokens == 0
        assert store.lookup(NS, KEPT).tokens == (48 if nvme else 0)


async def test_what_a_request_holds_stays(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await fill(store, GONE)
        await store.flush(5)
        async with aclosing(store.stage(NS, GONE, store.lookup(NS, GONE).hits)) as runs:
            staged = await anext(runs)
            assert await store.erase(NS, GONE) == 4 - len(staged.hits)
            assert store.lookup(NS, GONE).tokens == sum(hit.n_tokens for hit in staged.hits)
            store.unpin(staged)


async def test_another_prompt_that_only_begins_alike_keeps_its_last_block(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await fill(store, KEPT)
        assert await store.erase(NS, KEPT[:40]) == 2
        assert await fill(store, KEPT[:32])
        assert store.lookup(NS, KEPT).tokens == 48, "its last block was never erased"
