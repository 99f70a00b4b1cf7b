"""Opening a store: what a start mends, what it leaves alone, and a look that changes nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lmdb
import pytest

from appliance.config import NvmeSection, Profile
from appliance.errors import ConfigError, StateError, TierError
from appliance.kv import check, recovery, runs
from appliance.kv.index import Changes, Index, IndexEntry
from appliance.kv.opening import open_below, open_store
from appliance.kv.recovery import Mended, Recovered
from appliance.kv.tiers.base import ALIGN_BYTES, Extent
from appliance.kv.tiers.dram import DramPool
from appliance.kv.tiers.nvme import NvmeTier
from appliance.kv.tiers.sealed import SealedTier, superblock_maker
from appliance.ops.verify import verify
from appliance.types import BlockId, BlockLayout
from tests.support.faulty import FaultyTier
from tests.support.kv import FINGERPRINT, LAYOUT, NS, fill, keyring, opened, prompt, restored

SMALL = NvmeSection(capacity=2**20, segment=2**16)
PROMPTS = [prompt(seed, 16 * 6 + 5) for seed in range(3)]
BLOCKS = 7 * len(PROMPTS)


async def _stored(home: Path, **settings: Any) -> None:
    async with opened(home, **settings) as store:
        for tokens in PROMPTS:
            await fill(store, tokens)
            await store.flush(5)


def _index(home: Path) -> Path:
    return home / "store" / "index" / "index.lmdb"


def _segments(home: Path) -> list[Path]:
    return sorted((home / "store").glob("*.seg"))


def _tree(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file: its bytes, when they changed and the blocks they take, so that a punched hole is seen too."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_blocks, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def _closed(opened: tuple[SealedTier, Recovered]) -> Recovered:
    sealed, recovered = opened
    recovered.index.close()
    sealed.tier.close()
    return recovered


def _report(home: Path, *, repair: bool = False) -> Any:
    return list(verify(home, Profile(), repair=repair))[-1].report


# --- a look ----------------------------------------------------------------------------------------------------------


def _nothing(home: Path) -> None:
    pass


def _no_index(home: Path) -> None:
    _index(home).unlink()


def _damaged_index(home: Path) -> None:
    _index(home).write_bytes(bytes(65536))


def _damaged_record(home: Path) -> None:
    data = bytearray(_segments(home)[0].read_bytes())
    data[ALIGN_BYTES + 5000] ^= 1
    _segments(home)[0].write_bytes(data)


def _damaged_superblock(home: Path) -> None:
    data = bytearray(_segments(home)[0].read_bytes())
    data[20] ^= 1
    _segments(home)[0].write_bytes(data)


def _missing_segment(home: Path) -> None:
    _segments(home)[0].unlink()


def _torn_end(home: Path) -> None:
    with _segments(home)[-1].open("ab") as file:
        file.write(b"x" * 8192)


def _empty_segment(home: Path) -> None:
    (home / "store" / "00000000000000ff.seg").touch()


def _over_its_share(home: Path) -> None:
    (home / "store" / "quarantine" / "0000000000000001.seg").write_bytes(b"x" * 2**19)


@pytest.mark.parametrize(
    ("damage", "clean"),
    [
        (_nothing, True),
        (_torn_end, True),
        (_empty_segment, True),
        (_over_its_share, True),
        (_no_index, False),
        (_damaged_index, False),
        (_damaged_record, False),
        (_damaged_superblock, False),
        (_missing_segment, False),
    ],
)
async def test_verify_changes_nothing_and_repair_mends(
    tmp_path: Path, damage: Callable[[Path], None], clean: bool
) -> None:
    await _stored(tmp_path)
    damage(tmp_path)
    before = _tree(tmp_path / "store")
    (tmp_path / ".verify" / "index.copy").mkdir(parents=True)  # left by one that was killed
    report = _report(tmp_path)
    assert report.clean is clean
    assert report.repaired == 0
    assert _report(tmp_path).model_dump(exclude={"seconds"}) == report.model_dump(exclude={"seconds"})
    assert _tree(tmp_path / "store") == before
    assert ".verify" not in os.listdir(tmp_path), "what it worked with is gone"
    repaired = _report(tmp_path, repair=True)
    assert (repaired.repaired > 0) is not clean
    assert repaired.bad == report.bad, "the look foretold it"
    assert _report(tmp_path).clean


async def test_verify_reads_what_is_not_committed_yet(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await fill(store, PROMPTS[0])
    behind = _index(tmp_path).read_bytes()
    async with opened(tmp_path) as store:
        await fill(store, PROMPTS[1])
    _index(tmp_path).write_bytes(behind)
    before = _tree(tmp_path / "store")
    report = _report(tmp_path)
    assert (report.clean, report.records) == (True, 14)
    assert _tree(tmp_path / "store") == before


@pytest.mark.parametrize("repair", [False, True])
async def test_verify_finds_the_store_that_was_served(tmp_path: Path, repair: bool) -> None:
    """Larger than the profile's, and somewhere else."""
    elsewhere = tmp_path / "disk" / "blocks"
    ring = keyring(tmp_path)
    nvme = NvmeSection(capacity=2**35, segment=2**16, path=str(elsewhere))
    await _fill(tmp_path, nvme)
    report = _report(tmp_path, repair=repair)
    assert (report.clean, report.records, report.repaired) == (True, BLOCKS, 0)
    assert len(_closed(open_below(tmp_path, ring, nvme)).policy) == BLOCKS
    shutil.rmtree(elsewhere)
    with pytest.raises(StateError, match="is its disk mounted"):
        _report(tmp_path, repair=repair)
    assert not elsewhere.exists()


async def _fill(home: Path, nvme: NvmeSection) -> None:
    pool = DramPool(8 * LAYOUT.slot_bytes, lock=False)
    kv = Profile().kv.model_copy(update={"read_size": 2**16, "transfer_threads": 2})
    store = await open_store(home, keyring(home), FINGERPRINT, LAYOUT, pool, kv, nvme)
    for tokens in PROMPTS:
        await fill(store, tokens)
        await store.flush(5)
    await store.close()
    pool.close()


async def test_another_path_is_another_store(tmp_path: Path) -> None:
    await _stored(tmp_path)
    await _fill(tmp_path, SMALL.model_copy(update={"path": str(tmp_path / "other")}))
    (tmp_path / "store.json").write_text(SMALL.model_dump_json())
    assert _report(tmp_path).records == BLOCKS, "the first one is as it was"


def test_a_damaged_note_of_the_store_is_said(tmp_path: Path) -> None:
    keyring(tmp_path)
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(StateError, match=r"store\.json cannot be read"):
        _report(tmp_path)


# --- a start ---------------------------------------------------------------------------------------------------------


async def test_a_start_writes_to_the_index_only_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await _stored(tmp_path)
    applied: list[Changes] = []
    apply = Index.apply

    def record(index: Index, changes: Changes) -> None:
        applied.append(changes)
        apply(index, changes)

    monkeypatch.setattr(Index, "apply", record)
    recovered = _closed(open_below(tmp_path, keyring(tmp_path), SMALL))
    assert (len(recovered.policy), recovered.tokens) == (BLOCKS, len(PROMPTS) * (16 * 6 + 5))
    assert len(_segments(tmp_path)) > 1
    assert not applied
    _segments(tmp_path)[0].unlink()
    assert _closed(open_below(tmp_path, keyring(tmp_path), SMALL)).mended.dangling
    assert len(applied) == 1


@pytest.mark.parametrize("batch", [1, 4, 4096])
async def test_a_rebuild_in_many_transactions_finds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    await _stored(tmp_path)
    whole = _closed(open_below(tmp_path, keyring(tmp_path), SMALL))
    _index(tmp_path).unlink()
    monkeypatch.setattr(recovery, "_BATCH", batch)
    rebuilt = _closed(open_below(tmp_path, keyring(tmp_path), SMALL))
    assert rebuilt.mended == Mended(found=BLOCKS)
    assert set(rebuilt.policy.oldest_first()) == set(whole.policy.oldest_first())
    again = _closed(open_below(tmp_path, keyring(tmp_path), SMALL))
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
    recovered = _closed(open_below(tmp_path, keyring(tmp_path), SMALL))
    order = list(recovered.policy.oldest_first())
    assert order == [*reversed(chains[1]), *reversed(chains[2]), *reversed(chains[0])]


async def test_a_start_sorts_beside_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await _stored(tmp_path)
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
    await _stored(tmp_path)
    recovered = _closed(open_below(tmp_path, keyring(tmp_path), SMALL.model_copy(update={"capacity": 2**17})))
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
    await _stored(tmp_path, segment=2**20)
    places = sorted(entry.extent for entry in _entries(tmp_path).values())
    _index(tmp_path).unlink()
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
    folder = _index(tmp_path).parent
    recovered = recovery.recover(SealedTier(OnePage(tier), ring), ring, folder, folder)
    recovered.index.close()
    assert recovered.mended == Mended(found=BLOCKS - 1, unread=1)
    assert "1 pages cannot be read; the blocks in them are lost" in recovered.mended.notes


async def test_a_block_that_no_record_holds_is_said_before_anything_is_opened(tmp_path: Path) -> None:
    pool = DramPool(8 * LAYOUT.slot_bytes, lock=False)
    huge = replace(LAYOUT, token_bytes=(2**28, 16))
    many = BlockLayout(16, token_bytes=(1,) * 1025, fixed_bytes=(0,) * 1025)
    for layout in (huge, many):
        with pytest.raises(ConfigError, match=r"^kv\.block_tokens.*a record holds"):
            await open_store(tmp_path, keyring(tmp_path), FINGERPRINT, layout, pool, Profile().kv, SMALL)
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
    await _stored(tmp_path)
    env = lmdb.open(str(_index(tmp_path)), subdir=False, max_dbs=4, map_size=2**30)
    _move_into_key(env, name)
    env.close()
    recovered = _closed(open_below(tmp_path, keyring(tmp_path), SMALL))
    assert recovered.mended == Mended(found=BLOCKS)


def _child(monkeypatch: pytest.MonkeyPatch, *codes: int | None) -> None:
    """The check ends with these codes, one after the other; None: as it really does."""
    left = list(codes)
    real = subprocess.run

    def run(*args: Any, **kwargs: Any) -> Any:
        code = left.pop(0)
        return real(*args, **kwargs) if code is None else subprocess.CompletedProcess(args, code)

    monkeypatch.setattr(check.subprocess, "run", run)


async def test_no_room_for_a_copy_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await _stored(tmp_path)
    (tmp_path / "store" / "index" / "index.copy").mkdir()  # in the way of the copy
    monkeypatch.setattr(check, "remove", lambda path: None)
    whole = _index(tmp_path).read_bytes()
    assert check.renew(_index(tmp_path), _index(tmp_path), **_secrets(tmp_path))
    assert _index(tmp_path).read_bytes() == whole
    data = bytearray(whole)
    data[16] ^= 1
    data[ALIGN_BYTES + 16] ^= 1
    _index(tmp_path).write_bytes(data)
    assert not check.renew(_index(tmp_path), _index(tmp_path), **_secrets(tmp_path)), "what is in place is checked too"


def _secrets(home: Path) -> dict[str, Any]:
    ring = keyring(home)
    return {"index_key": ring.index_key, "store_uuid": ring.store_uuid, "map_bytes": 2**30}


@pytest.mark.parametrize("code", [check.Verdict.NO_MEMORY, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT])
async def test_a_check_that_could_not_be_made_leaves_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    await _stored(tmp_path)
    before = _tree(tmp_path / "store")
    _child(monkeypatch, code)
    with pytest.raises(TierError, match="could not be checked"):
        open_below(tmp_path, keyring(tmp_path), SMALL)
    assert _tree(tmp_path / "store") == before
    monkeypatch.undo()
    assert _closed(open_below(tmp_path, keyring(tmp_path), SMALL)).mended == Mended()


@pytest.mark.parametrize("code", [check.Verdict.DAMAGED, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGXCPU])
async def test_an_index_that_kills_its_reader_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    await _stored(tmp_path)
    _child(monkeypatch, code)
    assert _closed(open_below(tmp_path, keyring(tmp_path), SMALL)).mended == Mended(found=BLOCKS)


async def test_a_check_that_never_ends_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop in the child counts as damage; only its processor time is limited."""
    await _stored(tmp_path)
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
    assert _closed(open_below(tmp_path, keyring(tmp_path), SMALL)).mended == Mended(found=BLOCKS)
