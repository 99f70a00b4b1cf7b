"""Opening a store: what a start mends and what it leaves alone."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lmdb
import pytest

from appliance.config import KVSection, NvmeSection, Profile
from appliance.errors import ConfigError, TierError
from appliance.kv import check, recovery, runs
from appliance.kv.fair import FairShare
from appliance.kv.index import Changes, Index, IndexEntry
from appliance.kv.opening import open_below, open_store
from appliance.kv.policy import LeafFirstLru
from appliance.kv.recovery import Mended
from appliance.kv.tiers.base import ALIGN_BYTES, Extent
from appliance.kv.tiers.dram import DramPool
from appliance.kv.tiers.nvme import NvmeTier
from appliance.kv.tiers.sealed import SealedTier, superblock_maker
from appliance.types import BlockId, BlockLayout
from tests.support.faulty import FaultyTier
from tests.support.kv import FINGERPRINT, LAYOUT, NS, fill, keyring, opened, restored, token_s
from tests.support.stored import BLOCKS, PROMPTS, SMALL, closed, index_file, segments, stored, tree


async def test_a_start_writes_to_the_index_only_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await stored(tmp_path)
    applied: list[Changes] = []
    apply = Index.apply

    def record(index: Index, changes: Changes) -> None:
        applied.append(changes)
        apply(index, changes)

    monkeypatch.setattr(Index, "apply", record)
    recovered = closed(open_below(tmp_path, keyring(tmp_path), SMALL))
    assert (len(recovered.policy), recovered.tokens) == (BLOCKS, len(PROMPTS) * (16 * 6 + 5))
    assert len(segments(tmp_path)) > 1
    assert not applied
    segments(tmp_path)[0].unlink()
    assert closed(open_below(tmp_path, keyring(tmp_path), SMALL)).mended.dangling
    assert len(applied) == 1


@pytest.mark.parametrize("batch", [1, 4, 4096])
async def test_a_rebuild_in_many_transactions_finds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    await stored(tmp_path)
    whole = closed(open_below(tmp_path, keyring(tmp_path), SMALL))
    index_file(tmp_path).unlink()
    monkeypatch.setattr(recovery, "_BATCH", batch)
    rebuilt = closed(open_below(tmp_path, keyring(tmp_path), SMALL))
    assert rebuilt.mended == Mended(found=BLOCKS)
    assert set(rebuilt.policy.oldest_first()) == set(whole.policy.oldest_first())
    again = closed(open_below(tmp_path, keyring(tmp_path), SMALL))
    assert again.mended == Mended()
    assert list(again.policy.oldest_first()) == list(rebuilt.policy.oldest_first())


async def test_the_order_of_eviction_is_by_use_and_then_by_depth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "_RUN", 4)
    async with opened(tmp_path) as store:
        for tokens in PROMPTS:
            await fill(store, tokens)
            await store.flush(5)
        await restored(store, PROMPTS[0])
        chains = [[hit.block for hit in store.lookup(NS, tokens).hits] for tokens in PROMPTS]
    recovered = closed(open_below(tmp_path, keyring(tmp_path), SMALL))
    order = list(recovered.policy.oldest_first())
    assert order == [*reversed(chains[1]), *reversed(chains[2]), *reversed(chains[0])]


async def test_a_start_sorts_beside_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await stored(tmp_path)
    threads: list[int] = []
    drain = runs.Runs.drain

    def sort(these: runs.Runs) -> Iterator[bytes]:
        threads.append(threading.get_ident())
        return drain(these)

    monkeypatch.setattr(runs.Runs, "drain", sort)
    async with opened(tmp_path) as store:
        assert store.usage()[1].blocks == BLOCKS
    assert threads
    assert threading.get_ident() not in threads


async def test_a_smaller_capacity_evicts_the_oldest_and_keeps_the_count_of_tokens(tmp_path: Path) -> None:
    await stored(tmp_path)
    recovered = closed(open_below(tmp_path, keyring(tmp_path), SMALL.model_copy(update={"capacity": 2**17})))
    left = _entries(tmp_path)
    assert 0 < recovered.mended.evicted == BLOCKS - len(left)
    assert set(recovered.policy.oldest_first()) == set(left)
    assert recovered.tokens == sum(entry.n_tokens for entry in left.values())


def _entries(home: Path) -> dict[BlockId, IndexEntry]:
    sealed, recovered = open_below(home, keyring(home), SMALL)
    found = dict(recovered.index.entries())
    recovered.index.close()
    sealed.tier.close()
    return found


async def test_one_unreadable_page_costs_a_rebuild_one_block(tmp_path: Path) -> None:
    await stored(tmp_path, segment=2**20)
    places = sorted(entry.extent for entry in _entries(tmp_path).values())
    index_file(tmp_path).unlink()
    bad = places[2]

    class OnePage(FaultyTier):
        def read(self, extent: Extent, into: memoryview) -> None:
            if extent.segment == bad.segment and extent.offset <= bad.offset < extent.end:
                self.fail("read")
            super().read(extent, into)

    ring = keyring(tmp_path)
    tier = NvmeTier(
        tmp_path / "store", capacity_bytes=2**20, segment_bytes=2**20, superblock=superblock_maker(ring), direct=False
    )
    folder = index_file(tmp_path).parent
    recovered = recovery.recover(SealedTier(OnePage(tier), ring), ring, folder, folder, FairShare(LeafFirstLru), 0)
    recovered.index.close()
    assert recovered.mended == Mended(found=BLOCKS - 1, unread=1)
    assert "1 pages cannot be read; the blocks in them are lost" in recovered.mended.notes


async def test_a_block_that_no_record_holds_is_said_before_anything_is_opened(tmp_path: Path) -> None:
    pool = DramPool(8 * LAYOUT.slot_bytes, lock=False)
    huge = replace(LAYOUT, token_bytes=(2**28, 16))
    many = BlockLayout(16, token_bytes=(1,) * 1025, fixed_bytes=(0,) * 1025)
    for layout in (huge, many):
        with pytest.raises(ConfigError, match=r"^kv\.block_tokens.*a record holds"):
            await open_store(tmp_path, keyring(tmp_path), FINGERPRINT, layout, pool, Profile().kv, SMALL, token_s)
    assert not (tmp_path / "store").exists()
    pool.close()


# --- the check of the index ------------------------------------------------------------------------------------------


def _move_into_key(env: lmdb.Environment, name: bytes) -> None:
    """One byte of a value moves into its key: what a checksum over both, one after the other, would not see."""
    db = env.open_db(name)
    with env.begin(write=True, db=db) as txn:
        key, value = next(iter(txn.cursor()))
        txn.delete(key)
        txn.put(key + value[:1], value[1:])


@pytest.mark.parametrize("name", [b"blocks", b"children", b"segments"])
async def test_an_entry_under_another_key_is_damage(tmp_path: Path, name: bytes) -> None:
    await stored(tmp_path)
    env = lmdb.open(str(index_file(tmp_path)), subdir=False, max_dbs=4, map_size=2**30)
    _move_into_key(env, name)
    env.close()
    recovered = closed(open_below(tmp_path, keyring(tmp_path), SMALL))
    assert recovered.mended == Mended(found=BLOCKS)


def _child_ends(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(check.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, code))


async def test_no_room_for_a_copy_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await stored(tmp_path)
    (tmp_path / "store" / "index" / "index.copy").mkdir()  # in the way of the copy
    monkeypatch.setattr(check, "remove", lambda path: None)
    whole = index_file(tmp_path).read_bytes()
    assert check.renew(index_file(tmp_path), index_file(tmp_path), **_secrets(tmp_path))
    assert index_file(tmp_path).read_bytes() == whole
    data = bytearray(whole)
    data[16] ^= 1
    data[ALIGN_BYTES + 16] ^= 1
    index_file(tmp_path).write_bytes(data)
    assert not check.renew(index_file(tmp_path), index_file(tmp_path), **_secrets(tmp_path)), (
        "what is in place is checked too"
    )


def _secrets(home: Path) -> dict[str, Any]:
    ring = keyring(home)
    return {"index_key": ring.index_key, "store_uuid": ring.store_uuid, "map_bytes": 2**30}


@pytest.mark.parametrize("code", [check.Verdict.NO_MEMORY, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT])
async def test_a_check_that_could_not_be_made_leaves_theindex_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    await stored(tmp_path)
    before = tree(tmp_path / "store")
    _child_ends(monkeypatch, code)
    with pytest.raises(TierError, match="could not be checked"):
        open_below(tmp_path, keyring(tmp_path), SMALL)
    assert tree(tmp_path / "store") == before
    monkeypatch.undo()
    assert closed(open_below(tmp_path, keyring(tmp_path), SMALL)).mended == Mended()


@pytest.mark.parametrize("code", [check.Verdict.DAMAGED, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGXCPU])
async def test_an_index_that_kills_its_reader_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    await stored(tmp_path)
    _child_ends(monkeypatch, code)
    assert closed(open_below(tmp_path, keyring(tmp_path), SMALL)).mended == Mended(found=BLOCKS)


async def test_a_check_that_never_ends_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop in the child counts as damage; only its processor time is limited."""
    await stored(tmp_path)
    looping = tmp_path / "python"
    looping.write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        "from appliance.kv import check\n"
        "def forever(index):\n"
        "    while True: pass\n"
        "check.Index.check = forever\n"
        "sys.exit(check.main(sys.argv[3:]))\n"
    )
    looping.chmod(0o700)
    monkeypatch.setenv("PYTHONPATH", str(check._ROOT))
    monkeypatch.setattr(check.sys, "executable", str(looping))
    monkeypatch.setattr(check, "_BASE_CPU_S", 1.0)
    assert closed(open_below(tmp_path, keyring(tmp_path), SMALL)).mended == Mended(found=BLOCKS)


async def test_a_folder_whose_place_does_not_exist_is_refused(tmp_path: Path) -> None:
    nvme = NvmeSection(path=str(tmp_path / "not-mounted" / "kv"))
    with pytest.raises(ConfigError, match="not-mounted does not exist"):
        await open_store(
            tmp_path, keyring(tmp_path), FINGERPRINT, LAYOUT, DramPool(2**20, lock=False), KVSection(), nvme, token_s
        )
    assert not (tmp_path / "not-mounted").exists()
