"""Responses that outlive their first byte: server-sent events and JSON lines, and work that ends with its client.

Invariant: a source is closed before the response returns, whatever ended it: the end, an error, or the client's leaving.
What fails before the first item is a plain HTTP error; what fails later is the stream's last item. Event loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from appliance.server.errors import ApiError, describe

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
        self, source: AsyncGenerator[bytes, None], media_type: str, last_words: Callable[[ApiError], bytes]
    ) -> None:
        super().__init__(media_type=media_type, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._source = source
        self._last_words = last_words

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await unless_disconnected(receive, self._pump(scope, send))

    async def _pump(self, scope: Scope, send: Send) -> None:
        async def item(data: bytes) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": True})

        async with aclosing(self._source) as source:
            first = await anext(source)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await item(first)
            try:
                async for data in source:
                    await item(data)
            except Exception as error:  # noqa: BLE001  the status is sent: describe() logs what is unexpected
                await item(self._last_words(describe(error, scope["state"]["request_id"])))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def named_event(name: str, data: bytes) -> bytes:
    return b"event: " + name.encode() + b"\n" + event(data)


def event_stream(source: AsyncGenerator[bytes, None]) -> Streamed:
    return Streamed(source, "text/event-stream", lambda error: b"event: error\n" + event(error.to_json()))


def json_lines(source: AsyncGenerator[bytes, None]) -> Streamed:
    return Streamed(source, "application/x-ndjson", lambda error: error.to_json() + b"\n")
