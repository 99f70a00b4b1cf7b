"""Which token runs are in cells: the books of the hbm tier.

A sequence is a path through a tree of extents; an extent is a run of cells that the same sequences share. Linking a
prefix splits an extent where the prefix ends, so every cell is counted once however many sequences hold it.
Invariant: used cells == sum of live extents and cells aside, and an extent's references == its child extents + the sequences ending in it.

A sequence is held (a request works with it) or released (kept for the next prompt that begins like it, least recently
used first to go, but first those of the owner that holds most). A pin keeps the first tokens of a sequence in cells until a
waiting request links them. Cells aside hold blocks of a prompt whose front is still being computed.

With checkpoints a sequence is whole: it is shared up to where it ends or not at all, and not while it is held, as it goes on.

Threading: not safe by itself; the scheduler guards every call with its lock. Nothing here calls the engine.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from appliance.types import Tokens


class Extent:
    """Cells of positions [start, stop), below those of `parent`."""

    __slots__ = ("parent", "references", "start", "stop")

    def __init__(self, parent: Extent | None, start: int, stop: int) -> None:
        self.parent = parent
        self.start = start
        self.stop = stop
        self.references = 1


class Sequence:
    """Positions [0, length) of `prompt + generated` are in cells."""

    __slots__ = ("generated", "held", "id", "ns", "owner", "pins", "prompt", "tail", "whole")

    def __init__(self, seq: int, ns: bytes, prompt: Tokens, owner: bytes = b"", *, whole: bool = False) -> None:
        self.whole = whole
        self.id = seq
        self.ns = ns
        self.owner = owner
        self.prompt = prompt
        self.generated = bytearray()
        self.tail: Extent | None = None
        self.pins: list[Pin] = []
        self.held = True

    @property
    def length(self) -> int:
        return self.tail.stop if self.tail else 0

    @property
    def offered(self) -> int:
        """Positions others may share. While the holder may still drop its prompt's last to decode it again, not that
        one: shared, its cell would stay in use and the holder need one more than it has claimed.
        """
        if self.whole:
            return 0 if self.held else self.length
        last = len(self.prompt) - 1
        return min(self.length, last) if self.held and not self.generated else self.length

    @property
    def pinned(self) -> int:
        return max((pin.tokens for pin in self.pins), default=0)

    @property
    def is_shared(self) -> bool:
        """Whether its last cells are also those of another."""
        return self.tail is not None and self.tail.references > 1

    def path(self) -> Iterator[Extent]:
        """Extents from the last to the first."""
        extent = self.tail
        while extent:
            yield extent
            extent = extent.parent

    def shares(self, tokens: Tokens) -> int:
        """Leading tokens of `tokens` that this sequence has in cells and offers.

        With checkpoints not all of them: the last one is still to be decoded, for its logits.
        """
        if self.whole:
            n = self.offered
            return n if n < len(tokens) and self.tokens() == tokens[:n] else 0
        n = self.prompt.common_prefix(tokens)
        if n == len(self.prompt) and self.generated and n < len(tokens):
            n += Tokens(bytes(self.generated)).common_prefix(tokens[n:])
        return min(n, self.offered)

    def covers(self, other: Sequence) -> bool:
        """Nothing of `other` would be found that is not found here."""
        if self.ns != other.ns or self.offered < other.length:
            return False
        if self.whole:
            return self.tokens() == other.tokens()
        return self.shares(other.tokens()) == other.length

    def tokens(self) -> Tokens:
        return Tokens(self.prompt.data + self.generated)[: self.length]


@dataclass(eq=False)
class Pin:
    sequence: Sequence
    tokens: int


class Residency:
    def __init__(self, cells: int, max_sequences: int, *, whole: bool = False) -> None:
        self.cells = cells
        self._whole = whole
        self.used = 0
        self._free_ids = list(range(max_sequences - 1, -1, -1))
        self._sequences: dict[int, Sequence] = {}
        self._released: OrderedDict[int, Sequence] = OrderedDict()
        """Least recently used first."""
        self._owned: Counter[bytes] = Counter()
        """Cells of each owner. A namespace has one owner, so has an extent."""
        self._aside: dict[int, int] = {}
        """Cells aside, by sequence id."""

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def free_ids(self) -> int:
        return len(self._free_ids)

    # --- find ---------------------------------------------------------------------------------------------------

    def lookup(self, ns: bytes, tokens: Tokens, *, beyond: int = 0) -> tuple[Sequence | None, int]:
        """The sequence of `ns` that shares most leading tokens, and how many; (None, beyond) if none shares more."""
        best, most = None, beyond
        for sequence in self._sequences.values():
            if sequence.ns == ns and sequence.offered > most and (n := sequence.shares(tokens)) > most:
                best, most = sequence, n
        return best, most

    def holds(self, sequence: Sequence) -> bool:
        return self._sequences.get(sequence.id) is sequence

    def ending(self, ns: bytes, tokens: Tokens) -> Sequence | None:
        """The released sequence that is exactly these tokens."""
        return next(
            (s for s in self._released.values() if s.ns == ns and s.length == len(tokens) and s.tokens() == tokens),
            None,
        )

    def pin(self, sequence: Sequence, tokens: int) -> Pin:
        """Keep the first `tokens` in cells. Counts as use."""
        assert tokens <= sequence.length, "only what is in cells can be pinned"
        pin = Pin(sequence, tokens)
        sequence.pins.append(pin)
        if sequence.id in self._released:
            self._released.move_to_end(sequence.id)
        return pin

    def unpin(self, pin: Pin) -> None:
        pin.sequence.pins.remove(pin)

    # --- change -------------------------------------------------------------------------------------------------

    def open(self, ns: bytes, prompt: Tokens, owner: bytes = b"") -> Sequence:
        """A new, empty, held sequence."""
        sequence = Sequence(self._free_ids.pop(), ns, prompt, owner, whole=self._whole)
        self._sequences[sequence.id] = sequence
        return sequence

    def link(self, source: Sequence, target: Sequence, tokens: int) -> None:
        """The empty `target` shares the first `tokens` cells of `source`."""
        assert target.tail is None and 0 < tokens <= source.length, "links go from a longer to an empty sequence"
        extent = next(e for e in source.path() if e.start < tokens)
        target.tail = self._split(extent, tokens)
        target.tail.references += 1

    def extend(self, sequence: Sequence, tokens: int, generated: bytes = b"") -> None:
        """`tokens` more positions are in cells; `generated` are the ids of those beyond the prompt."""
        tail = sequence.tail
        if tail and tail.references == 1:
            tail.stop += tokens
        else:  # the new extent takes over the sequence's reference to its tail
            sequence.tail = Extent(tail, sequence.length, sequence.length + tokens)
        sequence.generated += generated
        self._count(sequence, tokens)
        assert self.used <= self.cells, "more cells in use than there are"

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Forget positions from `length` on. A pin of more shrinks: what it kept is known to be gone."""
        for pin in sequence.pins:
            pin.tokens = min(pin.tokens, length)
        self._cut(sequence, length)
        del sequence.generated[max(0, length - len(sequence.prompt)) * 4 :]

    def relink(self, source: Sequence, target: Sequence, tokens: int) -> None:
        """`target` gives up its own cells for the first `tokens` of `source`, which holds the same and more of it."""
        assert target.length < tokens, "a relink gains tokens"
        self._cut(target, 0)
        self.link(source, target, tokens)

    def _cut(self, sequence: Sequence, length: int) -> None:
        while sequence.tail and sequence.tail.start >= length:
            extent = sequence.tail
            sequence.tail = extent.parent
            extent.references -= 1
            if not extent.references:  # its reference to the parent passes to the sequence
                self._count(sequence, extent.start - extent.stop)
            elif extent.parent:
                extent.parent.references += 1
        tail = sequence.tail
        if tail and tail.stop > length:
            if tail.references == 1:
                self._count(sequence, length - tail.stop)
                tail.stop = length
            else:
                sequence.tail = self._split(tail, length)
                sequence.tail.references += 1
                tail.references -= 1

    def _count(self, sequence: Sequence, cells: int) -> None:
        self.used += cells
        self._owned[sequence.owner] += cells

    def put_aside(self, sequence_id: int | None, cells: int) -> int:
        """So many more cells aside, under this id or a new one; returns the id."""
        if sequence_id is None:
            sequence_id = self._free_ids.pop()
        self._aside[sequence_id] = self._aside.get(sequence_id, 0) + cells
        self.used += cells
        return sequence_id

    def clear_aside(self, sequence_id: int) -> None:
        self.used -= self._aside.pop(sequence_id)
        self._free_ids.append(sequence_id)

    def release(self, sequence: Sequence) -> list[Sequence]:
        """Keep it for others to find. Returns the sequences that thereby add nothing, now forgotten."""
        self._released[sequence.id] = sequence
        sequence.held = False
        others = [other for other in self._sequences.values() if other is not sequence]
        if not sequence.pinned and (not sequence.length or any(other.covers(sequence) for other in others)):
            redundant = [sequence]
        else:
            redundant = [o for o in others if o.id in self._released and not o.pinned and sequence.covers(o)]
        for each in redundant:
            self.forget(each)
        return redundant

    def forget(self, sequence: Sequence) -> None:
        assert not sequence.pinned, "pinned cells stay"
        self.truncate(sequence, 0)
        del self._sequences[sequence.id]
        self._released.pop(sequence.id, None)
        self._free_ids.append(sequence.id)

    # --- make room ----------------------------------------------------------------------------------------------

    def victim(self) -> tuple[Sequence, int] | None:
        """The next released sequence to go, and the length that pins keep of it. None: nothing can go.

        The oldest of the owner that holds most cells: so nobody loses any while others hold more than their equal share.
        A whole one only if that frees a cell.
        """
        oldest: dict[bytes, Sequence] = {}
        for sequence in self._released.values():
            if sequence.pinned < sequence.length and not (sequence.whole and sequence.is_shared):
                oldest.setdefault(sequence.owner, sequence)
        if not oldest:
            return None
        victim = oldest[max(oldest, key=lambda owner: self._owned[owner])]
        return victim, victim.pinned

    def held_cells(self) -> int:
        """Distinct cells that no victim can free."""
        ends: dict[Extent, int] = {}
        for sequence in self._sequences.values():
            length = sequence.pinned if sequence.id in self._released else sequence.length
            for extent in sequence.path():
                if extent.start < length:
                    ends[extent] = max(ends.get(extent, 0), min(extent.stop, length))
        return sum(end - extent.start for extent, end in ends.items()) + sum(self._aside.values())

    def oldest_unpinned(self) -> Sequence | None:
        """The released sequence whose id is the next to be had."""
        return next((sequence for sequence in self._released.values() if not sequence.pinned), None)

    def check_integrity(self) -> None:
        """Recount everything. An AssertionError is a bug of this module or of its caller."""
        references: dict[Extent, int] = {}
        for sequence in self._sequences.values():
            if sequence.tail:
                references[sequence.tail] = references.get(sequence.tail, 0) + 1
        extents = {extent for sequence in self._sequences.values() for extent in sequence.path()}
        for extent in extents:
            start = extent.parent.stop if extent.parent else 0
            assert extent.start == start < extent.stop, "a path has no gap and no empty extent"
            if extent.parent:
                references[extent.parent] = references.get(extent.parent, 0) + 1
        assert all(extent.references == references[extent] for extent in extents), "references do not add up"
        used = sum(extent.stop - extent.start for extent in extents)
        assert used == self._owned.total(), "owners do not add up"
        assert self.used == used + sum(self._aside.values()) <= self.cells, "cells do not add up"
        in_use = set(self._sequences) | set(self._aside)
        assert len(in_use) == len(self._sequences) + len(self._aside), "an id is used twice"
        assert not set(self._free_ids) & in_use, "an id is free and in use"
        assert set(self._released) <= set(self._sequences)

    def _split(self, extent: Extent, at: int) -> Extent:
        """The extent that ends at `at`: `extent` itself, or a new one above what becomes its lower part."""
        if extent.stop == at:
            return extent
        upper = Extent(extent.parent, extent.start, at)
        extent.parent, extent.start = upper, at
        return upper
