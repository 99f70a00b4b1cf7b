"""What the next step computes: a row of every stream that decodes, and of the prompts what the pace allows.

Invariant: a batch holds at most one row of a request, and no token that another row of it computes too and that could be
adopted. Threading: compute thread only.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from appliance.engine.base import Row
from appliance.engine.pace import Pace
from appliance.engine.request import Request
from appliance.engine.roster import Roster
from appliance.errors import EngineError
from appliance.types import Tokens

OVERTAKEN = 3
"""So many steps in a row compute younger prompts than the oldest, before one computes that: it gets a quarter at least."""


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


class Batches:
    def __init__(self, roster: Roster, pace: Pace) -> None:
        self._roster = roster
        self._cells, self._transfers = roster.cells, roster.transfers
        self._pace = pace
        self._fronts: list[Front] = []
        self._passed_over = 0
        """Steps in a row that computed prompts, but not the oldest."""

    def next(self) -> list[Work]:
        """Every stream that decodes and has a cell, and of the prompts as much as the pace allows."""
        for stream in list(self._roster.streams):
            stream.stalled = stream.decoding and not self._roster.has_cell(stream)
        decoding = [stream for stream in self._roster.streams if stream.advancing]  # growth may have preempted some
        return [*(Work(request, _next_row(request)) for request in decoding), *self._prompts(len(decoding))]

    def _prompts(self, n_decoding: int) -> list[Work]:
        """Rows of prompts, shortest first, so that a question after a long context does not wait for another's context.

        The oldest comes first when it was passed over often enough. What a prompt in the batch computes no other one
        computes too: it is adopted in the next step.
        """
        fronts = [front.request for front in self._fronts if not front.request.was_run]
        wanting = [*self._roster.streams, *fronts]
        waiting = [r for r in wanting if r.sequence and not r.decoding and not self._transfers.restoring(r)]
        budget = self._pace.prompt_tokens(n_decoding, len(waiting)) if waiting else 0
        if budget <= 0:
            return []
        for request in waiting:
            self._cells.adopt(request)
        waiting = [request for request in waiting if _prompt_end(request) > request.present]
        if not waiting:
            return []
        oldest = min(waiting, key=lambda request: request.number)
        waiting.sort(key=lambda request: (_prompt_end(request) - request.present, request.number))
        if self._passed_over >= OVERTAKEN:
            waiting.sort(key=lambda request: request is not oldest)
        work: list[Work] = []
        every = self._cells.checkpoint_tokens
        for request in waiting:
            if budget > 0 and not any(_computes_for(other, request, every) for other in work):
                work.append(Work(request, _prefill_row(request, budget, every)))
                budget -= len(work[-1].row.tokens)
        if work:
            self._passed_over = 0 if any(each.request is oldest for each in work) else self._passed_over + 1
        return work

    def took(self, batch: Sequence[Work], seconds: float) -> None:
        """The batch was computed."""
        n_decoding = sum(not work.is_prompt for work in batch)
        n_prompt = sum(len(work.row.tokens) for work in batch if work.is_prompt)
        self._pace.saw(n_decoding, n_prompt, seconds)

    # --- prompts computed before they are run -------------------------------------------------------------------

    def add_front(self, request: Request, stop: int, reply: Future[int]) -> None:
        """Compute the prompt up to `stop`, then answer with the tokens present. One at a time for a request."""
        if any(front.request is request for front in self._fronts):
            raise EngineError("the front of this prompt is being computed")
        request.prefill_to = max(0, min(stop, len(request.prompt) - 1))
        self._fronts.append(Front(request, reply))

    def answer_fronts(self) -> None:
        done = [front for front in self._fronts if front.request.sequence]
        for front in [front for front in done if front.request.present >= front.request.prefill_to]:
            self._fronts.remove(front)
            if not front.request.was_run:  # else its last token may be decoded by now
                self._cells.adopt(front.request)
            front.reply.set_result(front.request.present)

    def end_front(self, request: Request, why: str) -> None:
        """The request computes nothing ahead any more, but may still be run."""
        for front in [front for front in self._fronts if front.request is request]:
            self._fronts.remove(front)
            request.prefill_to = 0
            self._cells.drop_aside(request)
            front.reply.set_exception(EngineError(why))


def _next_row(request: Request) -> Row:
    assert request.sequence and request.next_token is not None
    return Row(request.sequence.id, request.sequence.length, Tokens.of((request.next_token,)), want_logits=True)


def _prompt_end(request: Request) -> int:
    """Where the computing of its prompt ends for now."""
    return len(request.prompt) if request.was_run else request.prefill_to


def _prefill_row(request: Request, budget: int, checkpoint_tokens: int) -> Row:
    assert request.sequence
    start, last = request.sequence.length, len(request.prompt) - 1
    # The last token is a row of its own, so that a prompt computed and the same prompt restored give equal logits.
    end = _prompt_end(request)
    if request.aside:
        end = min(end, request.aside.start)
    if checkpoint_tokens:  # its state is kept there
        budget = min(budget, checkpoint_tokens - start % checkpoint_tokens)
    stop = min(start + budget, last, end) if start < last else end
    want_logits = stop > last and request.limit_tokens > 0
    return Row(request.sequence.id, start, request.prompt[start:stop], want_logits)


def _computes_for(work: Work, request: Request, checkpoint_tokens: int) -> bool:
    """Whether this row computes what the request needs next and can adopt."""
    other = work.request
    if other.ns != request.ns or not work.is_prompt:
        return False
    if checkpoint_tokens:
        start = work.row.start
        mark = min(start - start % checkpoint_tokens + checkpoint_tokens, len(other.prompt) - 1)
        return request.present < mark < len(request.prompt) and other.prompt.common_prefix(request.prompt) >= mark
    if work.row.start > request.present:
        return False
    stop = min(work.row.start + len(work.row.tokens), len(other.prompt) - 1, (len(request.prompt) - 1))
    return stop > request.present and other.prompt.common_prefix(request.prompt) > request.present
