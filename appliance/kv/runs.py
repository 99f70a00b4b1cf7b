"""Sorts many byte strings a run at a time, so that no step holds the interpreter for long, and gives them back one by one.

Invariant: what was given out is no longer held: whoever drains a sort builds its own table from the memory of this one.
Threading: one thread; other threads of the process run between the steps.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

_RUN = 16_384
"""Sorted in about 10 ms."""


class Runs:
    def __init__(self) -> None:
        self._sorted: list[list[bytes]] = []
        self._open: list[bytes] = []

    def __len__(self) -> int:
        return sum(map(len, self._sorted)) + len(self._open)

    def add(self, item: bytes) -> None:
        self._open.append(item)
        if len(self._open) == _RUN:
            self._close()

    def drain(self) -> Iterator[bytes]:
        """Everything, smallest first."""
        self._close()
        return heapq.merge(*map(_taken, self._sorted))

    def _close(self) -> None:
        self._open.sort(reverse=True)
        self._sorted.append(self._open)
        self._open = []


def _taken(run: list[bytes]) -> Iterator[bytes]:
    """A run, taken from its end."""
    while run:
        yield run.pop()
