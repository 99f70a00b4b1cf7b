"""Bring what is stored of a prompt up, ahead of need.

Threading: event loop only.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from appliance.look import where
from appliance.request import Finished, GenerateRequest
from appliance.runtime import Runtime
from appliance.types import Namespace, SamplingParams, Tier, Tokens


@dataclass(frozen=True)
class PrefetchStep:
    found: dict[Tier | None, int]
    """Tokens by tier before anything moved; None for what no tier had."""
    moved_tokens: int
    computed_tokens: int
    moved_bytes: int
    done: bool


async def prefetch(
    runtime: Runtime, ns: Namespace, tokens: Tokens, *, to: Tier, compute: bool
) -> AsyncGenerator[PrefetchStep, None]:
    """Bring what is stored up to `to` (dram or hbm); with `compute`, prefill what no tier has. The last step is done."""
    resident, lookup = await where(runtime, ns, tokens)
    found: dict[Tier | None, int] = {Tier.HBM: resident} if resident else {}
    found |= {tier: count for tier, count in lookup.by_tier(resident).items()}
    if rest := len(tokens) - sum(found.values()):
        found[None] = rest
    moved_tokens = moved_bytes = computed = 0
    yield PrefetchStep(found, 0, 0, 0, done=False)
    if to is Tier.DRAM:
        async for staged in runtime.store.stage(ns, tokens, lookup.hits):
            runtime.store.unpin(staged)
            if staged.seconds:  # it was not in DRAM yet
                moved_tokens += sum(hit.use_tokens for hit in staged.hits)
                moved_bytes += staged.nbytes
                yield PrefetchStep(found, moved_tokens, 0, moved_bytes, done=False)
    part = tokens if compute else tokens[: len(tokens) - rest]
    if part and (to is Tier.HBM or (compute and rest)):
        request = GenerateRequest(f"prefetch-{os.urandom(8).hex()}", ns, part, SamplingParams(max_tokens=0))
        async for event in runtime.generate(request):
            if isinstance(event, Finished):
                computed, moved_bytes = event.sources.computed, moved_bytes + event.loaded_bytes
                moved_tokens += event.sources.dram + event.sources.nvme + event.sources.remote
    yield PrefetchStep(found, moved_tokens, computed, moved_bytes, done=True)
