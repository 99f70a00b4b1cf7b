"""Keys, paths, request ids, body caps, and what a response or a log may never hold."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from appliance.errors import ConfigError, StateError
from appliance.server.app import admin_app, public_app
from appliance.server.body import DISCARD_BYTES
from tests.support.fake_runtime import FakeAdmin, FakeRuntime, service

HELLO = {"messages": [{"role": "user", "content": "canary-prompt"}]}
KEYED = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
    ("POST", "/v1/embeddings"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/fake-1b"),
    ("GET", "/props"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/metrics"),
    ("POST", "/v1/kv/prefetch"),
]


@pytest.mark.parametrize(("method", "path"), KEYED, ids=[path for _, path in KEYED])
@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", "key-of-alice", "Basic key-of-alice", "Bearer " + "k" * 10_000],
    ids=["none", "empty", "no key", "blank key", "wrong key", "no scheme", "other scheme", "endless key"],
)
async def test_without_a_good_key_it_is_401(
    client: httpx.AsyncClient, runtime: FakeRuntime, method: str, path: str, authorization: str | None
) -> None:
    del client.headers["authorization"]
    headers = {} if authorization is None else {"authorization": authorization}
    response = await client.request(method, path, headers=headers, content=b"{}" if method == "POST" else None)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert "API key" in response.json()["error"]["message"]
    assert "wrong" not in response.text
    assert not runtime.requests


def test_every_public_route_but_health_is_in_the_list_above() -> None:
    paths = set(public_app(service(FakeRuntime())).openapi()["paths"])
    assert {path for _, path in KEYED} - {"/v1/models/fake-1b"} | {"/health", "/v1/models/{name}"} == paths


def test_admin_routes_are_not_public() -> None:
    served = service(FakeRuntime())
    public, admin = (set(app.openapi()["paths"]) for app in (public_app(served), admin_app(served, FakeAdmin())))
    assert not any("admin" in path for path in public)
    assert {path for path in admin if "admin" not in path} == {"/metrics", "/health"}


def test_the_environment_cannot_turn_telemetry_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    settings = public_app(service(FakeRuntime()))._telemetry
    assert not any(settings[name] for name in ("tracing", "metrics", "logs", "auto_configure"))


@pytest.mark.parametrize(("state", "status"), [("ready", 200), ("draining", 503), ("engine-restarting", 503)])
async def test_health_needs_no_key_and_tells_the_state(runtime: FakeRuntime, state: str, status: int) -> None:
    transport = httpx.ASGITransport(public_app(service(runtime, state=state)))
    async with httpx.AsyncClient(transport=transport, base_url="http://a") as client:
        response = await client.get("/health")
    assert response.status_code == status
    assert (state in response.text) is (status == 503)


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", "/v1/completions", 405), ("GET", "/docs", 404)])  # fmt: skip
async def test_wrong_paths_and_methods_have_the_openai_shape(
    client: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    response = await client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert response.headers["x-request-id"]


async def test_request_ids_differ(client: httpx.AsyncClient) -> None:
    ids = {(await client.get("/v1/models")).headers["x-request-id"] for _ in range(5)}
    assert len(ids) == 5


@pytest.mark.parametrize(
    ("error", "status"), [(ConfigError("x"), 400), (StateError("x"), 409), (KeyError("canary-error"), 500)]
)
async def test_unexpected_errors_reach_neither_client_nor_log(
    client: httpx.AsyncClient,
    runtime: FakeRuntime,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    status: int,
) -> None:
    runtime.error = error
    with caplog.at_level(logging.DEBUG):
        response = await client.post("/v1/chat/completions", json=HELLO)
    assert response.status_code == status
    everything = response.text + "".join(record.getMessage() + str(record.exc_info) for record in caplog.records)
    assert "canary" not in everything
    if status == 500:
        assert response.headers["x-request-id"] in response.json()["error"]["message"]
        assert response.headers["x-request-id"] in caplog.text
        assert "KeyError" in caplog.text


async def test_no_content_in_the_log_of_a_good_request(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        await client.post("/v1/chat/completions", json=HELLO)
    assert "canary" not in caplog.text
    assert "key-of-alice" not in caplog.text


class Flood:
    """A chunked body that never ends, and remembers how much of it was taken."""

    def __init__(self) -> None:
        self.taken_bytes = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        piece = b" " * 2**20
        while True:
            self.taken_bytes += len(piece)
            yield piece


async def test_an_endless_chunked_body_ends_in_413_unbuffered(client: httpx.AsyncClient) -> None:
    flood = Flood()
    response = await client.post("/v1/chat/completions", content=flood)
    assert response.status_code == 413
    assert flood.taken_bytes <= DISCARD_BYTES + 4 * 2**20


async def test_a_chunked_body_whose_last_piece_is_too_much(client: httpx.AsyncClient) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b" " * 2**20
        yield b" "

    response = await client.post("/v1/chat/completions", content=pieces())
    assert response.status_code == 413


async def test_a_declared_body_is_refused_unread_when_the_client_waits(runtime: FakeRuntime) -> None:
    """Expect: 100-continue: the answer comes instead of the invitation to send."""
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("the body was asked for")

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-length", b"52428800"), (b"expect", b"100-continue"), (b"authorization", b"Bearer key-of-bob")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
    await public_app(service(runtime))(scope, receive, send)
    assert sent[0]["status"] == 413
