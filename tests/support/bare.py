"""The appliance without server and child: runtime and store in this process, the engine process with the tiny model.

Opening a store again takes a fraction of what a whole start does, so that a test can afford many. Event loop only.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from appliance.config import KVSection, NvmeSection
from appliance.engine.proxy import EngineProxy
from appliance.kv.base import KVStore
from appliance.kv.opening import open_store
from appliance.kv.tiers.dram import DramPool
from appliance.plan.cost import CostModel
from appliance.runtime import Finished, GenerateRequest, Limits, Runtime
from appliance.types import Fingerprint, Namespace, SamplingParams, Tokens
from tests.support.appliance import BLOCK, COMPLETION_TOKENS
from tests.support.kv import keyring
from tests.support.models import tiny_config

POOL_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Asked:
    tokens: list[int]
    """The completion."""
    cached: int


class Served:
    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    @property
    def store(self) -> KVStore:
        return self.runtime.store

    async def ask(self, prompt: list[int]) -> Asked:
        """A greedy completion."""
        sampling = SamplingParams(max_tokens=COMPLETION_TOKENS, temperature=0.0)
        request = GenerateRequest(os.urandom(8).hex(), Namespace("default"), Tokens.of(prompt), sampling)
        tokens: list[int] = []
        cached = 0
        async for event in self.runtime.generate(request):
            if isinstance(event, Finished):
                cached = event.sources.cached
            else:
                tokens += event.tokens
        return Asked(tokens, cached)


class BareEngine:
    """The engine process, and its pool."""

    def __init__(self, engine: EngineProxy, pool: DramPool) -> None:
        self.engine = engine
        self._pool = pool

    @asynccontextmanager
    async def serving(self, home: Path, fingerprint: Fingerprint | None = None) -> AsyncIterator[Served]:
        """The store of `home`, opened, with nothing in the tiers above it; durable and closed afterwards."""
        info = self.engine.info
        store = await open_store(
            home,
            keyring(home),
            fingerprint or info.fingerprint,
            info.layout,
            self._pool,
            KVSection(block_tokens=BLOCK),
            NvmeSection(capacity=64 * 2**20),
            lambda position: 1e-3,
        )
        runtime = Runtime(self.engine, store, CostModel.calibrated(1e3, 1e-3), Limits(4, 4, store_completions=True))
        try:
            await self.engine.evict()
            yield Served(runtime)
            await runtime.drain(60)
            assert await store.flush(60)
        finally:
            await store.close()


@asynccontextmanager
async def bare_engine() -> AsyncIterator[BareEngine]:
    pool = DramPool(POOL_BYTES, lock=False)
    config = tiny_config(block_tokens=BLOCK, threads=1, batch_threads=1)
    engine = EngineProxy(config, pool_fd=pool.fd, start_timeout_s=60)
    try:
        info = await engine.start()
        shape = pool.partition(info.layout.slot_bytes)
        await engine.attach_pool(shape.slot_bytes, shape.slots)
        yield BareEngine(engine, pool)
    finally:
        await engine.close()
        pool.close()
