"""What every RecordTier must do. A test module subclasses Conformance and says how to open its tier on a place."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from itertools import pairwise
from pathlib import Path

import pytest

from appliance.errors import TierFull, TierIO
from appliance.kv.tiers.base import ALIGN_BYTES, Extent, RecordTier
from appliance.kv.tiers.files import aligned_buffer

LANE, OTHER = b"lane-of-a-tenant", b"lane-of-another-"


def superblock(lane: bytes, segment: int) -> bytes:
    return (lane + segment.to_bytes(8, "little")).ljust(ALIGN_BYTES, b"s")


def filled(nbytes: int) -> memoryview:
    buffer = aligned_buffer(nbytes)
    buffer[:] = os.urandom(nbytes)
    return buffer


def put(tier: RecordTier, nbytes: int, lane: bytes = LANE) -> tuple[Extent, bytes]:
    extent = tier.reserve(lane, nbytes)
    data = filled(nbytes)
    tier.write([extent], data)
    return extent, bytes(data)


def got(tier: RecordTier, extent: Extent) -> bytes:
    buffer = aligned_buffer(extent.length)
    tier.read(extent, buffer)
    return bytes(buffer)


class Conformance(ABC):
    @abstractmethod
    def open(self, place: Path, capacity_bytes: int = 2**20, segment_bytes: int = 2**16) -> RecordTier: ...

    @pytest.fixture
    def tier(self, tmp_path: Path) -> RecordTier:
        return self.open(tmp_path)

    def test_what_was_written_is_read(self, tier: RecordTier) -> None:
        records = [put(tier, 4096 * n, lane) for n, lane in [(1, LANE), (3, OTHER), (2, LANE), (20, LANE), (1, OTHER)]]
        tier.sync()
        for extent, data in records:
            assert got(tier, extent) == data

    def test_lanes_never_share_a_segment(self, tier: RecordTier) -> None:
        segments = {lane: {put(tier, 8192, lane)[0].segment for _ in range(20)} for lane in (LANE, OTHER)}
        assert not segments[LANE] & segments[OTHER]

    def test_adjacent_records_are_read_by_one_read(self, tier: RecordTier) -> None:
        extents = [tier.reserve(LANE, 8192) for _ in range(3)]
        assert all(a.end == b.offset for a, b in pairwise(extents))
        data = filled(3 * 8192)
        tier.write(extents, data)
        assert got(tier, Extent(extents[0].segment, extents[0].offset, 3 * 8192)) == bytes(data)

    def test_a_segment_starts_with_its_superblock(self, tier: RecordTier, tmp_path: Path) -> None:
        extent, _ = put(tier, 4096)
        tier.sync()
        tier.close()
        (info,) = self.open(tmp_path).scan()
        assert info.segment == extent.segment
        assert info.head == superblock(LANE, extent.segment)
        assert info.end == extent.end

    def test_capacity_is_a_bound_from_the_first_byte(self, tmp_path: Path) -> None:
        with pytest.raises(TierFull):
            self.open(tmp_path / "a", capacity_bytes=4096).reserve(LANE, 4096)
        tier = self.open(tmp_path / "b", capacity_bytes=10 * 4096)
        extents = []
        while not tier.shortfall(LANE, [4096]):
            extents.append(put(tier, 4096)[0])
        assert extents
        assert tier.usage().used_bytes <= 10 * 4096
        with pytest.raises(TierFull):
            tier.reserve(LANE, 4096)
        tier.free(extents[:1])
        assert tier.shortfall(LANE, [4096]) == 0
        put(tier, 4096)

    def test_shortfall_has_no_side_effects(self, tier: RecordTier) -> None:
        before = tier.usage()
        assert tier.shortfall(LANE, [4096] * 1000) > 0
        assert tier.shortfall(LANE, [4096]) == 0
        assert tier.usage() == before

    def test_a_segment_without_records_is_gone(self, tier: RecordTier, tmp_path: Path) -> None:
        extents = [put(tier, 8192)[0] for _ in range(20)]
        tier.sync()
        tier.free(extents)
        assert tier.usage().used_bytes == 0
        assert tier.usage().segments == 0
        tier.close()
        assert self.open(tmp_path).scan() == []

    def test_a_reservation_can_be_given_back(self, tier: RecordTier) -> None:
        tier.free([tier.reserve(LANE, 8192)])
        assert tier.usage().used_bytes == 0
        extent, data = put(tier, 4096)
        assert got(tier, extent) == data

    def test_freed_bytes_come_back_and_neighbours_stay(self, tier: RecordTier) -> None:
        records = [put(tier, 8192) for _ in range(3)]
        used = tier.usage().used_bytes
        tier.free([records[1][0]])
        assert tier.usage().used_bytes == used - 8192
        for extent, data in (records[0], records[2]):
            assert got(tier, extent) == data

    def test_settle_keeps_what_lives_and_cuts_the_rest(self, tier: RecordTier, tmp_path: Path) -> None:
        records = [put(tier, 8192) for _ in range(5)]
        tier.sync()
        tier.close()
        again = self.open(tmp_path)
        (info,) = again.scan()
        again.settle(info.segment, [records[1][0], records[3][0]])
        for extent, data in (records[1], records[3]):
            assert got(again, extent) == data
        (seen,) = self.open(tmp_path).scan()
        assert seen.end == records[3][0].end
        assert again.next_data(info.segment, records[0][0].offset) == records[1][0].offset
        fresh, data = put(again, 4096)
        assert fresh.segment > info.segment, "a segment of an earlier life is never appended to"
        again.free([records[1][0], records[3][0]])
        assert again.usage().segments == 1

    def test_next_data_ends_at_the_end(self, tier: RecordTier) -> None:
        extent, _ = put(tier, 8192)
        assert tier.next_data(extent.segment, 0) == 0
        assert tier.next_data(extent.segment, extent.offset + 4096) == extent.offset + 4096
        assert tier.next_data(extent.segment, extent.end) is None

    def test_a_segment_set_aside_is_not_served_and_not_lost(self, tier: RecordTier, tmp_path: Path) -> None:
        put(tier, 8192)
        tier.sync()
        tier.close()
        again = self.open(tmp_path)
        (info,) = again.scan()
        again.set_aside(info.segment)
        assert again.usage().used_bytes > 0, "its bytes still count"
        assert self.open(tmp_path).scan() == []
        assert put(again, 4096)[0].segment > info.segment

    def test_a_short_or_missing_extent_is_an_error(self, tier: RecordTier) -> None:
        extent, _ = put(tier, 4096)
        with pytest.raises(TierIO):
            got(tier, Extent(extent.segment, extent.offset, 8192))
        with pytest.raises(TierIO):
            got(tier, Extent(extent.segment + 99, 4096, 4096))
