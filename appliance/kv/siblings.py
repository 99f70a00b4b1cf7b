"""Siblings: the children of one parent, decrypted and sorted by their tokens.

Invariant: of sorted token sequences the one that shares most leading tokens with another is its neighbour in that
order, so a lookup among many siblings is a bisection. Pure functions, and a cache that any thread may use.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Sequence

from appliance.types import ROOT_BYTES, TOKEN_BYTES, BlockId, Tokens

Child = tuple[bytes, BlockId]
"""Token bytes and name."""

_CACHED_CHILDREN = 65_536
"""Over all parents."""
FAMILY = _CACHED_CHILDREN // 2
"""At most so many of one parent, so that it is not in the way of the next."""


def longest_common(children: Sequence[Child], tokens: Tokens) -> tuple[int, BlockId] | None:
    """Of sorted children, one that shares most leading tokens with `tokens`, and how many: it is a neighbour in order."""
    at = bisect_left(children, (tokens.data,))
    best: tuple[int, BlockId] | None = None
    for data, block in children[max(0, at - 1) : at + 1]:
        shared = Tokens(data).common_prefix(tokens)
        if shared and (best is None or shared > best[0]):
            best = (shared, block)
    return best


def strict_prefixes(children: Sequence[Child], tokens: Tokens) -> list[BlockId]:
    """The sorted children whose tokens are the beginning of `tokens` but not all of it."""
    found: list[BlockId] = []
    reach = tokens.data
    at = bisect_left(children, (reach,))
    while at:  # nearest smaller sibling; any prefix of `tokens` before it is also a prefix of what both share
        data, block = children[at - 1]
        shared = Tokens(data).common_prefix(Tokens(reach)) * TOKEN_BYTES
        if shared == len(data):
            found.append(block)
            at -= 1
        elif not shared:
            break
        else:
            reach = reach[:shared]
            at = bisect_right(children, (reach, b"\xff" * ROOT_BYTES))
    return found


class SiblingCache:
    """Decrypted children of recently used parents, kept sorted. Any thread.

    A parent's children come in parts (`begin`, `merge`), each as of its own moment, while others are added and discarded.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lists: OrderedDict[BlockId, list[Child]] = OrderedDict()
        self._gone: dict[BlockId, set[BlockId]] = {}
        """Of parents with parts to come: what was discarded meanwhile and may still be in such a part."""
        self._count = 0

    def get(self, parent: BlockId) -> list[Child] | None:
        with self._lock:
            found = self._lists.get(parent)
            if found is not None:
                self._lists.move_to_end(parent)
            return found

    def begin(self, parent: BlockId) -> None:
        """Before the first part is read."""
        with self._lock:
            self._replace(parent, [])
            self._gone[parent] = set()

    def merge(self, parent: BlockId, part: Sequence[Child], *, last: bool) -> bool:
        """Whether the parent has use for another part."""
        with self._lock:
            known, gone = self._lists.get(parent), self._gone.get(parent)
            if known is None or gone is None:
                return False
            new = sorted(child for child in part if child[1] not in gone and not _has(known, child))
            self._replace(parent, sorted([*known, *new]))
            more = not last and len(self._lists[parent]) < FAMILY
            if not more:
                del self._gone[parent]
            self._trim()
            return more

    def forget(self, parent: BlockId) -> None:
        with self._lock:
            self._replace(parent, [])
            del self._lists[parent]
            self._gone.pop(parent, None)

    def add(self, parent: BlockId, tokens: bytes, block: BlockId) -> None:
        """In a full family the nearest sibling makes room: it shares the most with the new one."""
        child = (tokens, block)
        with self._lock:
            siblings = self._lists.get(parent)
            if siblings is None or _has(siblings, child):
                return
            at = bisect_left(siblings, child)
            before, after = siblings[:at], siblings[at:]
            if len(siblings) >= FAMILY:
                (after or before).pop(0 if after else -1)
            self._replace(parent, [*before, child, *after])
            self._trim()

    def discard(self, parent: BlockId, block: BlockId) -> None:
        with self._lock:
            siblings = self._lists.get(parent)
            if siblings is not None:
                self._replace(parent, [child for child in siblings if child[1] != block])
            if parent in self._gone:
                self._gone[parent].add(block)

    def _replace(self, parent: BlockId, siblings: list[Child]) -> None:
        """A new list each time: readers may still have the old one."""
        self._count += len(siblings) - len(self._lists.get(parent, ()))
        self._lists[parent] = siblings

    def _trim(self) -> None:
        while self._count > _CACHED_CHILDREN:
            parent, siblings = self._lists.popitem(last=False)
            self._count -= len(siblings)
            self._gone.pop(parent, None)


def _has(siblings: Sequence[Child], child: Child) -> bool:
    at = bisect_left(siblings, child)
    return at < len(siblings) and siblings[at] == child
