"""What is no request, comes too slowly or too often: an answer or a closed connection, and the others are served."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from appliance.server import connection, listen
from appliance.server.app import admin_app, public_app
from tests.support.fake_runtime import FakeAdmin, FakeRuntime, service

KEY = b"authorization: Bearer key-of-alice\r\n"
HEAD = b"GET /v1/models HTTP/1.1\r\nhost: a\r\n" + KEY
CHAT = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\n" + KEY
HELLO = b'{"messages": [{"role": "user", "content": "hi"}]}'

MALFORMED = {
    "no HTTP at all": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200) + b"\r\n\r\n",
    "no version": b"GET /v1/models\r\n\r\n",
    "no host": b"GET /v1/models HTTP/1.1\r\n\r\n",
    "two hosts": HEAD + b"host: b\r\n\r\n",
    "a header without a name": HEAD + b": x\r\n\r\n",
    "a header without a colon": HEAD + b"nonsense\r\n\r\n",
    "a header with NUL": HEAD + b"x: a\0b\r\n\r\n",
    "a folded header": HEAD + b" folded\r\n\r\n\r\n"[1:],
    "endless headers": HEAD + b"x: y\r\n" * 40_000 + b"\r\n",
    "an endless header": HEAD + b"x: " + b"y" * 300_000,
    "an endless path": b"GET /" + b"a" * 300_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n",
    "a path with a space": b"GET /v1/mo dels HTTP/1.1\r\nhost: a\r\n\r\n",
    "a path that is not ASCII": "GET /v1/mödels HTTP/1.1\r\nhost: a\r\n\r\n".encode(),
    "a length that is no number": CHAT + b"content-length: ten\r\n\r\n",
    "a negative length": CHAT + b"content-length: -1\r\n\r\n",
    "an endless length": CHAT + b"content-length: " + b"9" * 400 + b"\r\n\r\n",
    "two lengths": CHAT + b"content-length: 1\r\ncontent-length: 2\r\n\r\n{}",
    "a coding nobody knows": CHAT + b"transfer-encoding: gzip\r\n\r\n",
    "a chunk without a size": CHAT + b"transfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    "a chunk of endless size": CHAT + b"transfer-encoding: chunked\r\n\r\n" + b"f" * 100 + b"\r\n",
}
ODD = {
    "an impossible host": HEAD.replace(b"host: a", b"host: [") + b"\r\n",
    "an impossible host and no such path": b"GET /nowhere HTTP/1.1\r\nhost: ]:x[\r\n" + KEY + b"\r\n",
    "a whole URL for a path": b"GET http://a/v1/models HTTP/1.1\r\nhost: a\r\n" + KEY + b"\r\n",
    "percent signs": b"GET /v1/models/%ff%00%zz HTTP/1.1\r\nhost: a\r\n" + KEY + b"\r\n",
    "a method nobody knows": b"BREW /v1/models HTTP/1.1\r\nhost: a\r\n" + KEY + b"\r\n",
    "an upgrade": HEAD + b"connection: upgrade\r\nupgrade: websocket\r\n\r\n",
    "a key that is not ASCII": b"GET /v1/models HTTP/1.1\r\nhost: a\r\nauthorization: Bearer \xff\xfe\r\n\r\n",
    "a body where none belongs": HEAD + b"content-length: 2\r\n\r\n{}",
    "another version": b"GET /v1/models HTTP/9.9\r\nhost: a\r\n\r\n",
    "HTTP/1.0": b"GET /v1/models HTTP/1.0\r\n" + KEY + b"\r\n",
    "an expectation": CHAT + b"expect: 42\r\ncontent-length: %d\r\n\r\n" % len(HELLO) + HELLO,
}


@pytest.fixture
async def bound(tmp_path: Path, runtime: FakeRuntime) -> AsyncIterator[listen.Bound]:
    served = service(runtime)
    bound = listen.bind("127.0.0.1", 0, tmp_path / "kvctl.sock")
    listener = listen.Listener(bound, public_app(served), admin_app(served, FakeAdmin()))
    await listener.start()
    yield bound
    await listener.stop(5)


class Raw:
    """A client that sends bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    @asynccontextmanager
    async def to(cls, bound: listen.Bound) -> AsyncIterator[Raw]:
        reader, writer = await asyncio.open_connection(*bound.public.getsockname())
        try:
            yield cls(reader, writer)
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def send(self, data: bytes) -> None:
        with suppress(ConnectionError):  # who is refused early may not get everything across
            self._writer.write(data)
            await self._writer.drain()

    async def status(self) -> int:
        line = await asyncio.wait_for(self._reader.readline(), 20)
        return int(line.split()[1])

    async def body(self) -> Any:
        """Of an answer whose status was read, after which the server hangs up."""
        return json.loads((await self.rest()).split(b"\r\n\r\n", 1)[1])

    async def rest(self) -> bytes:
        """All until the server hangs up."""
        return await asyncio.wait_for(self._reader.read(), 20)


async def served(bound: listen.Bound) -> bool:
    async with httpx.AsyncClient(base_url=bound.base_url, headers={"x-api-key": "key-of-alice"}) as client:
        return (await client.get("/models")).status_code == 200


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
async def test_what_is_no_request_is_a_400_and_a_closed_connection(bound: listen.Bound, data: bytes) -> None:
    async with Raw.to(bound) as client:
        await client.send(data)
        assert await client.status() == 400
    assert await served(bound)


async def test_a_400_without_a_request_has_the_shape_of_the_others(bound: listen.Bound) -> None:
    async with Raw.to(bound) as client:
        await client.send(MALFORMED["no version"])
        assert await client.status() == 400
        assert (await client.body())["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("data", ODD.values(), ids=ODD)
async def test_an_odd_request_has_an_answer_and_it_is_no_5xx(
    bound: listen.Bound, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with Raw.to(bound) as client:
        await client.send(data)
        assert await client.status() < 500
    assert await served(bound)
    assert not [record for record in caplog.records if record.exc_info], "nothing passed to the web server"


@pytest.mark.parametrize("start", [b"", HEAD], ids=["nothing", "half a head"])
async def test_a_head_that_does_not_come_closes_the_connection(
    bound: listen.Bound, monkeypatch: pytest.MonkeyPatch, start: bytes
) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.2)
    async with Raw.to(bound) as client:
        await client.send(start)
        assert await client.status() == 408
        assert (await client.body())["error"]["code"] == "request_timeout"


async def test_a_head_that_trickles_has_no_more_time(bound: listen.Bound, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.3)
    async with Raw.to(bound) as client:

        async def trickle() -> None:
            while True:
                await client.send(b"x: y\r\n")
                await asyncio.sleep(0.02)

        await client.send(HEAD)
        trickling = asyncio.ensure_future(trickle())
        assert await client.status() == 408
        trickling.cancel()


async def test_the_head_of_a_second_request_is_awaited_no_longer_than_the_first(
    bound: listen.Bound, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.3)
    async with Raw.to(bound) as client:
        await client.send(HEAD + b"\r\n")
        assert await client.status() == 200
        await client.send(b"GET /v1/mod")
        assert b"408 Request Timeout" in await client.rest()


async def test_an_answer_takes_as_long_as_it_takes(
    bound: listen.Bound, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.1)
    gate = asyncio.Event()
    runtime.interfere = gate.wait
    async with Raw.to(bound) as client:
        await client.send(CHAT + b"content-length: %d\r\n\r\n" % len(HELLO) + HELLO)
        await runtime.begun.wait()
        await asyncio.sleep(0.3)
        gate.set()
        assert await client.status() == 200


async def test_one_connection_too_many_is_told_to_come_back(
    bound: listen.Bound, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 3)
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Raw.to(bound)) for _ in range(3)]
        async with Raw.to(bound) as late:
            assert await late.status() == 503
            assert (await late.body())["error"]["code"] == "overloaded"
        for client in clients:
            await client.send(HEAD + b"\r\n")
            assert await client.status() == 200, "who was there goes on"
    while not await _has_room(bound):  # noqa: ASYNC110 - the server hears of a hang-up when it does
        await asyncio.sleep(0.01)


async def _has_room(bound: listen.Bound) -> bool:
    with suppress(httpx.RemoteProtocolError, httpx.ReadError):
        return await served(bound)
    return False


async def test_an_answer_that_nobody_reads_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "STALLED_S", 0.2)
    ended = asyncio.Event()

    async def endless(send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": bytes(2**16), "more_body": True})

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        pumping = asyncio.ensure_future(endless(send))
        while (await receive())["type"] != "http.disconnect":
            pass
        pumping.cancel()
        ended.set()

    bound = listen.bind("127.0.0.1", 0, tmp_path / "kvctl.sock")
    listener = listen.Listener(bound, app, app)
    await listener.start()
    with socket.create_connection(bound.public.getsockname()) as deaf:
        deaf.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        await asyncio.wait_for(ended.wait(), 20)
    await listener.stop(5)
