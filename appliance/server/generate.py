"""One API call as generations: several choices run side by side, and their counts add up to one usage.

A prompt is read once: its first choice goes ahead, the others start when its KV exists. Invariant: closing the event
stream closes every generation. Event loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, cast

from appliance.api.answers import DecisionTaken, Explanation, LlamaTimings, PromptTokensDetails, Usage, Way
from appliance.errors import Overloaded
from appliance.runtime import Chunk, Finished, GenerateRequest, Runtime
from appliance.server.metrics import Metrics
from appliance.types import FinishReason

Events = AsyncGenerator[tuple[int, Chunk | Finished], None]
"""(choice index, event)"""


@dataclass(frozen=True)
class Batch:
    """Choices in index order: the n choices of the first prompt, then those of the next."""

    requests: Sequence[GenerateRequest]
    per_prompt: int

    def leads(self, index: int) -> bool:
        return index % self.per_prompt == 0


async def generate(runtime: Runtime, metrics: Metrics, batch: Batch) -> Events:
    if len(batch.requests) == 1:  # the common case needs no tasks
        async with aclosing(_counted(runtime, metrics, batch.requests[0])) as stream:
            async for event in stream:
                yield 0, event
        return
    streams = [_counted(runtime, metrics, request) for request in batch.requests]
    pending: dict[asyncio.Future[Chunk | Finished], int] = {}

    def advance(index: int) -> None:
        pending[asyncio.ensure_future(anext(streams[index]))] = index

    for index in range(0, len(streams), batch.per_prompt):
        advance(index)
    begun: set[int] = set()
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                index = pending.pop(future)
                event = future.result()
                if batch.leads(index) and index not in begun:
                    begun.add(index)
                    for follower in range(index + 1, index + batch.per_prompt):
                        advance(follower)
                if not isinstance(event, Finished):
                    advance(index)
                yield index, event
    finally:
        for future in pending:
            future.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


async def _counted(
    runtime: Runtime, metrics: Metrics, request: GenerateRequest
) -> AsyncGenerator[Chunk | Finished, None]:
    """The runtime's events; exactly one outcome is counted, and the last event is Finished."""
    source = cast(AsyncGenerator[Chunk | Finished, None], runtime.generate(request))
    ended = False
    try:
        async with aclosing(source):
            async for event in source:
                if isinstance(event, Finished):
                    ended = True
                    metrics.finished(event)
                    if event.reason is FinishReason.CANCELLED:
                        raise Overloaded(
                            "the appliance is stopping: the answer is incomplete", retry_after_s=10, status=503
                        )
                yield event
    except Exception as error:
        if not ended:
            ended = True
            metrics.failed(error)
        raise
    finally:
        if not ended:
            metrics.cancelled()


@dataclass
class Tally:
    """Counts of one API call, from the Finished of its choices."""

    batch: Batch
    finished: dict[int, Finished] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return len(self.finished) == len(self.batch.requests)

    @property
    def _leaders(self) -> list[Finished]:
        return [finished for index, finished in sorted(self.finished.items()) if self.batch.leads(index)]

    @property
    def _completion_tokens(self) -> int:
        return sum(finished.completion_tokens for finished in self.finished.values())

    def usage(self) -> Usage:
        """A prompt counts once, however many choices it has."""
        prompt = sum(finished.sources.total for finished in self._leaders)
        completion = self._completion_tokens
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(f.sources.cached for f in self._leaders)),
        )

    def timings(self) -> LlamaTimings:
        """Choices run side by side: counts add up, times are those of the slowest."""
        prompt_n = sum(f.sources.computed for f in self._leaders)
        prompt_ms = max(f.timings.prompt_ms for f in self._leaders)
        predicted_n = self._completion_tokens
        predicted_ms = max(f.timings.predicted_ms for f in self.finished.values())
        return LlamaTimings(
            cache_n=sum(f.sources.cached for f in self._leaders),
            prompt_n=prompt_n,
            prompt_ms=prompt_ms,
            prompt_per_token_ms=_ratio(prompt_ms, prompt_n),
            prompt_per_second=_ratio(1000 * prompt_n, prompt_ms),
            predicted_n=predicted_n,
            predicted_ms=predicted_ms,
            predicted_per_token_ms=_ratio(predicted_ms, predicted_n),
            predicted_per_second=_ratio(1000 * predicted_n, predicted_ms),
        )

    def extras(self, *, explain: bool) -> dict[str, Any]:
        """What every API's answer has besides its own: timings, and the kvctl object if it was asked for."""
        explained = {"kvctl": self._explanation()} if explain else {}
        return {"timings": self.timings(), **explained}

    def _explanation(self) -> Explanation:
        sources = ("hbm", "dram", "nvme", "remote", "computed")
        times = ("queue", "staged_ahead", "load", "compute", "service", "prompt", "predicted", "paused", "ttft")
        return Explanation(
            tokens={name: sum(getattr(f.sources, name) for f in self._leaders) for name in sources},
            timings_ms={name: max(getattr(f.timings, f"{name}_ms") for f in self._leaders) for name in times},
            decisions=[
                _decision(self.batch.requests[index].request_id, finished)
                for index, finished in sorted(self.finished.items())
                if self.batch.leads(index)
            ],
        )


def _decision(request_id: str, finished: Finished) -> DecisionTaken:
    decision = finished.decision
    return DecisionTaken(
        request=request_id,
        reason=decision.reason,
        load_to_tokens=decision.load_to,
        estimated_ms=1000 * decision.chosen.total_s,
        actual_ms=finished.timings.prompt_ms,
        recompute_ms=1000 * decision.recompute.total_s,
        alternatives={
            reason: Way(
                load_to_tokens=way.load_to,
                compute_first_tokens=way.front_to,
                load_ms=1000 * way.load_s,
                compute_ms=1000 * way.compute_s,
                total_ms=1000 * way.total_s,
            )
            for reason, way in decision.alternatives.items()
        },
    )


def _ratio(amount: float, per: float) -> float | None:
    return amount / per if per else None
