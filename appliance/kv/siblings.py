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

_CACHED_CHILDREN = 65_536
"""Over all parents."""


def longest_common(children: Sequence[tuple[bytes, BlockId]], tokens: Tokens) -> tuple[int, BlockId] | None:
    """Of sorted children, one that shares most leading tokens with `tokens`, and how many: it is a neighbour in order."""
    at = bisect_left(children, (tokens.data,))
    best: tuple[int, BlockId] | None = None
    for data, block in children[max(0, at - 1) : at + 1]:
        shared = Tokens(data).common_prefix(tokens)
        if shared and (best is None or shared > best[0]):
            best = (shared, block)
    return best


def strict_prefixes(children: Sequence[tuple[bytes, BlockId]], tokens: Tokens) -> list[BlockId]:
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
    """Decrypted children of recently used parents, kept sorted. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lists: OrderedDict[BlockId, list[tuple[bytes, BlockId]]] = OrderedDict()
        self._count = 0
        self._version = 0

    def get(self, parent: BlockId) -> list[tuple[bytes, BlockId]] | None:
        with self._lock:
            found = self._lists.get(parent)
            if found is not None:
                self._lists.move_to_end(parent)
            return found

    def version(self) -> int:
        """Counts changes. Taken before the index is read, it tells put() whether what was read is still so."""
        with self._lock:
            return self._version

    def put(self, parent: BlockId, children: list[tuple[bytes, BlockId]], version: int) -> None:
        with self._lock:
            if version != self._version:
                return
            self._count += len(children) - len(self._lists.get(parent, ()))
            self._lists[parent] = children
            while self._count > _CACHED_CHILDREN and len(self._lists) > 1:
                self._count -= len(self._lists.popitem(last=False)[1])

    def add(self, parent: BlockId, tokens: bytes, block: BlockId) -> None:
        with self._lock:
            self._version += 1
            siblings = self._lists.get(parent)
            if (
                siblings is not None
                and (tokens, block) not in siblings[(at := bisect_left(siblings, (tokens, block))) : at + 1]
            ):
                self._lists[parent] = [*siblings[:at], (tokens, block), *siblings[at:]]
                self._count += 1

    def discard(self, parent: BlockId, block: BlockId) -> None:
        with self._lock:
            self._version += 1
            siblings = self._lists.get(parent)
            if siblings is not None:
                self._lists[parent] = [child for child in siblings if child[1] != block]
                self._count -= len(siblings) - len(self._lists[parent])
