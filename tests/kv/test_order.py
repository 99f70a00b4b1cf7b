"""The order of writing (FORMAT.md, "Order of writing"): data before index, index before the bytes go."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance.config import NvmeSection
from appliance.errors import TierIO
from appliance.kv.check import renew
from appliance.kv.index import Changes, Index
from appliance.kv.opening import open_below
from tests.support.kv import NS, fill, keyring, opened, prompt
from tests.support.recorder import Recorder

SMALL = NvmeSection(capacity=2**20, segment=2**16)


async def test_records_are_durable_before_the_index_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path) as store:
        recorder = Recorder(monkeypatch)
        await fill(store, prompt(1, 16 * 3))
        assert await store.flush(5)
        (segment,) = recorder.names("pwrite")
        order = [("pwrite", segment), ("fdatasync", segment), ("fsync", "store"), ("commit", "index")]
        at = [recorder.last(*event) for event in order]
        assert at == sorted(at)
        recorder.events.clear()
        await fill(store, prompt(2, 16 * 2))
        assert await store.flush(5)
        at = [recorder.last(*event) for event in order if event != ("fsync", "store")]
        assert at == sorted(at), "a segment that was there already"


async def test_every_segment_of_a_batch_is_synced_before_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path, segment=2**14, slots=16) as store:
        recorder = Recorder(monkeypatch)
        await fill(store, prompt(1, 16 * 8))
        assert await store.flush(5)
        segments = recorder.names("pwrite")
        assert len(segments) > 1
        synced: set[str] = set()
        written: set[str] = set()
        for what, name in recorder.events:
            if what == "pwrite":
                written.add(name)
                synced.discard(name)
            elif what == "fdatasync":
                synced.add(name)
            elif what == "commit":
                assert written <= synced
        assert recorder.events[recorder.last("commit", "index") :][1:] == []


def test_a_transaction_of_the_index_is_synced(tmp_path: Path) -> None:
    index = Index(tmp_path / "i", index_key=b"k" * 32, store_uuid=b"u" * 16, map_bytes=2**20, create=True)
    flags = index._env.flags()
    assert flags["sync"]
    assert flags["metasync"]
    assert not flags["map_async"]
    index.close()


@pytest.mark.parametrize("whole", [False, True], ids=["a part of a segment", "a whole segment"])
async def test_the_index_forgets_a_block_before_its_bytes_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    async with opened(tmp_path) as store:
        tokens = prompt(1, 16 * 4)
        await fill(store, tokens)
        assert await store.flush(5)
        blocks = [hit.block for hit in store.lookup(NS, tokens).hits]
        assert store._below is not None
        recorder = Recorder(monkeypatch)
        await store._below.drop(blocks if whole else blocks[2:])
        assert recorder.names("unlink" if whole else "punch_hole")
        assert recorder.first("commit") < recorder.first("punch_hole", "unlink", "ftruncate")
        recorder.events.clear()

        def refuse(index: Index, changes: Changes) -> None:
            raise TierIO("injected")

        monkeypatch.setattr(Index, "apply", refuse)
        if not whole:
            with pytest.raises(TierIO):
                await store._below.drop(blocks[:2])
            assert not recorder.names("punch_hole", "unlink", "ftruncate")


async def test_a_longer_tail_takes_the_place_of_a_shorter_one_in_the_same_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as store:
        tokens = prompt(1, 16 + 12)
        await fill(store, tokens[: 16 + 5])
        assert await store.flush(5)
        recorder = Recorder(monkeypatch)
        await fill(store, tokens)
        assert await store.flush(5)
        (segment,) = recorder.names("pwrite")
        assert recorder.last("fdatasync", segment) < recorder.first("commit") < recorder.first("punch_hole", "unlink")


async def test_a_start_mends_the_index_before_it_gives_bytes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as store:
        await fill(store, prompt(1, 16 * 6))
    segment = min((tmp_path / "store").glob("*.seg"))
    with segment.open("r+b") as file:
        file.truncate(segment.stat().st_size - 4096)  # the last record is cut: lost, and the rest of it is given back
    recorder = Recorder(monkeypatch)
    sealed, recovered = open_below(tmp_path, keyring(tmp_path), SMALL)
    assert recovered.mended.dangling == 1
    assert recorder.last("replace", "index.lmdb") < recorder.last("fsync", "index") < recorder.first("commit")
    assert recorder.first("commit") < recorder.last("ftruncate", segment.name)
    recovered.index.close()
    sealed.tier.close()


async def test_the_copy_of_the_index_is_durable_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {"index_key": b"k" * 32, "store_uuid": b"u" * 16, "map_bytes": 2**20}
    path = tmp_path / "index.lmdb"
    index = Index(path, **secrets, create=True)  # type: ignore[arg-type]
    recorder = Recorder(monkeypatch)
    index.copy(tmp_path / "copy")
    index.close()
    assert recorder.events == [("fsync", "copy")]
    assert renew(path, path, **secrets)  # type: ignore[arg-type]
    assert recorder.last("replace", path.name) < recorder.last("fsync", tmp_path.name)
