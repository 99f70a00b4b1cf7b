"""The engine's cells and their books, changed together.

Invariant: what residency says is in cells is in the engine's cells, sequence by sequence. Threading: compute thread; each
method holds the lock while books and cells differ, which is never as long as a decode.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from appliance.engine.base import Engine, KVMode
from appliance.engine.request import Aside, Request
from appliance.engine.residency import Residency, Sequence
from appliance.errors import EngineError


class Cells:
    def __init__(self, engine: Engine, lock: threading.RLock) -> None:
        self._engine = engine
        self._lock = lock
        self.scratch = engine.info.max_sequences - 1
        """A sequence id outside the books, empty between calls."""
        layout = engine.info.layout
        self.checkpoint_tokens = 0 if layout.divisible else layout.block_tokens
        """How far apart sequences are marked. 0: they need not be, any prefix of one can be exported and shared."""
        self.residency = Residency(engine.info.context_tokens, self.scratch, whole=not layout.divisible)
        self._most_marks = max(4, self.scratch // 4)
        self.shares = engine.info.kv_mode is not KVMode.NONE
        """Whether a sequence can take over a prefix of another."""
        self.evictions = 0

    def admit(self, request: Request, claim: int, outstanding: int) -> bool:
        """Give the request a sequence, its pinned prefix, and room for `claim` cells in all beside `outstanding` claims.

        False, and nothing changed, if that cannot be done by evicting released sequences.
        """
        with self._lock:
            books, pin = self.residency, request.pin
            pinned = pin.tokens if pin else 0
            if books.cells - books.held_cells() - outstanding < claim - pinned:
                return False
            if not self._free_an_id():
                return False
            sequence = books.open(request.ns, request.prompt, request.owner)
            if pin and pinned:
                self._engine.link(pin.sequence.id, sequence.id, 0, pinned)
                books.link(pin.sequence, sequence, pinned)
            self.unpin(request)
            request.sequence, request.claim = sequence, claim
            self.make_room(request.outstanding + outstanding)
            return True

    def grow(self, request: Request, cells: int, outstanding: int) -> bool:
        """Claim more for an admitted request beside all `outstanding` claims. False, and nothing changed, if there are none."""
        with self._lock:
            books = self.residency
            if books.cells - books.held_cells() - outstanding < cells:
                return False
            request.claim += cells
            self.make_room(outstanding + cells)
            return True

    def adopt(self, request: Request) -> None:
        """Share what others have computed or restored of this prompt meanwhile, and what waits aside.

        Not the prompt's last token: it is decoded for its logits, also if it is in cells already.
        """
        sequence, last = request.sequence, len(request.prompt) - 1
        assert sequence, "only admitted requests adopt"
        with self._lock:
            self._join(request)
            if sequence.length > last:
                self.truncate(sequence, last)
            if not self.shares:
                return
            source, resident = self.residency.lookup(request.ns, request.prompt, beyond=sequence.length)
            resident = min(resident, last)
            if source and resident > sequence.length:
                self._engine.drop(sequence.id)
                self._engine.link(source.id, sequence.id, 0, resident)
                self.residency.relink(source, sequence, resident)
                self._join(request)

    def place_aside(self, request: Request, start: int, stop: int, fill: Callable[[int], None]) -> None:
        """Blocks [start, stop) of the prompt go into cells of their own; `fill` puts them into the sequence of that id.

        They continue what is aside already. EngineError if they do not, or no sequence is to be had.
        """
        aside = request.aside
        with self._lock:
            if aside is not None and aside.stop != start:
                raise EngineError("the blocks do not continue what is aside")
            if aside is None and not self._free_an_id():
                raise EngineError("no sequence is free for blocks aside")
            sequence_id = self.residency.put_aside(aside.sequence_id if aside else None, stop - start)
            if aside is None:
                request.aside = aside = Aside(sequence_id, start, start)
            aside.stop = stop
        try:
            fill(sequence_id)
        except EngineError:
            self.drop_aside(request)
            raise

    def drop_aside(self, request: Request) -> None:
        with self._lock:
            if request.aside is not None:
                self._engine.drop(request.aside.sequence_id)
                self.residency.clear_aside(request.aside.sequence_id)
                request.aside = None

    def _join(self, request: Request) -> None:
        """What is aside becomes part of the sequence as soon as it reaches it."""
        sequence, aside = request.sequence, request.aside
        if sequence is None or aside is None or sequence.length < aside.start:
            return
        start, stop = sequence.length, aside.stop
        if start < stop:
            self._engine.link(aside.sequence_id, sequence.id, start, stop)
        self._engine.drop(aside.sequence_id)
        self.residency.clear_aside(aside.sequence_id)
        request.aside = None
        if start < stop:
            self.residency.extend(sequence, stop - start)

    def _free_an_id(self) -> bool:
        if not self.residency.free_ids:
            oldest = self.residency.oldest_unpinned()
            if oldest is None:
                return False
            self._forget(oldest)
            self.evictions += 1
        return True

    def extend(self, sequence: Sequence, tokens: int, generated: bytes = b"") -> None:
        """The engine has put `tokens` more positions into cells."""
        with self._lock:
            self.residency.extend(sequence, tokens, generated)

    def truncate(self, sequence: Sequence, length: int) -> None:
        with self._lock:
            self._engine.drop(sequence.id, length)
            self.residency.truncate(sequence, length)

    def mark_if_due(self, request: Request) -> None:
        """With checkpoints, at each end of a block and where the prompt's last token, decoded alone, is to come."""
        every, present = self.checkpoint_tokens, request.present
        if every and (present % every == 0 or present == len(request.prompt) - 1):
            self.mark(request)

    def mark(self, request: Request) -> None:
        """Keep the state where the sequence is now, to be exported and shared when it has gone on. Only with checkpoints.

        A mark is a released sequence, evicted like any other; of one request the oldest goes when there are too many.
        """
        sequence = request.sequence
        assert sequence
        if not sequence.length:
            return
        with self._lock:
            if self.residency.ending(sequence.ns, sequence.tokens()) or not self._free_an_id():
                return
            mark = self.residency.open(sequence.ns, sequence.tokens(), sequence.owner)
            self._engine.link(sequence.id, mark.id, 0, sequence.length)
            self.residency.link(sequence, mark, sequence.length)
            self.residency.release(mark)
            request.marks = [old for old in request.marks if self.residency.holds(old)] + [mark]
            for old in request.marks[: -self._most_marks]:
                if not old.pinned:
                    self._forget(old)

    def ending_at(self, request: Request, stop: int) -> Sequence | None:
        """A sequence to export the request's positions before `stop` from: the request's own, or with checkpoints its mark."""
        sequence = request.sequence
        if sequence is None or stop > sequence.length:
            return None
        if not self.checkpoint_tokens or stop == sequence.length:
            return sequence
        return self.residency.ending(sequence.ns, sequence.tokens()[:stop])

    def lose(self, sequence: Sequence) -> None:
        """The engine has lost the state of a sequence that it could not continue."""
        self.truncate(sequence, 0)

    def unpin(self, request: Request) -> None:
        with self._lock:
            if request.pin:
                self.residency.unpin(request.pin)
                request.pin = None

    def release(self, sequence: Sequence) -> None:
        """Keep the sequence for later prompts, unless that adds nothing."""
        with self._lock:
            if self.shares:
                redundant = self.residency.release(sequence)
            else:
                self.residency.forget(sequence)
                redundant = [sequence]
            for each in redundant:
                self._engine.drop(each.id)

    def make_room(self, cells: int) -> None:
        """Evict, least recently used first, until that many cells are free or nothing can go."""
        with self._lock:
            while self.residency.cells - self.residency.used < cells and self._evict_one():
                self.evictions += 1

    def evict_all(self) -> int:
        """Drop every released sequence but for what is pinned; returns the cells freed."""
        with self._lock:
            before = self.residency.used
            while self._evict_one():
                pass
            return before - self.residency.used

    def _evict_one(self) -> bool:
        victim = self.residency.victim()
        if victim is None:
            return False
        sequence, keep = victim
        if keep:
            self.truncate(sequence, keep)
        else:
            self._forget(sequence)
        return True

    def _forget(self, sequence: Sequence) -> None:
        self._engine.drop(sequence.id)
        self.residency.forget(sequence)
