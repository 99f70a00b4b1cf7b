"""Continuous batching: which rows the engine computes next, and for whom cells are made free.

A step: take commands; admit waiting requests, first come first served; move a slice of KV; decode every running stream
and prefill with what budget is left; sample and tell. Invariant: free cells >= what admitted requests may still need,
so a request that was admitted never fails for want of cells, and a request that could never fit is refused at begin.

Threading: `step` and `run` belong to the compute thread, the only one that calls the engine's compute side. Every other
method may be called from any thread and never waits for a decode: commands are queued and answered by a Future, and
`begin` and `stats` only read the books. The lock guards books, requests and commands, and is not held while the
engine computes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from appliance.engine.base import Engine, Row
from appliance.engine.cells import Cells
from appliance.engine.client import Done, Event, NewTokens, Prefilled
from appliance.engine.detok import TextStream
from appliance.engine.protocol import EngineStats
from appliance.engine.request import Failed, Request
from appliance.engine.transfer import SHARED_SLICE_BLOCKS, SLICE_BLOCKS, Export, Restore, SlotView, Transfers
from appliance.errors import EngineError, KvctlError, RequestError, RestoreError
from appliance.types import FinishReason, SamplingParams, Tokens

Emit = Callable[[str, Event | Failed], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """A request's row in a decode call."""

    request: Request
    row: Row


class Scheduler:
    def __init__(
        self, engine: Engine, *, batch_tokens: int, shared_batch_tokens: int, slot: SlotView, emit: Emit
    ) -> None:
        self._engine = engine
        self._batch_tokens = batch_tokens
        self._shared_batch_tokens = shared_batch_tokens
        self._emit = emit
        self._lock = threading.RLock()
        self._wake = threading.Condition(self._lock)
        self._commands: deque[Callable[[], None]] = deque()
        self._requests: dict[str, Request] = {}
        self._queue: deque[Request] = deque()
        """Waiting for admission, first come first served."""
        self._streams: list[Request] = []
        """Running, in the order they were admitted to run."""
        self._stopped = False
        self._cells = Cells(engine, self._lock)
        self._transfers = Transfers(engine, self._cells, slot)

    # --- calls, any thread --------------------------------------------------------------------------------------

    def begin(self, request_id: str, ns: bytes, tokens: Tokens, reserve_tokens: int) -> int:
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
        books = self._cells.residency
        with self._lock:
            if request_id in self._requests:
                raise EngineError("a request of this id exists")
            source, resident = books.lookup(ns, tokens) if self._cells.shares else (None, 0)
            pin = books.pin(source, min(resident, len(tokens) - 1)) if source else None
            self._requests[request_id] = Request(request_id, ns, tokens, reserve_tokens, pin)
            return resident

    def restore(self, request_id: str, start: int, blocks: Sequence[tuple[int, int, int]]) -> Future[int]:
        reply: Future[int] = Future()

        def command() -> None:
            request = self._known(request_id)
            if request.ended or request.sampling:
                raise RestoreError("the request runs already, or has ended")
            self._transfers.restores.append(Restore(request, start, deque(blocks), reply))
            self._enqueue(request)

        return self._post(command, reply)

    def run_request(self, request_id: str, sampling: SamplingParams) -> Future[None]:
        reply: Future[None] = Future()

        def command() -> None:
            request = self._known(request_id)
            if request.sampling:
                raise EngineError("the request was run before")
            reply.set_result(None)
            request.sampling, request.text = sampling, TextStream(sampling.stop)
            if request.ended:
                self._finish(request, FinishReason.CANCELLED)
            elif request.sequence:
                self._start(request)
            else:
                self._enqueue(request)

        return self._post(command, reply)

    def export(self, request_id: str, blocks: Sequence[tuple[int, int, int]]) -> Future[None]:
        reply: Future[None] = Future()
        return self._post(
            lambda: self._transfers.exports.append(Export(self._known(request_id), deque(blocks), reply)), reply
        )

    def cancel(self, request_id: str) -> Future[None]:
        """Stop computing. What is in cells stays and may be exported. No such request: nothing to do."""

        def command() -> None:
            if request := self._requests.get(request_id):
                self._cancel(request)

        return self._post_done(command)

    def release(self, request_id: str) -> Future[None]:
        """Forget the request and keep its sequence for others. No such request: nothing to do."""

        def command() -> None:
            if request := self._requests.pop(request_id, None):
                self._cancel(request)
                self._transfers.cancel(request, exports=True)
                if request.sequence:
                    self._cells.release(request.sequence)

        return self._post_done(command)

    def evict(self) -> Future[int]:
        reply: Future[int] = Future()
        return self._post(lambda: reply.set_result(self._cells.evict_all()), reply)

    def stats(self) -> EngineStats:
        books = self._cells.residency
        with self._lock:
            return EngineStats(
                cells_total=books.cells,
                cells_used=books.used,
                cells_pinned=books.held_cells(),
                sequences_resident=len(books),
                requests_running=len(self._streams),
                requests_waiting=len(self._queue),
                resident_evictions=self._cells.evictions,
            )

    def stop(self) -> None:
        """Make run() return when it has nothing left to do."""
        with self._lock:
            self._stopped = True
            self._wake.notify()

    def _post(self, command: Callable[[], None], reply: Future[T]) -> Future[T]:
        def guarded() -> None:
            try:
                command()
            except KvctlError as error:
                reply.set_exception(error)

        with self._lock:
            self._commands.append(guarded)
            self._wake.notify()
        return reply

    def _post_done(self, command: Callable[[], None]) -> Future[None]:
        reply: Future[None] = Future()

        def then_reply() -> None:
            command()
            reply.set_result(None)

        return self._post(then_reply, reply)

    # --- loop, compute thread -----------------------------------------------------------------------------------

    def run(self) -> None:
        """Step while there is something to do, sleep while there is not."""
        while True:
            with self._lock:
                while not self._commands:
                    if self._stopped:
                        return
                    self._cells.residency.check_integrity()
                    self._wake.wait()
            while self.step():
                pass

    def step(self) -> bool:
        """One round. False when nothing is left to do until the next command."""
        with self._lock:
            while self._commands:
                self._commands.popleft()()
            self._admit()
        self._move()
        self._compute(self._plan())
        with self._lock:
            return bool(self._commands or self._streams or self._transfers.pending)

    def _move(self) -> None:
        """Restores bring a first token nearer, so they go before prefill; exports can wait. Neither stalls a stream."""
        shared = any(request.decoding for request in self._streams)
        blocks = SHARED_SLICE_BLOCKS if shared else SLICE_BLOCKS
        while self._transfers.restore_slice(blocks) and not shared:
            pass
        self._transfers.export_slice(blocks)

    def _plan(self) -> list[Work]:
        """Every decoding stream, then prefill up to the budget, first come first served."""
        batch = [Work(request, _next_row(request)) for request in self._streams if request.decoding]
        budget = self._batch_tokens
        if batch:
            budget = min(self._shared_batch_tokens, self._batch_tokens - len(batch))
        for request in self._streams:
            if budget > 0 and not request.decoding and not self._transfers.restoring(request):
                self._cells.adopt(request)
                work = Work(request, _prefill_row(request, budget))
                budget -= len(work.row.tokens)
                batch.append(work)
        return batch

    def _compute(self, batch: Sequence[Work]) -> None:
        """Decode and sample. If the engine refuses a batch, its rows are tried one by one to find the one to blame."""
        if not batch:
            return
        began_s = time.monotonic()
        try:
            self._engine.decode([work.row for work in batch])
        except EngineError as error:
            if len(batch) == 1:
                self._fail(batch[0].request, error)
            else:
                for work in batch:
                    self._compute([work])
            return
        elapsed_s = time.monotonic() - began_s
        for index, work in enumerate(batch):
            try:
                self._advance(work, index, elapsed_s)
            except KvctlError as error:
                self._fail(work.request, error)

    def _advance(self, work: Work, index: int, elapsed_s: float) -> None:
        """The row of this request was computed."""
        request, sequence, n = work.request, work.request.sequence, len(work.row.tokens)
        assert sequence
        if request.decoding:
            self._cells.extend(sequence, n, generated=work.row.tokens.data)
        else:
            self._cells.extend(sequence, n)
            request.prefill_tokens += n
            request.prefill_s += elapsed_s
            if sequence.length < len(request.prompt):
                return
            self._prompt_done(request)
        if request.limit_tokens:
            self._sample(request, index)
        else:
            self._finish(request, FinishReason.LENGTH)

    def _prompt_done(self, request: Request) -> None:
        request.prefilled_s = time.monotonic()
        queue_s = request.admitted_s - request.queued_s
        self._emit(request.id, Prefilled(request.prefill_tokens, request.prefill_s, queue_s, request.restore_s))

    def _sample(self, request: Request, index: int) -> None:
        assert request.sampler and request.sampling
        sampled = request.sampler.sample(index)
        if sampled.is_end and not request.sampling.ignore_eos:
            if text := request.text.finish():
                self._emit(request.id, NewTokens(Tokens(), text))
            self._finish(request, FinishReason.STOP)
            return
        request.next_token = sampled.token
        request.completion_tokens += 1
        text = request.text.feed(self._engine.piece(sampled.token))
        at_limit = request.completion_tokens == request.limit_tokens
        if at_limit and not request.text.stopped:
            text += request.text.finish()
        logprobs = (sampled.logprob,) if sampled.logprob else ()
        self._emit(request.id, NewTokens(Tokens.of((sampled.token,)), text, logprobs))
        if request.text.stopped:
            self._finish(request, FinishReason.STOP)
        elif at_limit:
            self._finish(request, FinishReason.LENGTH)

    # --- life of a request, compute thread ----------------------------------------------------------------------

    def _known(self, request_id: str) -> Request:
        request = self._requests.get(request_id)
        if request is None:
            raise EngineError("no such request")
        return request

    def _enqueue(self, request: Request) -> None:
        if request.sequence is None and request not in self._queue:
            request.queued_s = time.monotonic()
            self._queue.append(request)

    def _admit(self) -> None:
        while self._queue:
            outstanding = sum(request.outstanding for request in self._requests.values())
            request = self._queue[0]
            if not self._cells.admit(request, outstanding):
                if any(other.sequence for other in self._requests.values()):
                    return  # its release will make room
                for other in self._requests.values():
                    if other is not request:  # nothing but pins of requests that wait stands in the way
                        self._cells.unpin(other)
                admitted = self._cells.admit(request, outstanding)
                assert admitted, "begin refuses what could never fit"
            self._queue.popleft()
            request.admitted_s = time.monotonic()
            if request.sampling:
                self._start(request)

    def _start(self, request: Request) -> None:
        """Admitted and run: from now on it takes part in steps."""
        assert request.sampling
        try:
            if request.sampling.max_tokens:
                request.sampler = self._engine.new_sampler(request.sampling, request.prompt)
        except KvctlError as error:
            self._fail(request, error)
        else:
            self._streams.append(request)

    def _cancel(self, request: Request) -> None:
        if request.ended:
            return
        self._transfers.cancel(request, exports=False)
        self._cells.unpin(request)
        if request in self._queue:
            self._queue.remove(request)
        if request.sampling:
            self._finish(request, FinishReason.CANCELLED)
        request.ended = True

    def _finish(self, request: Request, reason: FinishReason) -> None:
        self._end(request)
        now_s = time.monotonic()
        self._emit(
            request.id,
            Done(
                reason=reason,
                prompt_tokens=len(request.prompt),
                completion_tokens=request.completion_tokens,
                decode_s=now_s - request.prefilled_s if request.prefilled_s else 0.0,
                kv_tokens=request.sequence.length if request.sequence else 0,
            ),
        )

    def _fail(self, request: Request, error: KvctlError) -> None:
        self._end(request)
        self._emit(request.id, Failed(str(error)))

    def _end(self, request: Request) -> None:
        request.end()
        if request in self._streams:
            self._streams.remove(request)


def _next_row(request: Request) -> Row:
    assert request.sequence and request.next_token is not None
    return Row(request.sequence.id, request.sequence.length, Tokens.of((request.next_token,)), want_logits=True)


def _prefill_row(request: Request, budget: int) -> Row:
    assert request.sequence
    start, n = request.sequence.length, len(request.prompt)
    # The last token is a row of its own, so that a prompt computed and the same prompt restored give equal logits.
    stop = min(start + budget, n - 1) if start < n - 1 else n
    want_logits = stop == n and request.limit_tokens > 0
    return Row(request.sequence.id, start, request.prompt[start:stop], want_logits)
