"""Records what requests ask of the cache, for `kvctl simulate` (the format is api/trace.py).

Invariant: what is recorded holds no token, no name of a block and no name of a tenant: numbers only, given out in the order
in which things were first seen. Without anybody listening nothing is kept. Event loop only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from datetime import datetime, timezone
from typing import Literal

from appliance.api.trace import TraceEvent, TraceHeader
from appliance.kv.base import KVStore
from appliance.plan.cost import CostModel
from appliance.request import GenerateRequest
from appliance.types import BlockId, BlockLayout, Tier, Tokens

HEARTBEAT_S = 1.0
FAR_TOKENS = 10_000
"""How deep the price of a token is looked at."""
MANY_BYTES = 1 << 28
"""Of a load whose rate is looked at."""


class Recording:
    """One listener's numbers."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[TraceEvent] = asyncio.Queue()
        self._began_s = time.monotonic()
        self._blocks: dict[BlockId, int] = {}
        self._tenants: dict[str, int] = {}

    def add(self, request: GenerateRequest, names: Sequence[BlockId], prompt_blocks: int) -> None:
        numbers = [self._blocks.setdefault(name, len(self._blocks)) for name in names]
        self.events.put_nowait(
            TraceEvent(
                t=time.monotonic() - self._began_s,
                tenant=self._tenants.setdefault(request.ns.tenant, len(self._tenants)),
                path=_ranges(numbers),
                prompt_blocks=prompt_blocks,
                prompt_tokens=len(request.prompt),
            )
        )


class Recorder:
    def __init__(self, store: KVStore, layout: BlockLayout, cost: CostModel) -> None:
        self._store = store
        self._layout = layout
        self._cost = cost
        self._recordings: list[Recording] = []

    def finished(self, request: GenerateRequest, sequence: Tokens) -> None:
        """A request ended; `sequence` is its prompt and what was generated."""
        if self._recordings:
            names = self._store.names(request.ns, sequence)
            for recording in self._recordings:
                recording.add(request, names, len(request.prompt) // self._layout.block_tokens)

    async def listen(self) -> AsyncGenerator[TraceHeader | TraceEvent | None, None]:
        """The header, then each request that ends from now on, until it is closed; None each second without one."""
        recording = Recording()
        self._recordings.append(recording)
        try:
            yield self._header()
            while True:
                try:
                    yield await asyncio.wait_for(recording.events.get(), HEARTBEAT_S)
                except asyncio.TimeoutError:
                    yield None
        finally:
            self._recordings.remove(recording)

    def _header(self) -> TraceHeader:
        cost, block_bytes = self._cost, self._layout.payload_bytes(self._layout.block_tokens)
        first_s = cost.prefill_s(0, 1)
        depth_s = max(0.0, cost.prefill_s(FAR_TOKENS, FAR_TOKENS + 1) - first_s) / FAR_TOKENS
        loads: list[tuple[Literal["dram", "nvme"], float]] = [
            ("dram", cost.load_s(Tier.DRAM, MANY_BYTES)),
            ("nvme", cost.load_s(Tier.NVME, MANY_BYTES)),
        ]
        return TraceHeader(
            started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            block_tokens=self._layout.block_tokens,
            block_bytes=block_bytes,
            prefill_token_s=max(0.0, first_s - depth_s / 2),
            prefill_depth_s=depth_s,
            bytes_per_s={tier: MANY_BYTES / seconds for tier, seconds in loads if seconds > 0},
        )


def _ranges(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive numbers as (first, last)."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] + 1 == number:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found
