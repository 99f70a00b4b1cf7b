"""KV between cells and slots, in slices short enough that decoding does not notice.

Invariant: a restore that fails leaves its request with exactly what it had before; a restored block is linked to the
request only when the engine has all of it. Threading: compute thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from appliance.engine.base import Engine
from appliance.engine.cells import Cells
from appliance.engine.request import Request
from appliance.errors import EngineError, RestoreError

SLICE_BLOCKS = 16
SLICE_TOKENS = 4096
"""Blocks of more tokens move in slices of fewer."""
EXPORT_SHARE = 0.01
"""Of the time while others decode; sealing and writing add to what an export takes here, and it can wait."""
SHARED_SLICE = 0.04
"""While others decode a slice may add this share to every stream's step; one block moves in any case."""

SlotView = Callable[[int, int], memoryview]
"""(slot, bytes) -> that many first bytes of the slot. EngineError if there is no such slot."""


@dataclass(eq=False)
class Restore:
    request: Request
    start: int
    blocks: deque[tuple[int, int, int]]
    """(slot, n_tokens, use_tokens), what is left to do."""
    reply: Future[int]
    before: int | None = None
    """Tokens present when it began."""


@dataclass(eq=False)
class Export:
    request: Request
    blocks: deque[tuple[int, int, int]]
    """(start, n_tokens, slot), what is left to do."""
    reply: Future[None]


@dataclass
class Transfers:
    engine: Engine
    cells: Cells
    slot: SlotView
    restores: deque[Restore] = field(default_factory=deque)
    exports: deque[Export] = field(default_factory=deque)
    block_s: float = 0.0
    """What moving a block last took."""
    rest_until_s: float = 0.0
    """Monotonic clock: when the exports beside streams go on."""

    @property
    def pending(self) -> bool:
        """Some transfer can make progress now."""
        return bool(self.exports) or any(job.request.sequence for job in self.restores)

    def slice_blocks(self, step_s: float) -> int:
        """Blocks to move between two steps of running streams that take so long; 0: there are none."""
        most = max(1, min(SLICE_BLOCKS, SLICE_TOKENS // self.engine.info.layout.block_tokens))
        if not step_s:
            return most
        share = int(SHARED_SLICE * step_s / self.block_s) if self.block_s else 1
        return max(1, min(share, most))

    def resting(self) -> bool:
        """Whether exports beside streams have had their share of the time for now."""
        return time.monotonic() < self.rest_until_s

    def restoring(self, request: Request) -> bool:
        """Whether blocks come that continue what the request has: to compute them would be for nothing."""
        return any(job.request is request and job.start <= request.present for job in self.restores)

    def cancel(self, request: Request, *, exports: bool) -> None:
        """Answer the request's transfers with an error."""
        for restore in [job for job in self.restores if job.request is request]:
            self.restores.remove(restore)
            restore.reply.set_exception(RestoreError("the request was cancelled"))
        for export in [job for job in self.exports if exports and job.request is request]:
            self.exports.remove(export)
            export.reply.set_exception(EngineError("the request was released"))

    def restore_slice(self, blocks: int) -> bool:
        """One slice of at most `blocks` of the first restore whose request is admitted. False if there is none."""
        job = next((job for job in self.restores if job.request.sequence), None)
        if job is None:
            return False
        try:
            self._restore(job, blocks)
        except EngineError as error:
            self._undo(job)
            self.restores.remove(job)
            job.reply.set_exception(RestoreError(str(error)))
        return True

    def _restore(self, job: Restore, most: int) -> None:
        sequence = job.request.sequence
        assert sequence
        if job.before is None:
            self._check(job)
            job.before = sequence.length
            self.cells.adopt(job.request)  # what others have in cells by now needs no copy
        while job.blocks and job.start + job.blocks[0][2] <= sequence.length:  # present already
            job.start += job.blocks.popleft()[2]
        blocks = [job.blocks.popleft() for _ in range(min(most, len(job.blocks)))]
        if blocks:
            began_s = time.monotonic()
            stop = job.start + sum(use for _, _, use in blocks)
            if job.start > sequence.length:
                self._restore_aside(job.request, job.start, stop, blocks)
            else:
                self._restore_blocks(sequence.id, sequence.length, job.start, stop, blocks)
                self.cells.extend(sequence, stop - sequence.length)
            job.start = stop
            self.block_s = (time.monotonic() - began_s) / len(blocks)
        if not job.blocks:
            self.restores.remove(job)
            if self.cells.checkpoint_tokens:
                self.cells.mark(job.request)  # for others that begin alike
            job.reply.set_result(sequence.length)

    def _check(self, job: Restore) -> None:
        layout, request = self.engine.info.layout, job.request
        ahead = request.present < request.prefill_to <= job.start
        if job.start < 0 or (job.start > request.present and not ahead):
            raise RestoreError("the blocks do not continue what is present")
        # A state that has taken in the prompt's last token cannot go back to decode it for its logits.
        reach = len(request.prompt) - (not layout.divisible)
        if job.start + sum(use for _, _, use in job.blocks) > reach:
            raise RestoreError("the blocks reach beyond the prompt")
        if job.start + sum(use for _, _, use in job.blocks) > request.claim:
            raise RestoreError("the request was preempted and is not parked yet")
        for i, (_, n, use) in enumerate(job.blocks):
            in_part = use < n and not (layout.divisible and i == len(job.blocks) - 1)
            if not 0 < use <= n <= layout.block_tokens or in_part:
                raise RestoreError("a block is used whole, or is the last and used in part")

    def _views(self, blocks: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, memoryview]]:
        payload_bytes = self.engine.info.layout.payload_bytes
        return [(n, use, self.slot(slot, payload_bytes(n))) for slot, n, use in blocks]

    def _restore_aside(self, request: Request, start: int, stop: int, blocks: Sequence[tuple[int, int, int]]) -> None:
        views = self._views(blocks)
        self.cells.make_room(sum(n for _, n, _ in blocks))
        self.cells.place_aside(request, start, stop, lambda seq: self.engine.restore(seq, start, views))

    def _restore_blocks(
        self, seq: int, present: int, start: int, stop: int, blocks: Sequence[tuple[int, int, int]]
    ) -> None:
        views = self._views(blocks)
        self.cells.make_room(sum(n for _, n, _ in blocks))
        if start == present:
            self.engine.restore(seq, start, views)
            return
        # The resident prefix ends inside the first block: restore beside it, then link what it lacks.
        scratch = self.cells.scratch
        try:
            self.engine.restore(scratch, start, views)
            self.engine.link(scratch, seq, present, stop)
        finally:
            self.engine.drop(scratch)

    def _undo(self, job: Restore) -> None:
        sequence = job.request.sequence
        assert sequence
        if job.start > sequence.length:
            self.cells.drop_aside(job.request)
        elif job.before is not None and job.before < sequence.length and not self.cells.checkpoint_tokens:
            self.cells.truncate(sequence, job.before)

    def export_slice(self, blocks: int) -> bool:
        """One run of at most `blocks` consecutive blocks of the first export. False if there is none."""
        if not self.exports:
            return False
        job = self.exports[0]
        try:
            self._export(job, blocks)
        except EngineError as error:
            self.exports.remove(job)
            job.reply.set_exception(error)
            return True
        if not job.blocks:
            self.exports.remove(job)
            job.reply.set_result(None)
        return True

    def _export(self, job: Export, most: int) -> None:
        if not job.blocks:
            return
        most = 1 if self.cells.checkpoint_tokens else most
        start = stop = job.blocks[0][0]
        views: list[tuple[int, memoryview]] = []
        while job.blocks and job.blocks[0][0] == stop and len(views) < most:
            _, n, slot = job.blocks.popleft()
            if not 0 < n <= self.engine.info.layout.block_tokens:
                raise EngineError("no such block size")
            views.append((n, self.slot(slot, self.engine.info.layout.payload_bytes(n))))
            stop += n
        sequence = self.cells.ending_at(job.request, stop)
        if sequence is None or start < 0:
            raise EngineError("the tokens to export are not in cells")
        began_s = time.monotonic()
        self.engine.export(sequence.id, start, views)
        ended_s = time.monotonic()
        self.block_s = (ended_s - began_s) / len(views)
        self.rest_until_s = ended_s + (ended_s - began_s) / EXPORT_SHARE
