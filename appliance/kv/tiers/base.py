"""The contract of a medium below DRAM that holds sealed records: append-only segments of aligned extents.

Invariant: used_bytes never exceeds the capacity, alignment and per-segment overhead included; a reservation that would
break it raises TierFull and changes nothing. A tier knows no keys and no content: superblocks come from a callback and
bytes are what the caller says they are.

Threading: synchronous, every method may be called from any thread. The caller serialises writers (shortfall, reserve,
write, sync, free) of one tier among themselves; read() and usage() may run beside them, and usage() never waits for I/O.
A caller never frees what it is still reading.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from appliance.types import Tier

ALIGN_BYTES = 4096

SuperblockMaker = Callable[[bytes, int], bytes]
"""(data key id, segment number) -> the first ALIGN_BYTES of the segment."""


@dataclass(frozen=True)
class TierProperties:
    tier: Tier
    capacity_bytes: int
    segment_bytes: int
    """A segment is closed when its next record would end beyond this; one larger record has a segment of its own."""


@dataclass(frozen=True, order=True, slots=True)
class Extent:
    """Where a record is. Offset and length are multiples of ALIGN_BYTES."""

    segment: int
    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


@dataclass(frozen=True)
class SegmentInfo:
    """One segment as found on the medium."""

    segment: int
    head: bytes | None
    """Its first ALIGN_BYTES, or fewer if it is shorter: a superblock nobody has verified yet. None: cannot be read."""
    end: int
    """Bytes from the start of the segment to its end, holes included."""


@dataclass(frozen=True)
class MediumUsage:
    used_bytes: int
    segments: int
    notes: tuple[str, ...]
    """What an operator should know of this medium, e.g. that it cannot bypass the page cache."""


class RecordTier(ABC):
    properties: TierProperties

    # --- writing -------------------------------------------------------------------------------------------------

    @abstractmethod
    def shortfall(self, lane: bytes, nbytes: Sequence[int]) -> int:
        """Bytes to free before records of these lengths fit; 0 if they fit now. No side effects."""

    @abstractmethod
    def reserve(self, lane: bytes, nbytes: int) -> Extent:
        """Room for one record sealed under data key `lane`, after what was reserved before. TierFull if there is none."""

    @abstractmethod
    def write(self, extents: Sequence[Extent], buffer: memoryview) -> None:
        """Write reserved extents; `buffer` (page-aligned memory) holds their records back to back.

        TierFull (the medium is full) or TierIO: then the extents are given back and hold nothing.
        """

    @abstractmethod
    def sync(self) -> None:
        """Everything written so far survives power loss when this returns."""

    @abstractmethod
    def free(self, extents: Iterable[Extent]) -> None:
        """Forget records, or reservations not written. Their bytes return to the capacity where the medium can do that
        for a part of a segment, else with the last record of their segment."""

    # --- reading -------------------------------------------------------------------------------------------------

    @abstractmethod
    def read(self, extent: Extent, into: memoryview) -> None:
        """Fill into[:extent.length] (page-aligned memory). An extent may cover several records. TierIO if it is short."""

    # --- start-up ------------------------------------------------------------------------------------------------

    @abstractmethod
    def scan(self) -> list[SegmentInfo]:
        """The segments on the medium, by number. Until settle() none of them can be written or freed."""

    @abstractmethod
    def next_data(self, segment: int, offset: int) -> int | None:
        """First aligned offset >= `offset` that may hold data; None if there are only holes up to the end."""

    @abstractmethod
    def settle(self, segment: int, live: Sequence[Extent]) -> None:
        """Adopt a scanned segment: `live` is what it holds, the rest is given back. Nothing live removes the segment."""

    @abstractmethod
    def set_aside(self, segment: int) -> None:
        """Take a scanned segment out of service without changing its bytes; a tier keeps few of these, newest last."""

    # --- both ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def usage(self) -> MediumUsage: ...

    @abstractmethod
    def close(self) -> None: ...
