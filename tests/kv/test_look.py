"""kvctl verify of a stopped appliance: it finds the store that was served, tells what is wrong and changes nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from appliance.config import NvmeSection, Profile
from appliance.errors import StateError
from appliance.kv.opening import open_below, open_store
from appliance.kv.tiers.base import ALIGN_BYTES
from appliance.kv.tiers.dram import DramPool
from appliance.ops.verify import verify
from tests.support.kv import FINGERPRINT, LAYOUT, fill, keyring, opened, token_s
from tests.support.stored import BLOCKS, PROMPTS, SMALL, closed, index_file, segments, stored, tree


def _report(home: Path, *, repair: bool = False) -> Any:
    return list(verify(home, Profile(), repair=repair))[-1].report


def _nothing(home: Path) -> None:
    pass


def _no_index(home: Path) -> None:
    index_file(home).unlink()


def _damaged_index(home: Path) -> None:
    index_file(home).write_bytes(bytes(65536))


def _damaged_record(home: Path) -> None:
    data = bytearray(segments(home)[0].read_bytes())
    data[ALIGN_BYTES + 5000] ^= 1
    segments(home)[0].write_bytes(data)


def _damaged_superblock(home: Path) -> None:
    data = bytearray(segments(home)[0].read_bytes())
    data[20] ^= 1
    segments(home)[0].write_bytes(data)


def _missing_segment(home: Path) -> None:
    segments(home)[0].unlink()


def _torn_end(home: Path) -> None:
    with segments(home)[-1].open("ab") as file:
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
    await stored(tmp_path)
    damage(tmp_path)
    before = tree(tmp_path / "store")
    (tmp_path / ".verify" / "index.copy").mkdir(parents=True)  # left by one that was killed
    report = _report(tmp_path)
    assert report.clean is clean
    assert report.repaired == 0
    assert _report(tmp_path).model_dump(exclude={"seconds"}) == report.model_dump(exclude={"seconds"})
    assert tree(tmp_path / "store") == before
    assert ".verify" not in os.listdir(tmp_path), "what it worked with is gone"
    repaired = _report(tmp_path, repair=True)
    assert (repaired.repaired > 0) is not clean
    assert repaired.bad == report.bad, "the look foretold it"
    assert _report(tmp_path).clean


async def test_verify_reads_what_is_not_committed_yet(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await fill(store, PROMPTS[0])
    behind = index_file(tmp_path).read_bytes()
    async with opened(tmp_path) as store:
        await fill(store, PROMPTS[1])
    index_file(tmp_path).write_bytes(behind)
    before = tree(tmp_path / "store")
    report = _report(tmp_path)
    assert (report.clean, report.records) == (True, 14)
    assert tree(tmp_path / "store") == before


@pytest.mark.parametrize("repair", [False, True])
async def test_verify_finds_the_store_that_was_served(tmp_path: Path, repair: bool) -> None:
    """Larger than the profile's, and somewhere else."""
    elsewhere = tmp_path / "disk" / "blocks"
    elsewhere.parent.mkdir()
    ring = keyring(tmp_path)
    nvme = NvmeSection(capacity=2**35, segment=2**16, path=str(elsewhere))
    await _fill(tmp_path, nvme)
    report = _report(tmp_path, repair=repair)
    assert (report.clean, report.records, report.repaired) == (True, BLOCKS, 0)
    assert len(closed(open_below(tmp_path, ring, nvme)).policy) == BLOCKS
    shutil.rmtree(elsewhere)
    with pytest.raises(StateError, match="is its disk mounted"):
        _report(tmp_path, repair=repair)
    assert not elsewhere.exists()


async def _fill(home: Path, nvme: NvmeSection) -> None:
    pool = DramPool(8 * LAYOUT.slot_bytes, lock=False)
    kv = Profile().kv.model_copy(update={"read_size": 2**16, "transfer_threads": 2})
    store = await open_store(home, keyring(home), FINGERPRINT, LAYOUT, pool, kv, nvme, token_s)
    for tokens in PROMPTS:
        await fill(store, tokens)
        await store.flush(5)
    await store.close()
    pool.close()


async def test_another_path_is_another_store(tmp_path: Path) -> None:
    await stored(tmp_path)
    await _fill(tmp_path, SMALL.model_copy(update={"path": str(tmp_path / "other")}))
    (tmp_path / "store.json").write_text(SMALL.model_dump_json())
    assert _report(tmp_path).records == BLOCKS, "the first one is as it was"


def test_a_damaged_note_of_the_store_is_said(tmp_path: Path) -> None:
    keyring(tmp_path)
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(StateError, match=r"store\.json cannot be read"):
        _report(tmp_path)
