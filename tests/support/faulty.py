"""A tier that fails on purpose: wraps any RecordTier and breaks the operation a test names."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable, Sequence

from appliance.errors import TierError, TierFull, TierIO
from appliance.kv.tiers.base import Extent, MediumUsage, RecordTier, SegmentInfo


def eio() -> TierError:
    return TierIO("injected", errno=errno.EIO)


def full() -> TierError:
    return TierFull("injected")


class Gate:
    """A thread that comes to it stays until a test opens it."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()

    def open(self) -> None:
        self._open.set()

    def passed(self) -> None:
        self.reached.set()
        self._open.wait()


class FaultyTier(RecordTier):
    """`fail(op, n)` makes the next n operations of that name raise, `hold(op)` makes them wait; `spoil` may change what a
    read returned."""

    def __init__(self, inner: RecordTier) -> None:
        self.inner = inner
        self.properties = inner.properties
        self.spoil: Callable[[Extent, memoryview], None] = lambda extent, data: None
        self.calls: dict[str, int] = {}
        self._faults: dict[str, list[Callable[[], TierError] | None]] = {}
        self._gates: dict[str, Gate] = {}

    def fail(self, op: str, times: int = 1, *, after: int = 0, error: Callable[[], TierError] = eio) -> None:
        self._faults[op] = [None] * after + [error] * times

    def hold(self, op: str) -> Gate:
        self._gates[op] = gate = Gate()
        return gate

    def heal(self) -> None:
        self._faults.clear()
        self.spoil = lambda extent, data: None

    def _enter(self, op: str) -> None:
        self.calls[op] = self.calls.get(op, 0) + 1
        if op in self._gates:
            self._gates[op].passed()
        pending = self._faults.get(op)
        if pending and (error := pending.pop(0)) is not None:
            raise error()

    def shortfall(self, lane: bytes, nbytes: Sequence[int]) -> int:
        return self.inner.shortfall(lane, nbytes)

    def reserve(self, lane: bytes, nbytes: int) -> Extent:
        self._enter("reserve")
        return self.inner.reserve(lane, nbytes)

    def write(self, extents: Sequence[Extent], buffer: memoryview) -> None:
        try:
            self._enter("write")
        except TierError:
            self.inner.write(
                extents[:1], buffer[: extents[0].length]
            )  # a short write, rolled back as the contract says
            self.inner.free(extents)
            raise
        self.inner.write(extents, buffer)

    def sync(self) -> None:
        self._enter("sync")
        self.inner.sync()

    def free(self, extents: Iterable[Extent]) -> None:
        self.inner.free(extents)

    def read(self, extent: Extent, into: memoryview) -> None:
        self._enter("read")
        self.inner.read(extent, into)
        self.spoil(extent, into)

    def scan(self) -> list[SegmentInfo]:
        return self.inner.scan()

    def next_data(self, segment: int, offset: int) -> int | None:
        return self.inner.next_data(segment, offset)

    def settle(self, segment: int, live: Sequence[Extent]) -> None:
        self.inner.settle(segment, live)

    def set_aside(self, segment: int) -> None:
        self.inner.set_aside(segment)

    def usage(self) -> MediumUsage:
        return self.inner.usage()

    def close(self) -> None:
        self._enter("close")
        self.inner.close()
