"""A client that leaves ends its generation, streaming or not, whatever state it is in."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from appliance.server.app import public_app
from appliance.server.base import Service
from tests.support.fake_runtime import FakeRuntime


class Connection:
    """One request to an ASGI app by a client that can leave."""

    def __init__(self, served: Service, body: dict[str, Any], path: str = "/v1/chat/completions") -> None:
        self.sent: list[dict[str, Any]] = []
        self.got_body = asyncio.Event()
        self._left = asyncio.Event()
        self._inbox = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        headers = [(b"authorization", b"Bearer key-of-alice")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": headers,
            "query_string": b"",
        }
        self.task = asyncio.ensure_future(public_app(served)(scope, self._receive, self._send))  # type: ignore[arg-type]

    async def _receive(self) -> dict[str, Any]:
        if self._inbox:
            return self._inbox.pop()
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        if message.get("body"):
            self.got_body.set()

    async def leave(self) -> None:
        self._left.set()
        await asyncio.wait_for(self.task, 5)


HELLO = [{"role": "user", "content": "hi"}]


async def outcomes(served: Service) -> dict[str, float]:
    families = text_string_to_metric_families((await served.metrics.scrape()).decode())
    (requests,) = (family for family in families if family.name == "kvctl_requests")
    return {s.labels["outcome"]: s.value for s in requests.samples if s.name == "kvctl_requests_total"}


@pytest.mark.parametrize("n", [1, 3])
async def test_leaving_a_stream_cancels(runtime: FakeRuntime, served: Service, n: int) -> None:
    runtime.hold_after = 2
    connection = Connection(served, {"messages": HELLO, "stream": True, "n": n})
    await asyncio.wait_for(connection.got_body.wait(), 5)
    await connection.leave()
    assert sorted(runtime.closed) == sorted(request.request_id for request in runtime.requests)
    assert (await outcomes(served))["cancelled"] == len(runtime.closed) >= 1


@pytest.mark.parametrize("streaming", [False, True])
async def test_leaving_before_the_first_token_cancels_and_sends_nothing(
    runtime: FakeRuntime, served: Service, streaming: bool
) -> None:
    runtime.hold_after = 0
    connection = Connection(served, {"messages": HELLO, "stream": streaming})
    await asyncio.wait_for(runtime.begun.wait(), 5)
    await connection.leave()
    assert runtime.closed == [runtime.requests[0].request_id]
    assert connection.sent == []


async def test_leaving_a_whole_answer_midway_cancels(runtime: FakeRuntime, served: Service) -> None:
    runtime.hold_after = 3
    connection = Connection(served, {"messages": HELLO})
    await asyncio.wait_for(runtime.begun.wait(), 5)
    await connection.leave()
    assert runtime.closed == [runtime.requests[0].request_id]


async def test_a_client_that_stays_is_not_cancelled(runtime: FakeRuntime, served: Service) -> None:
    connection = Connection(served, {"messages": HELLO, "stream": True})
    await asyncio.wait_for(connection.task, 5)
    assert runtime.closed == []
    assert connection.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
    assert await outcomes(served) == {"stop": 1.0}


async def test_the_first_token_is_sent_before_the_second_exists(runtime: FakeRuntime, served: Service) -> None:
    runtime.hold_after = 1
    connection = Connection(served, {"messages": HELLO, "stream": True})
    await asyncio.wait_for(connection.got_body.wait(), 5)
    assert [message["type"] for message in connection.sent] == ["http.response.start", "http.response.body"]
    assert b'"content":"H"' in connection.sent[1]["body"]
    await connection.leave()


async def test_an_outer_cancel_closes_the_generation(runtime: FakeRuntime, served: Service) -> None:
    runtime.hold_after = 1
    connection = Connection(served, {"messages": HELLO, "stream": True})
    await asyncio.wait_for(connection.got_body.wait(), 5)
    connection.task.cancel()
    await asyncio.wait_for(connection.task, 5)
    assert connection.sent[-1]["more_body"], "a stream that was cut does not look complete"
    assert runtime.closed == [runtime.requests[0].request_id]
