"""Which blocks a tier forgets first. A pure object: no clock, no I/O; its owner serialises calls.

Invariant: `evict` never names a protected block and never names fewer than asked unless it says there are not enough.
After a touch no block of the touched prefix goes before a deeper one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Container, Hashable, Iterator, Sequence
from itertools import islice
from typing import Generic, NamedTuple, TypeVar

Name = TypeVar("Name", bound=Hashable)
"""Of a block: an id in the store, a number in a simulation. The parent of a path's first block is any name but theirs."""


class Standing(NamedTuple):
    """What a policy knows of a block beside the order of last use, so that it survives a restart."""

    uses: int = 0
    """Requests that found it."""
    clock: float = 0.0
    """Of the policy, at the last use: it grows with what was evicted."""
    floor: int = 0
    """How dear it is at least, as what lies below it; on the policy's own scale."""


NEW = Standing()


class EvictionPolicy(ABC, Generic[Name]):
    @abstractmethod
    def add(self, block: Name, parent: Name, start: int, standing: Standing = NEW) -> None:
        """A block the tier now holds, newer than all others; `start` is the position of its first token.

        `parent` may be a block the tier does not hold. `standing`: of an earlier life.
        """

    @abstractmethod
    def touch(self, blocks: Sequence[Name], *, counts: bool = True) -> list[Name]:
        """The prefix that ends with the last of these the tier holds was used: of its blocks the first becomes the newest.

        Returns all that were used, those before `blocks` included. `counts`: by one more request.
        """

    @property
    def clock(self) -> float:
        """Of a block that is used now."""
        return NEW.clock

    def standing(self, block: Name) -> Standing:
        """Of a block the tier holds."""
        return NEW

    @abstractmethod
    def remove(self, block: Name) -> None:
        """The tier no longer holds it. Unknown blocks are ignored."""

    @abstractmethod
    def evict(self, n: int, protected: Container[Name] = ()) -> list[Name]:
        """The n blocks to forget first, none of them protected; empty if there are not n.

        They stay until they are removed; a policy that ages does so by what it names here.
        """

    @abstractmethod
    def oldest_first(self, protected: Container[Name] = ()) -> Iterator[Name]:
        """All blocks that are not protected in the order of eviction."""

    @abstractmethod
    def heads(self) -> Iterator[Name]:
        """A few blocks, among them the least recently used."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __contains__(self, block: object) -> bool: ...


class LeafFirstLru(EvictionPolicy[Name]):
    """Least recently used, deeper blocks of a prefix before shallower ones.

    A touched prefix gives deeper blocks the older place, so that leaf-first falls out of plain LRU order.
    """

    def __init__(self) -> None:
        self._parents: OrderedDict[Name, Name] = OrderedDict()  # oldest first

    def add(self, block: Name, parent: Name, start: int, standing: Standing = NEW) -> None:
        self._parents[block] = parent
        self._parents.move_to_end(block)

    def touch(self, blocks: Sequence[Name], *, counts: bool = True) -> list[Name]:
        block = next((block for block in reversed(blocks) if block in self._parents), None)
        touched: list[Name] = []
        while block is not None and (parent := self._parents.get(block)) is not None:
            self._parents.move_to_end(block)
            touched.append(block)
            block = parent
        return touched

    def remove(self, block: Name) -> None:
        self._parents.pop(block, None)

    def evict(self, n: int, protected: Container[Name] = ()) -> list[Name]:
        chosen = list(islice(self.oldest_first(protected), n))
        return chosen if len(chosen) == n else []

    def oldest_first(self, protected: Container[Name] = ()) -> Iterator[Name]:
        return (block for block in self._parents if block not in protected)

    def heads(self) -> Iterator[Name]:
        return islice(self._parents, 1)

    def __len__(self) -> int:
        return len(self._parents)

    def __contains__(self, block: object) -> bool:
        return block in self._parents
