"""Continuous batching: which rows the engine computes next.

A step: take commands; admit waiting requests; move a slice of KV; decode every stream and compute of prompts, or of an
embedding, what the pace allows; sample and tell. Invariant: a stream that decodes takes part in every step, unless there
is no cell for it, and what a step does besides is bounded; a step that changes nothing is the last until a command comes.

Threading: `step` and `run` belong to the compute thread, the only one that calls the engine's compute side. Every other
method may be called from any thread and never waits for a decode: it queues a command, answered by a Future.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NoReturn, TypeVar

from appliance.engine.base import Engine, KVMode
from appliance.engine.batch import Batches, Work
from appliance.engine.client import Computed, NewTokens, Prefilled
from appliance.engine.embeddings import Embeddings
from appliance.engine.pace import Pace
from appliance.engine.request import Request
from appliance.engine.roster import Roster
from appliance.engine.transfer import Export, Restore
from appliance.errors import EngineError, KvctlError, RestoreError
from appliance.types import FinishReason, SamplingParams, Tokens

T = TypeVar("T")


COMPUTED_BLOCKS = 4
"""So many more blocks of a long prompt, and the control process is told that they may be exported."""


class Scheduler:
    def __init__(self, engine: Engine, roster: Roster, pace: Pace) -> None:
        self._engine = engine
        self._roster = roster
        self._cells, self._transfers = roster.cells, roster.transfers
        self._batches = Batches(roster, pace)
        self._embeddings = Embeddings(engine, roster.cells, pace)
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

    def prefill(self, request_id: str, stop: int) -> Future[int]:
        """Compute the prompt up to `stop` before it is run; restores from there on are accepted meanwhile."""
        reply: Future[int] = Future()

        def command() -> None:
            request = self._roster.known(request_id)
            if request.ended or request.was_run:
                raise EngineError("the request runs already, or has ended")
            self._batches.add_front(request, stop, reply)
            self._roster.enqueue(request)

        return self._post(command, reply)

    def preempt(self, request_id: str) -> Future[None]:
        """Stop it, if it runs."""

        def command() -> None:
            if request := self._roster.get(request_id):
                self._roster.preempt(request)

        return self._post_done(command)

    def park(self, request_id: str) -> Future[None]:
        return self._post_done(lambda: self._roster.park(self._roster.known(request_id)))

    def export(self, request_id: str, blocks: Sequence[tuple[int, int, int]]) -> Future[None]:
        reply: Future[None] = Future()

        def command() -> None:
            self._transfers.exports.append(Export(self._roster.known(request_id), deque(blocks), reply))

        return self._post(command, reply)

    def embed(self, request_id: str) -> Future[bytes]:
        reply: Future[bytes] = Future()
        return self._post(lambda: self._embeddings.add(self._roster.known(request_id), reply), reply)

    def cancel(self, request_id: str) -> Future[None]:
        return self._post_done(lambda: self._end(request_id, self._roster.cancel))

    def release(self, request_id: str) -> Future[None]:
        return self._post_done(lambda: self._end(request_id, self._roster.release))

    def _end(self, request_id: str, end: Callable[[str], None]) -> None:
        if request := self._roster.get(request_id):
            self._batches.end_front(request, "the request was cancelled")
        end(request_id)

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
        self._embeddings.before(self._roster.streams)
        batch = self._batches.next()
        self._compute(batch)
        self._batches.answer_fronts()
        self._embeddings.after(self._roster.streams, prompts=any(work.is_prompt for work in batch))
        with self._wake:  # streams without a row wait for cells that only a command gives back
            return bool(self._commands or batch or self._transfers.pending or self._embeddings.pending)

    def _move(self) -> None:
        """Restores bring a first token nearer, so they go before prefill. Exports can wait, unless a stream waits for the
        cells that they hold. Neither stalls a stream that has a cell."""
        shared = any(stream.advancing for stream in self._roster.streams)
        urgent = any(stream.stalled for stream in self._roster.streams)
        blocks = self._transfers.slice_blocks(self._step_s if shared else 0.0)
        while self._transfers.restore_slice(blocks) and not shared:
            pass
        if urgent or not (shared and self._transfers.resting()):
            self._transfers.export_slice(blocks)

    def _compute(self, batch: Sequence[Work]) -> None:
        if not batch:
            return
        began_s = time.monotonic()
        for group in self._engine.groups([work.row for work in batch]):
            self._compute_group([batch[index] for index in group])
        self._step_s = time.monotonic() - began_s
        self._batches.took(batch, self._step_s)

    def _compute_group(self, batch: Sequence[Work]) -> None:
        """Decode and sample. If the engine refuses a batch, its rows are tried one by one to find the one to blame."""
        began_s = time.monotonic()
        try:
            self._engine.decode([work.row for work in batch])
        except EngineError as error:
            if self._engine.info.kv_mode in (KVMode.CHECKPOINT, KVMode.NONE):
                for work in batch:  # what a state had taken in cannot be taken back
                    if work.request.sequence:
                        self._cells.lose(work.request.sequence)
                    self._fail(work.request, error)
            elif len(batch) == 1:
                self._fail(batch[0].request, error)
            else:
                for work in batch:
                    self._compute_group([work])
            return
        elapsed_s = time.monotonic() - began_s
        for index, work in enumerate(batch):
            try:
                self._advance(work, index, elapsed_s)
            except KvctlError as error:
                self._fail(work.request, error)

    def _fail(self, request: Request, error: KvctlError) -> None:
        if request.was_run:
            self._roster.fail(request, error)
        else:
            self._batches.end_front(request, str(error))

    def _advance(self, work: Work, index: int, elapsed_s: float) -> None:
        """The row of this request was computed."""
        request, sequence, n = work.request, work.request.sequence, len(work.row.tokens)
        assert sequence
        if work.is_prompt:
            self._cells.extend(sequence, n)
            self._cells.mark_if_due(request)
            request.prefill_tokens += n
            request.prefill_s += elapsed_s
            if sequence.length < len(request.prompt):
                self._tell_computed(request, sequence.length)
                return
            self._prompt_done(request)
        else:
            self._cells.extend(sequence, n, generated=work.row.tokens.data)
            self._cells.mark_if_due(request)
        if request.limit_tokens:
            self._sample(request, index)
        else:
            self._roster.finish(request, FinishReason.LENGTH)

    def _tell_computed(self, request: Request, computed: int) -> None:
        """What is in cells may be exported meanwhile: a crash in a long prompt costs no more than this much.

        With checkpoints each block at once, as the mark at its end may go.
        """
        if every := self._cells.checkpoint_tokens:
            is_due = computed % every == 0
        else:
            is_due = computed - request.computed >= COMPUTED_BLOCKS * self._engine.info.layout.block_tokens
        if request.was_run and is_due:
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
