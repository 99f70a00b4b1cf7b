"""Responses that outlive their first byte: server-sent events and JSON lines, and work that ends with its client.

Invariant: a source is closed before the response returns, whatever ended it: the end, an error, or the client's leaving.
What fails before anything was sent is a plain HTTP error; what fails later is the stream's last item. A stream of events
that has nothing to say for PING_S sends a ping, so that no client or proxy takes it for dead. Event loop only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from appliance.server.errors import ApiError, describe

PING_S = 15.0
COMMENT = b":\n\n"
"""An event stream's way to say nothing."""

T = TypeVar("T")


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; ClientDisconnect, with `work` cancelled and finished, if the client leaves first."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnection(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnection(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Streamed(Response):
    """Sends each item of `source` at once. `last_words` turns a late error into the stream's last item."""

    def __init__(
        self,
        source: AsyncGenerator[bytes, None],
        media_type: str,
        last_words: Callable[[ApiError], bytes],
        ping: bytes = b"",
    ) -> None:
        """`ping` tells nothing but that there is more to come; without it silence is silence."""
        super().__init__(media_type=media_type, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._source = source
        self._last_words = last_words
        self._ping = ping
        self._begun = False
        self._sent_s = 0.0
        self._sending = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._sent_s = time.monotonic()
        pinging = asyncio.ensure_future(self._keep_alive(send)) if self._ping else None
        try:
            await unless_disconnected(receive, self._pump(scope, send))
        finally:
            if pinging:
                pinging.cancel()
                await asyncio.gather(pinging, return_exceptions=True)

    async def _pump(self, scope: Scope, send: Send) -> None:
        async with aclosing(self._source) as source:
            try:
                async for data in source:
                    await self._item(send, data)
            except Exception as error:
                if not self._begun:
                    raise
                await self._item(send, self._last_words(describe(error, scope["state"]["request_id"])))
        await self._item(send, b"", last=True)

    async def _item(self, send: Send, data: bytes, *, last: bool = False) -> None:
        async with self._sending:
            if not self._begun:
                self._begun = True
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": data, "more_body": not last})
            self._sent_s = time.monotonic()

    async def _keep_alive(self, send: Send) -> None:
        while True:
            silent_s = time.monotonic() - self._sent_s
            if silent_s < PING_S:
                await asyncio.sleep(PING_S - silent_s)
            else:
                await self._item(send, self._ping)


def event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def named_event(name: str, data: bytes) -> bytes:
    return b"event: " + name.encode() + b"\n" + event(data)


def event_stream(source: AsyncGenerator[bytes, None]) -> Streamed:
    return Streamed(source, "text/event-stream", lambda error: b"event: error\n" + event(error.to_json()), COMMENT)


def json_lines(source: AsyncGenerator[bytes, None]) -> Streamed:
    return Streamed(source, "application/x-ndjson", lambda error: error.to_json() + b"\n")
