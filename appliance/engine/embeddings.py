"""Embeddings of prompts, computed a chunk a step beside everything else.

Invariant: a job belongs to an admitted request; at most one chunk is computed a step, of the time that the pace gives to
prompts, in turns with them, so no stream waits longer for it than for a prefill. What it computed is forgotten with it.
Threading: compute thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from appliance.engine.base import Engine, Pooling, Row
from appliance.engine.cells import Cells
from appliance.engine.pace import Pace
from appliance.engine.request import Request
from appliance.errors import EngineError, KvctlError

CHUNK_TOKENS = 64
"""An engine may keep the logits of every token of a chunk: few tokens, small buffers."""


@dataclass(eq=False)
class _Job:
    request: Request
    reply: Future[bytes]
    total: NDArray[np.float64]
    """Of the vectors so far."""
    computed: int = 0
    """Tokens in it."""


class Embeddings:
    def __init__(self, engine: Engine, cells: Cells, pace: Pace) -> None:
        self._engine = engine
        self._cells = cells
        self._pace = pace
        self._jobs: deque[_Job] = deque()
        self._goes_first = False

    @property
    def pending(self) -> bool:
        return bool(self._jobs)

    def add(self, request: Request, reply: Future[bytes]) -> None:
        """The reply is the unit vector, as f32le. `request` was admitted, and is not run."""
        if request.sequence is None or request.sampling or request.ended:
            raise EngineError("only a request that has cells, and was neither run nor cancelled, can be embedded")
        self._jobs.append(_Job(request, reply, np.zeros(self._engine.info.embedding_width)))

    def before(self, streams: Sequence[Request]) -> None:
        """Ahead of a step's batch: it is an embedding's turn if prompts had the last."""
        if self._goes_first:
            self._step(streams)

    def after(self, streams: Sequence[Request], *, prompts: bool) -> None:
        """Behind a step's batch, in which there were `prompts` or not."""
        if not self._goes_first:
            self._step(streams)
        self._goes_first |= prompts

    def _step(self, streams: Sequence[Request]) -> None:
        """One chunk of the job that came first, if the pace allows it."""
        n_decoding = sum(stream.advancing for stream in streams)
        most_tokens = min(CHUNK_TOKENS, self._pace.prompt_tokens(n_decoding, 1)) if self._jobs else 0
        if not most_tokens:
            return
        job, began_s = self._jobs[0], time.monotonic()
        self._goes_first = False
        try:
            if self._advance(job, most_tokens):
                self._end(job)
                job.reply.set_result(_unit(job.total).astype("<f4").tobytes())
        except KvctlError as error:
            self._end(job)
            job.reply.set_exception(error)
        if n_decoding:
            self._pace.spent(time.monotonic() - began_s)

    def _end(self, job: _Job) -> None:
        if job in self._jobs:
            self._jobs.remove(job)
            if job.request.sequence and not job.request.ended:
                self._cells.truncate(job.request.sequence, 0)
            job.request.end()

    def _advance(self, job: _Job, most_tokens: int) -> bool:
        """True when the whole prompt is in."""
        sequence, prompt = job.request.sequence, job.request.prompt
        start = job.computed
        if job.request.ended or sequence is None or sequence.length != start:
            raise EngineError("the request was cancelled, or its cells hold something else")
        tokens = prompt[start : start + most_tokens]
        vectors = self._engine.embed(Row(sequence.id, start, tokens, want_logits=False))
        self._cells.extend(sequence, len(tokens))
        job.computed = stop = start + len(tokens)
        pooling = self._engine.info.pooling
        if pooling is Pooling.MEAN:
            job.total += vectors.sum(axis=0, dtype=np.float64)
        elif pooling is Pooling.FIRST and start == 0:
            job.total += vectors[0]
        elif pooling is Pooling.LAST and stop == len(prompt):
            job.total += vectors[-1]
        return stop == len(prompt)


def _unit(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    length = float(np.linalg.norm(vector))
    if not np.isfinite(length):
        raise EngineError("the model's embedding of this text is not finite")
    return vector / length if length else vector
