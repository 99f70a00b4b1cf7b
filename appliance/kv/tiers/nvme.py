"""The nvme tier: segments are files of one folder, written past the page cache and punched when records are freed.

Invariant: the blocks the file system gave to the folder's segments, set-aside ones included, never exceed the capacity
(directories not counted). `used_bytes` of a segment is the larger of what we count and what the file system reports. Numbers
are never used twice in one life of the tier. Threading: as the contract says; the tables are the one writer's, and usage()
takes single values that it keeps up to date, so that nobody who asks waits for its I/O.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from appliance.errors import TierFull
from appliance.kv.tiers.base import (
    ALIGN_BYTES,
    Extent,
    MediumUsage,
    RecordTier,
    SegmentInfo,
    SuperblockMaker,
    TierProperties,
)
from appliance.kv.tiers.files import (
    aligned_buffer,
    fsync_folder,
    opened,
    punch_hole,
    read_all,
    supports_direct,
    tier_error,
    write_all,
)
from appliance.types import Tier

log = logging.getLogger(__name__)

OVERHEAD_BYTES = 2 * ALIGN_BYTES
"""Superblock, and one block for the file system's map of the segment."""

_NAME = re.compile(r"[0-9a-f]{16}\.seg")
_ASIDE_SHARE = 8
"""Set-aside segments may take 1/8 of the capacity; the oldest go first."""


@dataclass
class _Segment:
    number: int
    lane: bytes | None
    """None: from an earlier life; never appended to."""
    end: int = ALIGN_BYTES
    records: int = 0
    live_bytes: int = 0
    allocated_bytes: int = 0
    """As the file system last said."""
    counted_bytes: int = 0
    """What of it is in the tier's total."""
    fd: int | None = None
    """Open while there may be something to write or to sync."""

    @property
    def used_bytes(self) -> int:
        return max(OVERHEAD_BYTES + self.live_bytes, self.allocated_bytes)


class NvmeTier(RecordTier):
    def __init__(
        self, folder: Path, *, capacity_bytes: int, segment_bytes: int, superblock: SuperblockMaker, direct: bool = True
    ) -> None:
        self.properties = TierProperties(Tier.NVME, capacity_bytes, segment_bytes)
        self._folder = folder
        self._aside = _Aside(folder / "quarantine", capacity_bytes // _ASIDE_SHARE)
        self._superblock = superblock
        self._segments: dict[int, _Segment] = {}
        self._counted_bytes = 0
        self._active: dict[bytes, _Segment] = {}
        self._unsynced: set[int] = set()
        self._new_files = False
        self._notes: tuple[str, ...] = ()
        self._direct = self._prepare(direct)
        self._flags = os.O_DIRECT if self._direct else 0

    def _prepare(self, direct: bool) -> bool:
        """Make the folder ready for writing, and find the next number. Returns whether direct I/O is possible."""
        try:
            self._aside.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            possible = direct and supports_direct(self._folder)
            self._aside.trim()
            names = [*self._folder.iterdir(), *self._aside.folder.iterdir()]
        except OSError as error:
            raise tier_error(error, f"cannot use {self._folder}") from None
        self._next = 1 + max((int(p.stem, 16) for p in names if _NAME.fullmatch(p.name)), default=0)
        if direct and not possible:
            self._note(f"{self._folder} is without O_DIRECT: reads and writes pass through the page cache")
        return possible

    # --- writing -------------------------------------------------------------------------------------------------

    def shortfall(self, lane: bytes, nbytes: Sequence[int]) -> int:
        segment = self._active.get(lane)
        need, end = 0, segment.end if segment else None
        for n in nbytes:
            if end is None or not self._fits(end, n):
                need, end = need + OVERHEAD_BYTES, ALIGN_BYTES
            need, end = need + n, end + n
        return max(0, self._used_bytes + need - self.properties.capacity_bytes)

    def reserve(self, lane: bytes, nbytes: int) -> Extent:
        assert nbytes > 0
        assert nbytes % ALIGN_BYTES == 0
        segment = self._active.get(lane)
        fresh = segment is None or not self._fits(segment.end, nbytes)
        if self._used_bytes + nbytes + fresh * OVERHEAD_BYTES > self.properties.capacity_bytes:
            raise TierFull(f"{self._folder} holds no {nbytes} bytes more within its capacity")
        if segment is None or fresh:
            segment = _Segment(self._next, lane)
            self._next += 1
            self._segments[segment.number] = self._active[lane] = segment
        extent = Extent(segment.number, segment.end, nbytes)
        segment.end += nbytes
        segment.records += 1
        segment.live_bytes += nbytes
        self._count(segment)
        return extent

    def write(self, extents: Sequence[Extent], buffer: memoryview) -> None:
        try:
            position = 0
            for number, group in groupby(extents, key=lambda e: e.segment):
                run = list(group)
                length = sum(e.length for e in run)
                assert run[-1].end - run[0].offset == length, "records of one write lie back to back"
                segment = self._segments[number]
                fd = self._writable(segment)
                self._unsynced.add(number)
                write_all(fd, buffer[position : position + length], run[0].offset)
                position += length
                segment.allocated_bytes = os.fstat(fd).st_blocks * 512
                self._count(segment)
        except OSError as error:
            self.free(extents)
            raise tier_error(error, f"cannot write to {self._folder}") from None

    def sync(self) -> None:
        pending = [self._segments[n] for n in self._unsynced]
        self._unsynced.clear()
        try:
            for segment in pending:
                assert segment.fd is not None
                os.fdatasync(segment.fd)
                if not self._direct:
                    os.posix_fadvise(segment.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if self._new_files:
                fsync_folder(self._folder)
                self._new_files = False
        except OSError as error:
            raise tier_error(error, f"cannot sync {self._folder}") from None
        finally:
            for segment in pending:
                if segment.lane is None or self._active.get(segment.lane) is not segment:
                    _close(segment)

    def free(self, extents: Iterable[Extent]) -> None:
        for extent in extents:
            segment = self._segments[extent.segment]
            segment.records -= 1
            segment.live_bytes -= extent.length
            if segment.records == 0:
                self._remove(segment)
            else:
                self._punch(segment, extent.offset, extent.end)
                self._count(segment)

    # --- reading -------------------------------------------------------------------------------------------------

    def read(self, extent: Extent, into: memoryview) -> None:
        try:
            with opened(self._path(extent.segment), os.O_RDONLY | self._flags) as fd:
                read_all(fd, into[: extent.length], extent.offset)
                if not self._direct:
                    os.posix_fadvise(fd, extent.offset, extent.length, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise tier_error(error, f"cannot read from {self._folder}") from None

    # --- start-up ------------------------------------------------------------------------------------------------

    def scan(self) -> list[SegmentInfo]:
        found = []
        try:
            for path in sorted(p for p in self._folder.iterdir() if _NAME.fullmatch(p.name)):
                stat = path.stat()
                segment = _Segment(int(path.stem, 16), None, end=stat.st_size, allocated_bytes=stat.st_blocks * 512)
                self._segments[segment.number] = segment
                self._count(segment)
                found.append(SegmentInfo(segment.number, self._head(path), stat.st_size))
        except OSError as error:
            raise tier_error(error, f"cannot scan {self._folder}") from None
        return found

    def next_data(self, segment: int, offset: int) -> int | None:
        try:
            with opened(self._path(segment), os.O_RDONLY) as fd:
                found = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            raise tier_error(error, f"cannot scan {self._folder}") from None
        return max(offset, found // ALIGN_BYTES * ALIGN_BYTES)

    def settle(self, segment: int, live: Sequence[Extent]) -> None:
        entry = self._segments[segment]
        if not live:
            return self._remove(entry)
        position = ALIGN_BYTES
        for extent in sorted(live):
            data = self.next_data(segment, position) if extent.offset > position else None
            if data is not None and data < extent.offset:
                self._punch(entry, position, extent.offset)
            position = extent.end
        entry.records, entry.live_bytes = len(live), sum(e.length for e in live)
        try:
            with opened(self._path(segment), os.O_RDWR) as fd:
                os.ftruncate(fd, position)
                entry.allocated_bytes = os.fstat(fd).st_blocks * 512
        except OSError as error:
            raise tier_error(error, f"cannot shorten a segment in {self._folder}") from None
        entry.end = position
        self._count(entry)

    def set_aside(self, segment: int) -> None:
        try:
            self._path(segment).replace(self._aside.folder / self._path(segment).name)
        except OSError as error:
            raise tier_error(error, f"cannot set a segment of {self._folder} aside") from None
        self._forget(self._segments[segment])
        self._aside.trim()

    # --- both ----------------------------------------------------------------------------------------------------

    def usage(self) -> MediumUsage:
        return MediumUsage(self._used_bytes, len(self._segments), self._notes)

    def close(self) -> None:
        for segment in self._segments.values():
            _close(segment)

    @property
    def _used_bytes(self) -> int:
        return self._aside.nbytes + self._counted_bytes

    def _count(self, segment: _Segment) -> None:
        """Bring the total up to date with a segment that changed."""
        self._counted_bytes += segment.used_bytes - segment.counted_bytes
        segment.counted_bytes = segment.used_bytes

    def _forget(self, segment: _Segment) -> None:
        self._counted_bytes -= segment.counted_bytes
        del self._segments[segment.number]

    def _fits(self, end: int, nbytes: int) -> bool:
        return end == ALIGN_BYTES or end + nbytes <= self.properties.segment_bytes

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:016x}.seg"

    def _head(self, path: Path) -> bytes | None:
        try:
            with opened(path, os.O_RDONLY) as fd:
                return os.pread(fd, ALIGN_BYTES, 0)
        except OSError as error:
            self._note(f"{path.name} cannot be read ({error.strerror})")
            return None

    def _writable(self, segment: _Segment) -> int:
        """The segment's file, with its superblock in place."""
        if segment.fd is None:
            assert segment.lane is not None
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | self._flags
            segment.fd = os.open(self._path(segment.number), flags, 0o600)
            self._new_files = True
            head = aligned_buffer(ALIGN_BYTES)
            head[:] = self._superblock(segment.lane, segment.number)
            write_all(segment.fd, head, 0)
        return segment.fd

    def _punch(self, segment: _Segment, start: int, stop: int) -> None:
        """A range never written is not there to punch."""
        try:
            with opened(self._path(segment.number), os.O_RDWR) as fd:
                punch_hole(fd, start, stop - start)
                segment.allocated_bytes = os.fstat(fd).st_blocks * 512
        except FileNotFoundError:
            return
        except OSError as error:
            self._note(f"{self._folder}: freed space returns with whole segments only ({error.strerror})")

    def _remove(self, segment: _Segment) -> None:
        """A file that cannot be removed stays counted and is found again at the next start."""
        self._unsynced.discard(segment.number)
        _close(segment)
        if segment.lane is not None and self._active.get(segment.lane) is segment:
            del self._active[segment.lane]
        try:
            with suppress(FileNotFoundError):
                self._path(segment.number).unlink()
        except OSError as error:
            self._note(f"{self._folder}: a segment could not be removed ({error.strerror})")
            self._count(segment)
            return
        self._forget(segment)

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes = (*self._notes, text)
            log.warning("%s", text)


def _close(segment: _Segment) -> None:
    if segment.fd is not None:
        os.close(segment.fd)
        segment.fd = None


class _Aside:
    """Segments that do not verify, kept for a look, the newest first, within a share of the capacity."""

    def __init__(self, folder: Path, bound_bytes: int) -> None:
        self.folder = folder
        self.nbytes = 0
        self._bound_bytes = bound_bytes

    def trim(self) -> None:
        """Measure, and remove the oldest beyond the bound."""
        kept = 0
        try:
            for path in sorted(self.folder.iterdir(), reverse=True):
                allocated = path.stat().st_blocks * 512
                if kept + allocated > self._bound_bytes:
                    path.unlink()
                else:
                    kept += allocated
        except OSError as error:
            raise tier_error(error, f"cannot use {self.folder}") from None
        self.nbytes = kept
