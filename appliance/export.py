"""Write-behind of one request: what is in cells and in no tier goes to the store, beside whatever else the request does.

Invariant: every reservation is committed or aborted, and never while the engine may still write its slot.
Threading: event loop only.
"""

from __future__ import annotations

import asyncio
import logging

from appliance.answered import answered
from appliance.engine.client import EngineClient
from appliance.errors import EngineError, StoreBusy
from appliance.kv.base import KVStore
from appliance.request import GenerateRequest
from appliance.types import Tokens

log = logging.getLogger(__name__)

EXPORT_RUN = 16
"""Blocks per export call: bounds the slots one request holds while they fill."""


class Exporter:
    """One export at a time: a later call of export() asks for more of the same sequence."""

    def __init__(self, engine: EngineClient, store: KVStore, request: GenerateRequest) -> None:
        self._engine = engine
        self._store = store
        self._request = request
        self._asked = Tokens()
        self._working: asyncio.Task[None] | None = None

    def export(self, tokens: Tokens) -> None:
        """These leading tokens of the sequence are in cells. Does not wait; settled() does."""
        self._asked = tokens
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())

    async def settled(self) -> None:
        """Until all that was asked for is stored, or will not be."""
        if self._working is not None:
            await self._working

    async def close(self) -> None:
        """The engine answers what it is exporting when the request is released: call that first."""
        if self._working is not None:
            self._working.cancel()
            await asyncio.gather(self._working, return_exceptions=True)

    async def _work(self) -> None:
        while self._asked:
            tokens, self._asked = self._asked, Tokens()
            await self._export(tokens)

    async def _export(self, tokens: Tokens) -> None:
        wish_s = self._request.retention_s
        self._store.keep(self._request.ns, tokens, retention_s=wish_s)
        missing = self._store.missing(self._request.ns, tokens)
        while missing:
            try:
                reserved = await self._store.reserve(self._request.ns, missing[:EXPORT_RUN], retention_s=wish_s)
            except StoreBusy as error:
                log.warning("%d blocks are not stored: %s", len(missing), error)
                return
            if not reserved:  # others store all of these
                missing = missing[EXPORT_RUN:]
                continue
            missing = missing[missing.index(reserved[-1].new) + 1 :]
            try:
                blocks = [(r.new.start, len(r.new.tokens), r.slot) for r in reserved]
                await answered(self._engine.export(self._request.request_id, blocks))
            except EngineError as error:
                self._store.abort(reserved)
                log.warning("export failed, %d blocks are not stored: %s", len(reserved) + len(missing), error)
                return
            except BaseException:
                self._store.abort(reserved)
                raise
            self._store.commit(reserved)
