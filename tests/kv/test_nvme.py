"""The nvme tier: the conformance suite, and what is special about files."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import TierError, TierFull, TierIO
from appliance.kv.tiers import nvme
from appliance.kv.tiers.base import Extent, RecordTier
from appliance.kv.tiers.nvme import NvmeTier
from tests.contracts.tiers import LANE, OTHER, Conformance, filled, got, put, superblock
from tests.support.disk import small_disk
from tests.support.faulty import Gate


def on_disk(folder: Path) -> int:
    return sum(p.stat().st_blocks * 512 for p in folder.rglob("*") if p.is_file())


class TestNvme(Conformance):
    def open(self, place: Path, capacity_bytes: int = 2**20, segment_bytes: int = 2**16) -> RecordTier:
        return NvmeTier(place, capacity_bytes=capacity_bytes, segment_bytes=segment_bytes, superblock=superblock)


class TestBuffered(Conformance):
    def open(self, place: Path, capacity_bytes: int = 2**20, segment_bytes: int = 2**16) -> RecordTier:
        return NvmeTier(
            place, capacity_bytes=capacity_bytes, segment_bytes=segment_bytes, superblock=superblock, direct=False
        )


@settings(max_examples=25, deadline=None)
@given(
    capacity=st.integers(8192, 50 * 4096),
    steps=st.lists(st.tuples(st.sampled_from([LANE, OTHER]), st.integers(1, 6), st.booleans()), max_size=40),
)
def test_the_disk_never_holds_more_than_the_capacity(
    tmp_path_factory: pytest.TempPathFactory, capacity: int, steps: list[tuple[bytes, int, bool]]
) -> None:
    folder = tmp_path_factory.mktemp("tier")
    tier = NvmeTier(folder, capacity_bytes=capacity, segment_bytes=10 * 4096, superblock=superblock)
    live: list[Extent] = []
    for lane, pages, free_oldest in steps:
        if free_oldest and live:
            tier.free([live.pop(0)])
        try:
            live.append(put(tier, pages * 4096, lane)[0])
        except TierFull:
            assert tier.shortfall(lane, [pages * 4096])
        assert on_disk(folder) <= tier.usage().used_bytes <= capacity
    tier.free(live)
    assert tier.usage().used_bytes == 0
    tier.close()


def test_without_holes_space_returns_with_the_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(nvme, "punch_hole", refuse)
    tier = NvmeTier(tmp_path, capacity_bytes=2**20, segment_bytes=2**16, superblock=superblock)
    extents = [put(tier, 8192)[0] for _ in range(3)]
    used = tier.usage().used_bytes
    tier.free(extents[:2])
    assert tier.usage().used_bytes >= used - 4096
    assert any("whole segments" in note for note in tier.usage().notes)
    tier.free(extents[2:])
    assert tier.usage().used_bytes == 0


@pytest.mark.parametrize("after", [0, 5000])
def test_a_failed_write_is_rolled_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    tier = NvmeTier(tmp_path, capacity_bytes=2**20, segment_bytes=2**16, superblock=superblock)
    kept, data = put(tier, 8192)
    real = os.pwrite

    def short(fd: int, buffer: memoryview, offset: int) -> int:
        if after and offset == kept.end:
            return real(fd, buffer[:4096], offset)
        raise OSError(errno.ENOSPC, "no space")

    before = tier.usage().used_bytes
    monkeypatch.setattr(os, "pwrite", short)
    with pytest.raises(TierFull):
        put(tier, 16384)
    monkeypatch.undo()
    assert tier.usage().used_bytes == before
    assert got(tier, kept) == data
    tier.write([extent := tier.reserve(LANE, 4096)], page := filled(4096))
    assert got(tier, extent) == bytes(page)


@pytest.mark.parametrize("step", ["punch", "remove", "set aside"])
def test_usage_does_not_wait_for_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    tier = NvmeTier(tmp_path, capacity_bytes=2**20, segment_bytes=2**16, superblock=superblock)
    extents = [put(tier, 8192)[0] for _ in range(2)]
    owner, call = {"punch": (nvme, "punch_hole"), "remove": (Path, "unlink"), "set aside": (Path, "replace")}[step]
    real, gate = getattr(owner, call), Gate()

    def slow(*args: Any) -> Any:
        gate.passed()
        return real(*args)

    monkeypatch.setattr(owner, call, slow)
    with ThreadPoolExecutor() as threads:
        if step == "set aside":
            at_work = threads.submit(tier.set_aside, extents[0].segment)
        else:
            at_work = threads.submit(tier.free, extents[:1] if step == "punch" else extents)
        gate.reached.wait()
        try:
            assert threads.submit(tier.usage).result(timeout=5).used_bytes > 0
        finally:
            gate.open()
        at_work.result()


def test_a_failed_sync_leaves_no_file_open_that_is_not_written_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = NvmeTier(tmp_path, capacity_bytes=2**20, segment_bytes=2**14, superblock=superblock)
    extents = [put(tier, 8192)[0] for _ in range(3)]
    assert len({extent.segment for extent in extents}) == 3

    def refuse(fd: int) -> None:
        raise OSError(errno.EIO, "injected")

    monkeypatch.setattr(os, "fdatasync", refuse)
    with pytest.raises(TierIO):
        tier.sync()
    links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert [Path(link).stem for link in links if link.startswith(str(tmp_path))] == [f"{extents[-1].segment:016x}"]
    tier.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "1m") as folder:
        yield folder


def test_a_full_disk_is_full_not_broken(disk: Path) -> None:
    tier = NvmeTier(disk / "s", capacity_bytes=2**30, segment_bytes=2**18, superblock=superblock)
    written = []
    with suppress(TierError):
        while True:
            written.append(put(tier, 8192))
    assert 50 < len(written) < 128
    assert all(got(tier, extent) == data for extent, data in written)
    tier.free([written.pop()[0]])
    written.append(put(tier, 8192))
    tier.close()


def test_a_start_on_a_full_disk_works(disk: Path) -> None:
    (disk / "s").mkdir()
    (disk / "s" / "quarantine").mkdir()
    with open(disk / "fill", "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(65536))
    tier = NvmeTier(disk / "s", capacity_bytes=2**20, segment_bytes=2**16, superblock=superblock)
    with pytest.raises(TierFull):
        put(tier, 65536)
