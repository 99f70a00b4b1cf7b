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
from appliance.engine.pace import Pace
from appliance.engine.request import Request
from appliance.engine.roster import Roster
from appliance.engine.transfer import Export, Restore
from appliance.errors import EngineError, KvctlError, RestoreError
from appliance.types import FinishReason, SamplingParams, Tokens

T = TypeVar("T")


OVERTAKEN = 3
"""So many steps in a row compute younger prompts than the oldest, before one computes that: it gets a quarter at least."""
COMPUTED_BLOCKS = 4
"""So many more blocks of a long prompt, and the control process is told that they may be exported."""


@dataclass(frozen=True)
class Work:
    """A request's row in a decode call."""

    request: Request
    row: Row

    @property
    def is_prompt(self) -> bool:
        """Of what has to be there before the next token is chosen."""
        return self.row.start < len(self.request.prompt)


@dataclass(frozen=True)
class Front:
    """A request whose prompt is computed up to `prefill_to` before it is run."""

    request: Request
    reply: Future[int]


class Scheduler:
    def __init__(self, engine: Engine, roster: Roster, pace: Pace) -> None:
        self._engine = engine
        self._roster = roster
        self._cells, self._transfers = roster.cells, roster.transfers
        self._pace = pace
        self._fronts: list[Front] = []
        self._passed_over = 0
        """Steps in a row that computed prompts, but not the oldest."""
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
            if request.ended or request.was_run or any(front.request is request for front in self._fronts):
                raise EngineError("the request runs already, or has ended")
            request.prefill_to = max(0, min(stop, (len(request.prompt) - 1)))
            self._fronts.append(Front(request, reply))
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

    def cancel(self, request_id: str) -> Future[None]:
        return self._post_done(lambda: self._end(request_id, self._roster.cancel))

    def release(self, request_id: str) -> Future[None]:
        return self._post_done(lambda: self._end(request_id, self._roster.release))

    def _end(self, request_id: str, end: Callable[[str], None]) -> None:
        for front in [front for front in self._fronts if front.request.id == request_id]:
            self._end_front(front.request, EngineError("the request was cancelled"))
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
        batch = self._plan()
        self._compute(batch)
        self._answer_fronts()
        with self._wake:  # streams without a row wait for cells that only a command gives back
            return bool(self._commands or batch or self._transfers.pending)

    def _move(self) -> None:
        """Restores bring a first token nearer, so they go before prefill; exports can wait. Neither stalls a stream."""
        shared = any(request.decoding for request in self._roster.streams)
        blocks = self._transfers.slice_blocks(self._step_s if shared else 0.0)
        while self._transfers.restore_slice(blocks) and not shared:
            pass
        if not (shared and self._transfers.resting()):
            self._transfers.export_slice(blocks)

    def _plan(self) -> list[Work]:
        """Every stream that decodes, and of the prompts as much as the pace allows."""
        decoding = [s for s in list(self._roster.streams) if s.decoding and self._roster.has_cell(s)]
        decoding = [stream for stream in decoding if stream.running]  # another one's growth may have preempted it
        return [*(Work(request, _next_row(request)) for request in decoding), *self._prompts(len(decoding))]

    def _prompts(self, n_decoding: int) -> list[Work]:
        """Rows of prompts, shortest first, so that a question after a long context does not wait for another's context.

        The oldest comes first when it was passed over often enough. What a prompt in the batch computes no other one
        computes too: it is adopted in the next step.
        """
        wanting = [*self._roster.streams, *(front.request for front in self._fronts)]
        waiting = [r for r in wanting if r.sequence and not r.decoding and not self._transfers.restoring(r)]
        for request in waiting:
            self._cells.adopt(request)
        waiting = [request for request in waiting if _prompt_end(request) > request.present]
        if not waiting:
            return []
        oldest = min(waiting, key=lambda request: request.number)
        waiting.sort(key=lambda request: (_prompt_end(request) - request.present, request.number))
        if self._passed_over >= OVERTAKEN:
            waiting.sort(key=lambda request: request is not oldest)
        budget = self._pace.prompt_tokens(n_decoding, len(waiting))
        work: list[Work] = []
        for request in waiting:
            if budget > 0 and not any(_computes_for(other, request) for other in work):
                work.append(Work(request, _prefill_row(request, budget)))
                budget -= len(work[-1].row.tokens)
        if work:
            self._passed_over = 0 if any(each.request is oldest for each in work) else self._passed_over + 1
        return work

    def _compute(self, batch: Sequence[Work]) -> None:
        if not batch:
            return
        began_s = time.monotonic()
        for group in self._engine.groups([work.row for work in batch]):
            self._compute_group([batch[index] for index in group])
        self._step_s = time.monotonic() - began_s
        n_decoding = sum(not work.is_prompt for work in batch)
        n_prompt = sum(len(work.row.tokens) for work in batch if work.is_prompt)
        self._pace.saw(n_decoding, n_prompt, self._step_s)

    def _answer_fronts(self) -> None:
        done = [front for front in self._fronts if front.request.sequence]
        for front in [front for front in done if front.request.present >= front.request.prefill_to]:
            self._fronts.remove(front)
            self._cells.adopt(front.request)
            front.reply.set_result(front.request.present)

    def _compute_group(self, batch: Sequence[Work]) -> None:
        """Decode and sample. If the engine refuses a batch, its rows are tried one by one to find the one to blame."""
        began_s = time.monotonic()
        try:
            self._engine.decode([work.row for work in batch])
        except EngineError as error:
            if len(batch) == 1 or self._engine.info.kv_mode is KVMode.NONE:
                for work in batch:  # what a recurrent state had taken in cannot be taken back
                    self._fail(work.request, error)
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
            self._end_front(request, error)

    def _end_front(self, request: Request, error: KvctlError) -> None:
        """The request computes nothing ahead any more, but may still be run."""
        for front in [front for front in self._fronts if front.request is request]:
            self._fronts.remove(front)
            request.prefill_to = 0
            self._cells.drop_aside(request)
            front.reply.set_exception(EngineError(str(error)))

    def _advance(self, work: Work, index: int, elapsed_s: float) -> None:
        """The row of this request was computed."""
        request, sequence, n = work.request, work.request.sequence, len(work.row.tokens)
        assert sequence
        if work.is_prompt:
            self._cells.extend(sequence, n)
            request.prefill_tokens += n
            request.prefill_s += elapsed_s
            if sequence.length < len(request.prompt):
                self._tell_computed(request, sequence.length)
                return
            self._prompt_done(request)
        else:
            self._cells.extend(sequence, n, generated=work.row.tokens.data)
        if request.limit_tokens:
            self._sample(request, index)
        else:
            self._roster.finish(request, FinishReason.LENGTH)

    def _tell_computed(self, request: Request, computed: int) -> None:
        """What is in cells may be exported meanwhile: a crash in a long prompt costs no more than this much."""
        if request.was_run and computed - request.computed >= COMPUTED_BLOCKS * self._engine.info.layout.block_tokens:
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


def _prompt_end(request: Request) -> int:
    """Where the computing of its prompt ends for now."""
    return len(request.prompt) if request.was_run else request.prefill_to


def _prefill_row(request: Request, budget: int) -> Row:
    assert request.sequence
    start, last = request.sequence.length, len(request.prompt) - 1
    # The last token is a row of its own, so that a prompt computed and the same prompt restored give equal logits.
    end = _prompt_end(request)
    stop = min(start + budget, last, end) if start < last else end
    want_logits = stop > last and request.limit_tokens > 0
    return Row(request.sequence.id, start, request.prompt[start:stop], want_logits)


def _computes_for(work: Work, request: Request) -> bool:
    """Whether this row computes what the request needs next and can adopt."""
    other = work.request
    if other.ns != request.ns or not work.is_prompt or work.row.start > request.present:
        return False
    stop = min(work.row.start + len(work.row.tokens), len(other.prompt) - 1, (len(request.prompt) - 1))
    return stop > request.present and other.prompt.common_prefix(request.prompt) > request.present
