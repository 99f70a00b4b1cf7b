"""Continuous batching: which rows the engine computes next.

A step: take commands; admit waiting requests; move a slice of KV; decode every running stream and prefill with what
budget is left; sample and tell. Invariant: a stream that decodes takes part in every step, and what a step does
besides is bounded.

Threading: `step` and `run` belong to the compute thread, the only one that calls the engine's compute side. Every other
method may be called from any thread and never waits for a decode: it queues a command, answered by a Future.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from appliance.engine.base import Engine, KVMode, Row
from appliance.engine.client import Computed, NewTokens, Prefilled
from appliance.engine.request import Request
from appliance.engine.roster import Roster
from appliance.engine.transfer import Export, Restore
from appliance.errors import EngineError, KvctlError, RestoreError
from appliance.types import FinishReason, SamplingParams, Tokens

T = TypeVar("T")

COMPUTED_BLOCKS = 4
"""So many more blocks of a long prompt, and the control process is told that they may be exported."""


@dataclass(frozen=True)
class Work:
    """A request's row in a decode call."""

    request: Request
    row: Row


class Scheduler:
    def __init__(self, engine: Engine, roster: Roster, *, batch_tokens: int, shared_batch_tokens: int) -> None:
        self._engine = engine
        self._roster = roster
        self._cells, self._transfers = roster.cells, roster.transfers
        self._batch_tokens = batch_tokens
        self._shared_batch_tokens = shared_batch_tokens
        self._wake = threading.Condition(roster.lock)
        self._commands: deque[Callable[[], None]] = deque()
        self._step_s = 0.0
        """What the last decode took."""

    # --- commands, any thread -----------------------------------------------------------------------------------

    def restore(self, request_id: str, start: int, blocks: Sequence[tuple[int, int, int]]) -> Future[int]:
        reply: Future[int] = Future()

        def command() -> None:
            request = self._roster.known(request_id)
            if request.ended or request.was_run:
                raise RestoreError("the request runs already, or has ended")
            if request.preempted:
                self._roster.pin(request)
            self._transfers.restores.append(Restore(request, start, deque(blocks), reply))
            self._roster.enqueue(request)

        return self._post(command, reply)

    def run_request(self, request_id: str, sampling: SamplingParams) -> Future[None]:
        reply: Future[None] = Future()

        def command() -> None:
            request = self._roster.known(request_id)
            if request.was_run:
                raise EngineError("the request was run before")
            reply.set_result(None)
            self._roster.run(request, sampling)

        return self._post(command, reply)

    def preempt(self, request_id: str) -> Future[None]:
        return self._post_done(lambda: self._roster.preempt(request_id))

    def park(self, request_id: str) -> Future[None]:
        return self._post_done(lambda: self._roster.park(request_id))

    def export(self, request_id: str, blocks: Sequence[tuple[int, int, int]]) -> Future[None]:
        reply: Future[None] = Future()

        def command() -> None:
            self._transfers.exports.append(Export(self._roster.known(request_id), deque(blocks), reply))

        return self._post(command, reply)

    def cancel(self, request_id: str) -> Future[None]:
        return self._post_done(lambda: self._roster.cancel(request_id))

    def release(self, request_id: str) -> Future[None]:
        return self._post_done(lambda: self._roster.release(request_id))

    def evict(self) -> Future[int]:
        reply: Future[int] = Future()
        return self._post(lambda: reply.set_result(self._cells.evict_all()), reply)

    def _post(self, command: Callable[[], None], reply: Future[T]) -> Future[T]:
        def guarded() -> None:
            try:
                command()
            except KvctlError as error:
                reply.set_exception(error)

        with self._wake:
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

    def run(self) -> NoReturn:
        """Step while there is something to do, sleep while there is not."""
        while True:
            with self._wake:
                while not self._commands:
                    self._cells.residency.check_integrity()
                    self._wake.wait()
            while self.step():
                pass

    def step(self) -> bool:
        """One round. False when nothing is left to do until the next command."""
        with self._wake:
            while self._commands:
                self._commands.popleft()()
        self._roster.admit()
        self._move()
        self._compute(self._plan())
        with self._wake:
            return bool(self._commands or self._roster.streams or self._transfers.pending)

    def _move(self) -> None:
        """Restores bring a first token nearer, so they go before prefill; exports can wait. Neither stalls a stream."""
        shared = any(request.decoding for request in self._roster.streams)
        blocks = self._transfers.slice_blocks(self._step_s if shared else 0.0)
        while self._transfers.restore_slice(blocks) and not shared:
            pass
        if not (shared and self._transfers.resting()):
            self._transfers.export_slice(blocks)

    def _plan(self) -> list[Work]:
        """Every decoding stream, then prefill up to the budget, first come first served."""
        batch = [Work(request, _next_row(request)) for request in self._roster.streams if request.decoding]
        budget = self._batch_tokens
        if batch:
            budget = min(self._shared_batch_tokens, self._batch_tokens - len(batch))
        for request in self._roster.streams:
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
            if len(batch) == 1 or self._engine.info.kv_mode is KVMode.NONE:
                for work in batch:  # what a recurrent state had taken in cannot be taken back
                    self._roster.fail(work.request, error)
            else:
                for work in batch:
                    self._compute([work])
            return
        self._step_s = elapsed_s = time.monotonic() - began_s
        for index, work in enumerate(batch):
            try:
                self._advance(work, index, elapsed_s)
            except KvctlError as error:
                self._roster.fail(work.request, error)

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
                self._tell_computed(request, sequence.length)
                return
            self._prompt_done(request)
        if request.limit_tokens:
            self._sample(request, index)
        else:
            self._roster.finish(request, FinishReason.LENGTH)

    def _tell_computed(self, request: Request, computed: int) -> None:
        if computed - request.computed >= COMPUTED_BLOCKS * self._engine.info.layout.block_tokens:
            request.computed = computed
            self._roster.emit(request.id, Computed(computed))

    def _prompt_done(self, request: Request) -> None:
        if request.resumed_tokens:
            return  # the prompt was complete before
        request.prefilled_s = time.monotonic()
        self._roster.emit(request.id, Prefilled(request.prefill_tokens, request.prefill_s))

    def _sample(self, request: Request, index: int) -> None:
        assert request.sampler and request.sampling
        sampled = request.sampler.sample(index)
        if sampled.is_end and not request.sampling.ignore_eos:
            if text := request.text.finish():
                self._roster.emit(request.id, NewTokens(Tokens(), text))
            self._roster.finish(request, FinishReason.STOP)
            return
        request.next_token = sampled.token
        request.completion_tokens += 1
        text = request.text.feed(self._engine.piece(sampled.token))
        at_limit = request.completion_tokens == request.limit_tokens
        if at_limit and not request.text.stopped:
            text += request.text.finish()
        logprobs = (sampled.logprob,) if sampled.logprob else ()
        self._roster.emit(request.id, NewTokens(Tokens.of((sampled.token,)), text, logprobs))
        if request.text.stopped:
            self._roster.finish(request, FinishReason.STOP)
        elif at_limit:
            self._roster.finish(request, FinishReason.LENGTH)


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
