"""The nvme tier for a look at it: segments are read, and stay exactly as they are.

Invariant: nothing in the folder changes; what start-up would cut, punch, remove or set aside stays. Threading: as nvme.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from appliance.kv.tiers.base import Extent, SegmentInfo
from appliance.kv.tiers.nvme import NvmeTier


class ReadOnlyNvme(NvmeTier):
    """Reads pass through the page cache: only a write could tell whether direct I/O is possible."""

    def _prepare(self, direct: bool) -> bool:
        return False

    def scan(self) -> list[SegmentInfo]:
        return super().scan() if self._folder.exists() else []  # nothing was stored yet

    def shortfall(self, lane: bytes, nbytes: Sequence[int]) -> int:
        return 0

    def free(self, extents: Iterable[Extent]) -> None:
        pass

    def settle(self, segment: int, live: Sequence[Extent]) -> None:
        pass

    def set_aside(self, segment: int) -> None:
        pass
