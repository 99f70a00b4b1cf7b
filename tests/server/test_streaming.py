"""Server-sent events: order, shapes, usage, errors before and after the first token."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from appliance.errors import EngineDied, EngineError, Overloaded, RequestError
from appliance.server import stream as streaming_module
from tests.support.fake_runtime import COMPLETION, FakeRuntime

HELLO = [{"role": "user", "content": "hi"}]


async def stream(client: httpx.AsyncClient, headers: dict[str, str] | None = None, **fields: Any) -> list[Any]:
    """Decoded data of each event; [DONE] and error events as ("[DONE]",) and ("error", data)."""
    path = "/v1/completions" if "prompt" in fields else "/v1/chat/completions"
    response = await client.post(path, json={"messages": HELLO, "stream": True, **fields}, headers=headers)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in response.headers
    events: list[Any] = []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        lines = block.split("\n")
        data = lines[-1].removeprefix("data: ")
        if lines[0] == "event: error":
            events.append(("error", json.loads(data)))
        else:
            events.append(("[DONE]",) if data == "[DONE]" else json.loads(data))
    return events


async def test_chat_chunks(client: httpx.AsyncClient) -> None:
    first, *deltas, last, done = await stream(client)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in deltas) == COMPLETION
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in [first, *deltas])
    assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert last["timings"]["predicted_n"] == len(COMPLETION)
    assert done == ("[DONE]",)
    chunks = [first, *deltas, last]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["system_fingerprint"]) for chunk in chunks}) == 1
    assert not any("usage" in chunk for chunk in chunks)


async def test_text_chunks(client: httpx.AsyncClient) -> None:
    *deltas, last, _ = await stream(client, prompt="hi", max_tokens=3, logprobs=0)
    assert [chunk["choices"][0]["text"] for chunk in deltas] == list(COMPLETION[:3])
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in deltas] == [[0], [1], [2]]
    assert last["choices"][0]["finish_reason"] == "length"


async def test_an_empty_completion_still_opens_and_ends(client: httpx.AsyncClient, runtime: FakeRuntime) -> None:
    runtime.completion = ""
    first, last, _ = await stream(client)
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert last["choices"][0]["finish_reason"] == "stop"
    (only, _) = await stream(client, prompt="hi")
    assert only["choices"] == [{"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}]


async def test_usage_comes_last_when_asked_for(client: httpx.AsyncClient) -> None:
    headers = {"x-kvctl-explain": "1"}
    *_, last, closing, done = await stream(client, headers, stream_options={"include_usage": True})
    assert "timings" not in last
    assert closing["choices"] == []
    assert closing["usage"]["completion_tokens"] == len(COMPLETION)
    assert closing["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert closing["timings"]["predicted_n"] == len(COMPLETION)
    assert set(closing["kvctl"]["tokens"]) == {"hbm", "dram", "nvme", "remote", "computed"}
    assert done == ("[DONE]",)


async def test_several_choices_interleave(client: httpx.AsyncClient) -> None:
    *chunks, _ = await stream(client, n=3, seed=5)
    texts = {index: "" for index in range(3)}
    roles, finished = [], []
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        roles += [choice["index"]] if "role" in choice["delta"] else []
        finished += [choice["index"]] if choice["finish_reason"] else []
    assert texts == {index: f"{COMPLETION} {5 + index}" for index in range(3)}
    assert sorted(roles) == sorted(finished) == [0, 1, 2]
    assert ["timings" in chunk for chunk in chunks].count(True) == 1
    assert "timings" in chunks[-1]


@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [
        (RequestError("too hot", param="messages"), 400, False),
        (RequestError("seen in two crashes", status=422), 422, False),
        (Overloaded("the queue is full", retry_after_s=3.2), 429, True),
        (Overloaded("draining", retry_after_s=0.1, status=503), 503, True),
        (EngineDied("gone"), 503, True),
        (EngineError("no cells"), 500, False),
        (RuntimeError("canary"), 500, False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
@pytest.mark.parametrize("streaming", [False, True])
async def test_an_error_before_the_first_token_is_a_plain_status(
    client: httpx.AsyncClient, runtime: FakeRuntime, error: Exception, status: int, retry: bool, streaming: bool
) -> None:
    runtime.error = error
    response = await client.post("/v1/chat/completions", json={"messages": HELLO, "stream": streaming})
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert "canary" not in response.text
    assert ("retry-after" in response.headers) is retry
    if retry:
        assert int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["type"] == (
        "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
    )


@pytest.mark.parametrize(("error", "said"), [(EngineDied("gone"), "restarted"), (RuntimeError("canary"), "request id")])
async def test_a_later_error_is_the_last_event(
    client: httpx.AsyncClient, runtime: FakeRuntime, error: Exception, said: str
) -> None:
    runtime.error, runtime.error_after = error, 4
    *chunks, last = await stream(client)
    assert "".join(c["choices"][0]["delta"]["content"] for c in chunks) == COMPLETION[:4]
    assert last[0] == "error"
    assert said in last[1]["error"]["message"]
    assert "canary" not in str(last)


@pytest.fixture
def slow_prompt(runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token takes long, the others do not."""
    monkeypatch.setattr(streaming_module, "PING_S", 0.02)
    waits = iter([0.1])
    runtime.interfere = lambda: asyncio.sleep(next(waits, 0))


SIDES: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/chat/completions", {"messages": HELLO}, ":"),
    ("/v1/completions", {"prompt": "hi"}, ":"),
    ("/v1/responses", {"input": "hi"}, ":"),
    ("/v1/messages", {"messages": HELLO, "max_tokens": 50}, 'event: ping\ndata: {"type": "ping"}'),
]


@pytest.mark.usefixtures("slow_prompt")
@pytest.mark.parametrize(("path", "body", "ping"), SIDES, ids=[path for path, *_ in SIDES])
async def test_while_a_prompt_is_read_the_client_hears_that_it_is(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], ping: str
) -> None:
    response = await client.post(path, json={**body, "stream": True})
    blocks = response.text.removesuffix("\n\n").split("\n\n")
    first = next(n for n, block in enumerate(blocks) if block != ping)
    assert first >= 2
    rest = [block for block in blocks[first:] if block != ping]
    assert "".join(character for block in rest for character in _texts(block)) == COMPLETION


def _texts(block: str) -> list[str]:
    data = block.split("\n")[-1].removeprefix("data: ")
    tree = {} if data == "[DONE]" else json.loads(data)
    deltas = [choice.get("text") or choice.get("delta", {}).get("content") for choice in tree.get("choices", ())]
    if tree.get("type") == "content_block_delta":
        deltas.append(tree["delta"]["text"])
    if tree.get("type") == "response.output_text.delta":
        deltas.append(tree["delta"])
    return [text for text in deltas if text]


@pytest.mark.usefixtures("slow_prompt")
@pytest.mark.parametrize(("path", "body", "ping"), SIDES, ids=[path for path, *_ in SIDES])
async def test_an_error_after_a_ping_is_the_last_event(
    client: httpx.AsyncClient, runtime: FakeRuntime, path: str, body: dict[str, Any], ping: str
) -> None:
    slow = runtime.interfere

    async def dies() -> None:
        await slow()
        raise EngineDied("gone")

    runtime.interfere = dies
    response = await client.post(path, json={**body, "stream": True})
    assert response.status_code == 200
    *pings, last = response.text.removesuffix("\n\n").split("\n\n")
    assert set(pings) == {ping}
    assert last.startswith("event: error\n")
    assert "restarted" in last


async def test_who_does_not_stream_gets_no_pings(client: httpx.AsyncClient, slow_prompt: None) -> None:
    assert (await client.post("/v1/messages", json=SIDES[3][1])).json()["content"][0]["text"] == COMPLETION
