"""EngineClient over an engine process that is started again whenever it dies.

Invariant: at most one engine process exists; a request lives in the generation it began in and never reaches a later one.
Threading: event loop only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from appliance.engine import wire
from appliance.engine.base import EngineConfig, EngineInfo
from appliance.engine.client import Done, EngineClient, Event, Preempted
from appliance.engine.process import EngineProcess
from appliance.engine.protocol import EngineStats
from appliance.engine.request import Failed
from appliance.errors import EngineDied, EngineError, KvctlError, RequestError
from appliance.types import SamplingParams, Tokens

log = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.1
LONGEST_BACKOFF_S = 10.0


class EngineProxy(EngineClient):
    def __init__(
        self,
        config: EngineConfig,
        *,
        pool_fd: int | None,
        start_timeout_s: float,
        on_progress: Callable[[float], None] = lambda fraction: None,
        unchanged: Callable[[], bool] = lambda: True,
    ) -> None:
        """`unchanged` says, after each load, whether the model file is still the one of the configuration's digest."""
        self.generation = 0
        self._config = config
        self._pool_fd = pool_fd
        self._start_timeout_s = start_timeout_s
        self._on_progress = on_progress
        self._unchanged = unchanged
        self._pool: tuple[int, int] | None = None
        self._process: EngineProcess | None = None
        """The loaded one; None while there is none."""
        self._loaded = asyncio.Event()
        self._failing = False
        """The last start failed; another is tried."""
        self._requests: dict[str, EngineProcess] = {}
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:  # type: ignore[override]
        return self._process.pid if self._process else None

    # --- life ---------------------------------------------------------------------------------------------------

    async def start(self) -> EngineInfo:
        """Load the model. What is wrong with it, or with its loading, is raised here; later starts are retried."""
        await self._start_process()
        self._supervisor = asyncio.create_task(self._supervise())
        return self.info

    async def attach_pool(self, slot_bytes: int, slots: int) -> None:
        self._pool = (slot_bytes, slots)
        await self._call("pool", slot_bytes=slot_bytes, slots=slots)

    async def close(self) -> None:
        if self._supervisor:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        if self._process:
            await self._process.close()
            self._process = None

    async def _start_process(self) -> None:
        process = EngineProcess(self._pool_fd, self._on_progress)
        await process.spawn()
        try:
            load = process.call("load", config=wire.config_to_map(self._config))
            self.info = wire.info_from_map(await asyncio.wait_for(load, self._start_timeout_s))
            if not self._unchanged():
                raise EngineError(f"{self._config.model_path} was replaced; stop the appliance and start it again")
            if self._pool:
                await process.call("pool", slot_bytes=self._pool[0], slots=self._pool[1])
        except BaseException as error:
            await process.close()
            if isinstance(error, asyncio.TimeoutError):
                raise EngineError(f"the engine did not load within {self._start_timeout_s:.0f} s") from None
            if isinstance(error, wire.MALFORMED):
                raise EngineError("the engine process does not speak this protocol") from None
            raise
        self.generation += 1
        self._process = process
        self._failing = False
        self._loaded.set()

    async def _supervise(self) -> None:
        while True:
            assert self._process
            await self._process.closed.wait()
            self._process = None
            self._loaded.clear()
            log.warning("the engine process died; starting another")
            await self._restart()

    async def _restart(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        while self._process is None:
            try:
                await self._start_process()
            except (KvctlError, OSError) as error:
                log.error("the engine did not start: %s", error)
                self._failing = True
                self._loaded.set()  # whoever waits is told at once
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)

    # --- calls --------------------------------------------------------------------------------------------------

    async def _ready(self) -> EngineProcess:
        try:
            while self._process is None or self._process.closed.is_set():
                if self._failing:
                    raise EngineDied("the engine process does not start again; its log says why")
                self._loaded.clear()
                await asyncio.wait_for(self._loaded.wait(), self._start_timeout_s)
        except asyncio.TimeoutError:
            raise EngineDied("the engine process is gone and did not come back in time") from None
        return self._process

    async def _call(self, op: str, **fields: Any) -> Any:
        return await (await self._ready()).call(op, **fields)

    async def _call_for(self, request: str, op: str, **fields: Any) -> Any:
        process = self._requests.get(request)
        if process is None:
            raise EngineError("no such request")
        return await process.call(op, request=request, **fields)

    async def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> Tokens:
        return Tokens(await self._call("tokenize", text=text, add_special=add_special, parse_special=parse_special))

    async def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> Tokens:
        return Tokens(await self._call("render", messages=messages, tools=tools, options=dict(options)))

    async def detokenize(self, tokens: Tokens) -> str:
        return str(await self._call("detokenize", tokens=tokens.data))

    async def resident(self, ns: bytes, tokens: Tokens) -> int:
        return int(await self._call("resident", ns=ns, tokens=tokens.data))

    async def begin(self, request: str, ns: bytes, tokens: Tokens, reserve_tokens: int, owner: bytes) -> int:
        process = await self._ready()
        if request in self._requests:
            raise EngineError("a request of this id exists")
        self._requests[request] = process
        try:
            resident = await process.call(
                "begin", request=request, ns=ns, owner=owner, tokens=tokens.data, reserve_tokens=reserve_tokens
            )
        except KvctlError:
            del self._requests[request]
            raise
        return int(resident)

    async def restore(self, request: str, start: int, blocks: Sequence[tuple[int, int, int]]) -> int:
        return int(await self._call_for(request, "restore", start=start, blocks=blocks))

    async def run(self, request: str, sampling: SamplingParams) -> AsyncIterator[Event]:
        process = self._requests.get(request)
        if process is None:
            raise EngineError("no such request")
        events = process.subscribe(request)
        ended = False
        try:
            await process.call("run", request=request, sampling=wire.sampling_to_map(sampling))
            while not ended:
                event = await events.get()
                ended = isinstance(event, (Done, Preempted, Failed, EngineDied))
                if isinstance(event, EngineDied):
                    raise event
                if isinstance(event, Failed):
                    raise RequestError(event.message, status=422) if event.refused else EngineError(event.message)
                yield event
        finally:
            process.unsubscribe(request)
            if not ended:
                process.notify("cancel", request=request)  # nobody listens any more: stop computing

    async def prefill(self, request: str, stop: int) -> int:
        return int(await self._call_for(request, "prefill", stop=stop))

    async def preempt(self, request: str) -> None:
        await self._call_for(request, "preempt")

    async def park(self, request: str) -> None:
        await self._call_for(request, "park")

    async def export(self, request: str, blocks: Sequence[tuple[int, int, int]]) -> None:
        await self._call_for(request, "export", blocks=blocks)

    async def embed(self, request: str) -> bytes:
        return bytes(await self._call_for(request, "embed"))

    async def release(self, request: str) -> None:
        process = self._requests.pop(request, None)
        if process and not process.closed.is_set():
            await process.call("release", request=request)

    async def cancel(self, request: str) -> None:
        process = self._requests.get(request)
        if process and not process.closed.is_set():
            await process.call("cancel", request=request)

    async def evict(self) -> int:
        return int(await self._call("evict"))

    async def stats(self) -> EngineStats:
        return EngineStats(**await self._call("stats"))
