"""Bring what is stored of a prompt up, ahead of need, because somebody asked for it.

Invariant: at no time do more prefetches run than the bounds say; none of them displaces blocks of requests that run or
wait, nor its own beginning. A prefetch that is given up keeps what it did. Threading: event loop only.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import cast

from appliance.api.control import PrefetchProgress
from appliance.errors import Overloaded, RequestError
from appliance.look import where
from appliance.request import Chunk, Finished, GenerateRequest
from appliance.runtime import Runtime
from appliance.types import BlockId, Namespace, SamplingParams, Tier, Tokens

AT_ONCE = 4
RETRY_AFTER_S = 2.0
POOL_SHARE = 0.75
"""Of the slots, for one prompt."""
PIECE_BLOCKS = 8
HEARTBEAT_S = 1.0


class Prefetches:
    def __init__(self, runtime: Runtime, at_once: int = AT_ONCE) -> None:
        """Half of `at_once` are for one tenant at most."""
        self._runtime = runtime
        self._at_once = at_once
        self._running: Counter[str] = Counter()

    def session(self, ns: Namespace, name: str) -> Tokens:
        """What the next turn of this session begins with. RequestError if this namespace has no such session."""
        tokens = self._runtime.sessions.find(ns, name)
        if tokens is None:
            raise RequestError(
                "no session has this prompt_cache_key, or it was long ago; give messages or a prompt instead",
                param="prompt_cache_key",
                code="session_not_found",
                status=404,
            )
        return tokens

    async def run(
        self, ns: Namespace, tokens: Tokens, *, to: Tier, compute: bool
    ) -> AsyncGenerator[PrefetchProgress, None]:
        """What prefetch() does, within the bounds: Overloaded at the first step beyond. Progress at least each second."""
        own = self._running[ns.tenant]
        if self._running.total() >= self._at_once or own >= self._at_once // 2:
            raise Overloaded(
                f"{own} of your prefetches are running already; try again later", retry_after_s=RETRY_AFTER_S
            )
        self._running[ns.tenant] += 1
        try:
            async with aclosing(_with_heartbeat(prefetch(self._runtime, ns, tokens, to=to, compute=compute))) as steps:
                async for step in steps:
                    yield step
        finally:
            self._running[ns.tenant] -= 1


async def prefetch(
    runtime: Runtime, ns: Namespace, tokens: Tokens, *, to: Tier, compute: bool
) -> AsyncGenerator[PrefetchProgress, None]:
    """Bring what is stored up to `to` (dram or hbm); with `compute`, prefill what no tier has. The last step is done."""
    started_s = time.monotonic()
    resident, lookup = await where(runtime, ns, tokens)
    found = {"hbm": resident} if resident else {}
    found |= {tier.value: count for tier, count in lookup.by_tier(resident).items()}
    if rest := len(tokens) - sum(found.values()):
        found["none"] = rest
    moved_tokens = moved_bytes = computed = 0

    def step(*, done: bool) -> PrefetchProgress:
        return PrefetchProgress(
            prompt_tokens=len(tokens),
            found=found,
            moved_tokens=moved_tokens,
            computed_tokens=computed,
            moved_bytes=moved_bytes,
            seconds=time.monotonic() - started_s,
            done=done,
        )

    yield step(done=False)
    if to is Tier.DRAM and runtime.store.pool is not None:
        hits = lookup.hits[: int(POOL_SHARE * runtime.store.pool.slots)]
        sparing = in_use(runtime).union(hit.block for hit in hits)
        async with aclosing(runtime.prefetched.stage(ns, tokens, hits, sparing)) as runs:
            async for staged in runs:
                runtime.store.unpin(staged)
                if staged.seconds:  # it was not in DRAM yet
                    moved_tokens += sum(hit.use_tokens for hit in staged.hits)
                    moved_bytes += staged.nbytes
                    yield step(done=False)
    for stop in _stops(runtime, len(tokens) - rest, len(tokens) if compute else len(tokens) - rest, to):
        request = GenerateRequest(f"prefetch-{os.urandom(8).hex()}", ns, tokens[:stop], SamplingParams(max_tokens=0))
        async with aclosing(cast(AsyncGenerator[Chunk | Finished, None], runtime.generate(request))) as events:
            (finished,) = [event async for event in events if isinstance(event, Finished)]
        computed += finished.sources.computed
        if to is Tier.HBM:
            moved_tokens += finished.sources.dram + finished.sources.nvme + finished.sources.remote
            moved_bytes += finished.loaded_bytes
        yield step(done=False)
    yield step(done=True)


def _stops(runtime: Runtime, stored: int, tokens: int, to: Tier) -> list[int]:
    """How many leading tokens to have in cells, again and again: what is not stored is computed a few blocks at a time, so
    that it shows how far it is, and gives others their turn in between."""
    piece = PIECE_BLOCKS * runtime.engine.info.layout.block_tokens
    first = stored - stored % piece + piece
    needed = tokens > stored or (to is Tier.HBM and tokens > 0)
    return [*range(first, tokens, piece), tokens] if needed else []


def in_use(runtime: Runtime) -> set[BlockId]:
    """Stored blocks of the requests that run or wait."""
    return {hit.block for ns, prompt in runtime.in_use() for hit in runtime.store.lookup(ns, prompt).hits}


async def _with_heartbeat(steps: AsyncIterator[PrefetchProgress]) -> AsyncGenerator[PrefetchProgress, None]:
    """The steps, the last one repeated each second while nothing new comes: a prefill is silent for minutes."""
    latest: PrefetchProgress | None = None
    iterator = aiter(steps)
    pending = asyncio.ensure_future(anext(iterator, None))
    try:
        while True:
            done, _ = await asyncio.wait({pending}, timeout=HEARTBEAT_S)
            if done:
                latest = pending.result()
                if latest is None:
                    return
                pending = asyncio.ensure_future(anext(iterator, None))
            elif latest is not None:
                latest = latest.model_copy(update={"seconds": latest.seconds + HEARTBEAT_S})
            if latest is not None:
                yield latest
    finally:
        pending.cancel()
        await asyncio.gather(pending, return_exceptions=True)
