"""Which requests exist, which of them wait for cells, which run, and how each ends.

Invariant: a run ends in exactly one Done, Failed or Preempted, a request in no more than one of the first two, and
waiting requests are admitted first come, first served. A request is admitted with cells for its prompt and the next tokens, and claims more as it goes on; where there
are none, the youngest stream is preempted, never the oldest: so all come to their end, and none fails for want of cells.
Free cells >= what is claimed and not yet used. A request that could never fit is refused at begin.

Threading: `begin` and `stats` only read the books and may be called from any thread; everything else belongs to the
compute thread. `lock` guards the roster and the books of cells, and is not held while the engine computes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from appliance.engine.base import Engine
from appliance.engine.cells import Cells
from appliance.engine.client import Done, Event, Preempted
from appliance.engine.detok import TextStream
from appliance.engine.protocol import EngineStats
from appliance.engine.request import Failed, Request
from appliance.engine.transfer import SlotView, Transfers
from appliance.errors import EngineError, KvctlError, RequestError
from appliance.types import FinishReason, SamplingParams, Tokens

Emit = Callable[[str, Event | Failed], None]

GROWTH_TOKENS = 256
"""Cells that a request claims beyond its prompt at a time."""
LEAST_PROGRESS_TOKENS = 32
"""A request that went on after a pause is not preempted again before, if there is another."""


class Roster:
    def __init__(self, engine: Engine, *, slot: SlotView, emit: Emit, growth_tokens: int = GROWTH_TOKENS) -> None:
        self.emit = emit
        self.preemptions = 0
        self.lock = threading.RLock()
        self.cells = Cells(engine, self.lock)
        self.transfers = Transfers(engine, self.cells, slot)
        self.streams: list[Request] = []
        """Running, in the order they were admitted to run."""
        self._engine = engine
        self._growth_tokens = growth_tokens
        self._begun = 0
        self._requests: dict[str, Request] = {}
        self._queue: deque[Request] = deque()
        """Waiting for admission, first come first served."""

    # --- any thread ---------------------------------------------------------------------------------------------

    def resident(self, ns: bytes, tokens: Tokens) -> int:
        """Tokens of the longest resident prefix. Changes nothing."""
        with self.lock:
            return self.cells.residency.lookup(ns, tokens)[1] if self.cells.shares else 0

    def begin(self, request_id: str, ns: bytes, tokens: Tokens, reserve_tokens: int, owner: bytes) -> int:
        """Tokens of the longest resident prefix, now pinned; the prompt's last token is decoded again in any case."""
        info = self._engine.info
        if not len(tokens):
            raise RequestError("the prompt is empty", param="prompt")
        if int(np.frombuffer(tokens.data, "<u4").max()) >= info.vocab_tokens:
            raise RequestError(f"a token id is not in [0, {info.vocab_tokens})", param="prompt")
        if len(tokens) + reserve_tokens > info.context_tokens:
            raise RequestError(
                f"{len(tokens)} prompt tokens and {reserve_tokens} for the answer exceed this appliance's context of"
                f" {info.context_tokens} tokens",
                param="prompt",
                code="context_length_exceeded",
            )
        books = self.cells.residency
        with self.lock:
            if request_id in self._requests:
                raise EngineError("a request of this id exists")
            source, resident = books.lookup(ns, tokens) if self.cells.shares else (None, 0)
            pin = books.pin(source, min(resident, len(tokens) - 1)) if source else None
            self._begun += 1
            self._requests[request_id] = Request(request_id, self._begun, ns, owner, tokens, reserve_tokens, pin)
            return resident

    def stats(self) -> EngineStats:
        books = self.cells.residency
        with self.lock:
            return EngineStats(
                cells_total=books.cells,
                cells_used=books.used,
                cells_pinned=books.held_cells(),
                sequences_resident=len(books),
                requests_running=len(self.streams),
                requests_waiting=len(self._queue),
                resident_evictions=self.cells.evictions,
                preemptions=self.preemptions,
            )

    # --- compute thread -----------------------------------------------------------------------------------------

    def get(self, request_id: str) -> Request | None:
        return self._requests.get(request_id)

    def known(self, request_id: str) -> Request:
        request = self._requests.get(request_id)
        if request is None:
            raise EngineError("no such request")
        return request

    def enqueue(self, request: Request) -> None:
        """Wait for admission, unless that is done or under way."""
        if request.sequence is None and request not in self._queue:
            self._queue.append(request)

    def admit(self) -> None:
        """Give cells to as many waiting requests as fit, but none while a stream waits for one."""
        if any(stream.stalled for stream in self.streams):
            return
        with self.lock:
            while self._queue:
                request = self._queue[0]
                if not self.cells.admit(request, self._first_claim(request), self._outstanding()):
                    if any(other.sequence for other in self._requests.values()):
                        return  # its release will make room
                    self._admit_past_pins(request)
                self._queue.popleft()
                if request.was_run:
                    self._start(request)

    def _admit_past_pins(self, request: Request) -> None:
        """Nothing but pins of requests that wait is in the way: they go, the latest first and this one's own last."""
        for other in sorted(reversed(self._requests.values()), key=lambda other: other is request):
            self.cells.unpin(other)
            if self.cells.admit(request, self._first_claim(request), 0):
                return
        raise AssertionError("begin refuses what could never fit")

    def _first_claim(self, request: Request) -> int:
        return min(request.most_cells, len(request.prompt) + self._growth_tokens)

    def _outstanding(self) -> int:
        return sum(other.outstanding for other in self._requests.values())

    # --- making room --------------------------------------------------------------------------------------------

    def has_cell(self, request: Request) -> bool:
        """Whether the stream's next token has a cell. If not, room is being made: ask again in the next step.

        It may be this stream itself that is preempted.
        """
        more = min(self._growth_tokens, request.most_cells - request.claim)
        if request.outstanding > 0 or more <= 0 or self.cells.grow(request, more, self._outstanding()):
            return True
        holders = [other for other in self._requests.values() if other.sequence]
        if any(other not in self.streams for other in holders):
            return False  # somebody ends, is parked, or begins to run
        if victim := self._victim():
            self.preempt(victim)
            return False
        for other in self._requests.values():  # it has all cells but what these keep
            self.cells.unpin(other)
        return self.cells.grow(request, more, self._outstanding())

    def _victim(self) -> Request | None:
        """The youngest stream, but rather none that has just come back; never the oldest."""
        oldest = min(self.streams, key=lambda stream: stream.number)
        others = [stream for stream in self.streams if stream is not oldest]
        moved = [s for s in others if s.completion_tokens - s.resumed_at >= LEAST_PROGRESS_TOKENS or not s.resumed_at]
        return max(moved or others, key=lambda stream: stream.number, default=None)

    def run(self, request: Request, sampling: SamplingParams) -> None:
        """Compute from now on, or as soon as there are cells."""
        assert not request.was_run, "a request runs once at a time"
        if request.preempted:
            request.preempted = False
        else:
            request.sampling, request.text = sampling, TextStream(sampling.stop)
        if request.ended:
            self.finish(request, FinishReason.CANCELLED)
        elif request.sequence:
            self._start(request)
        else:
            self.enqueue(request)

    def _start(self, request: Request) -> None:
        """Admitted and run: from now on it takes part in steps."""
        assert request.sampling
        try:
            if request.sampling.max_tokens and request.sampler is None:
                request.sampler = self._engine.new_sampler(request.sampling, request.prompt)
        except KvctlError as error:
            self.fail(request, error)
        else:
            self.streams.append(request)

    def preempt(self, request: Request) -> None:
        """Stop computing for now. What is in cells stays until park(). Not running: nothing to do."""
        if request.ended or not request.was_run:
            return
        with self.lock:
            self.transfers.cancel(request, exports=False)
            self.cells.drop_aside(request)
            request.preempt()
            request.prefill_to = 0
            if request in self._queue:
                self._queue.remove(request)
            if request in self.streams:
                self.streams.remove(request)
        self.preemptions += 1
        self.emit(request.id, Preempted(request.present))

    def park(self, request: Request) -> None:
        """Keep the sequence of a preempted request for whoever finds it, and give up what it claimed."""
        if not request.preempted:
            raise EngineError("only a preempted request can be parked")
        with self.lock:
            self.transfers.cancel(request, exports=True)
            self.cells.unpin(request)
            if request.sequence:
                self.cells.release(request.sequence)
                request.sequence = None
            request.claim, request.prefill_to, request.resumed_at = 0, 0, request.completion_tokens

    def pin(self, request: Request) -> None:
        """Of a parked request, what is resident; begin() does it for a new one."""
        books = self.cells.residency
        with self.lock:
            if request.sequence is None and request.pin is None and self.cells.shares:
                source, resident = books.lookup(request.ns, request.prompt)
                if source:
                    request.pin = books.pin(source, min(resident, len(request.prompt) - 1))

    def cancel(self, request_id: str) -> None:
        """Stop computing. What is in cells stays and may be exported. No such request: nothing to do."""
        request = self._requests.get(request_id)
        if request is None or request.ended:
            return
        with self.lock:
            self.transfers.cancel(request, exports=False)
            self.cells.unpin(request)
            self.cells.drop_aside(request)
            if request in self._queue:
                self._queue.remove(request)
            if request.was_run:
                self.finish(request, FinishReason.CANCELLED)
            else:
                request.end()

    def release(self, request_id: str) -> None:
        """Forget the request and keep its sequence for others. No such request: nothing to do."""
        self.cancel(request_id)
        with self.lock:
            if request := self._requests.pop(request_id, None):
                self.transfers.cancel(request, exports=True)
                self.cells.drop_aside(request)  # also of one that ended by itself
                if request.sequence:
                    self.cells.release(request.sequence)

    def finish(self, request: Request, reason: FinishReason) -> None:
        self._end(request)
        now_s = time.monotonic()
        self.emit(
            request.id,
            Done(
                reason=reason,
                completion_tokens=request.completion_tokens,
                decode_s=now_s - request.prefilled_s if request.prefilled_s else 0.0,
                kv_tokens=request.sequence.length if request.sequence else 0,
                stop=request.text.stop,
            ),
        )

    def fail(self, request: Request, error: KvctlError) -> None:
        self._end(request)
        self.emit(request.id, Failed(str(error), refused=isinstance(error, RequestError)))

    def _end(self, request: Request) -> None:
        with self.lock:
            request.end()
            self.cells.drop_aside(request)
            if request in self.streams:
                self.streams.remove(request)
