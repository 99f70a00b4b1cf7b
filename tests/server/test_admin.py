"""The admin API: models both ways, JSON lines, errors, and prompts normalised like a tenant's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from appliance.api.control import PrefetchProgress, Status, TenantList, VerifyProgress
from appliance.server.app import admin_app
from tests.support.fake_runtime import FakeAdmin, FakeRuntime, service


@pytest.fixture
def admin() -> FakeAdmin:
    return FakeAdmin()


@pytest.fixture
async def client(admin: FakeAdmin, runtime: FakeRuntime) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(admin_app(service(runtime), admin))
    async with httpx.AsyncClient(transport=transport, base_url="http://admin/v1/admin") as client:
        yield client


async def test_plain_answers(client: httpx.AsyncClient) -> None:
    assert Status.model_validate_json((await client.get("/status")).content).state == "ready"
    assert (await client.get("/store")).json()["block_tokens"] == 256
    assert (await client.post("/evict", json={"tier": "hbm"})).json() == {"freed": 7}
    assert TenantList.model_validate_json((await client.get("/tenants")).content).tenants[0].tenant == "alice"
    assert (await client.post("/tenants", json={"name": "carol"})).json() == {"tenant": "carol", "api_key": "kvctl-new"}


@pytest.mark.parametrize("call_id", ["x", "x%2Fy", ""])
async def test_an_id_that_is_none_is_one_that_is_not_known(client: httpx.AsyncClient, call_id: str) -> None:
    response = await client.get(f"/requests/{call_id}")
    assert (response.status_code, response.json()["error"]["message"]) == (404, "no such request")


async def test_prefetch_streams_lines(client: httpx.AsyncClient) -> None:
    response = await client.post("/prefetch", json={"prompt": "abc"})
    assert response.headers["content-type"] == "application/x-ndjson"
    lines = [PrefetchProgress.model_validate_json(line) for line in response.text.splitlines()]
    assert [line.done for line in lines] == [False, False, True]


async def test_verify_ends_with_its_report(client: httpx.AsyncClient) -> None:
    lines = (await client.post("/verify", json={})).text.splitlines()
    assert [VerifyProgress.model_validate_json(line).report is not None for line in lines] == [False, False, True]


async def test_an_error_midway_is_the_last_line(client: httpx.AsyncClient, admin: FakeAdmin) -> None:
    admin.fail_verify_after = 1
    first, last = (await client.post("/verify", json={})).text.splitlines()
    assert VerifyProgress.model_validate_json(first)
    assert json.loads(last)["error"]["message"] == "the store went away"


async def test_an_error_at_once_is_a_status(client: httpx.AsyncClient, admin: FakeAdmin) -> None:
    admin.fail_verify_after = 0
    assert (await client.post("/verify", json={})).status_code == 409


async def test_messages_are_normalised_as_a_tenants_would_be(client: httpx.AsyncClient, admin: FakeAdmin) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "x"}, {"role": "user", "content": parts, "name": "n"}]
    for path in ("/inspect", "/prefetch", "/erase", "/pin", "/unpin"):
        assert (await client.post(path, json={"messages": messages, "tenant": "bob"})).status_code == 200
    expected = [{"role": "system", "content": "x"}, {"role": "user", "content": "ab"}]
    assert [(ref.tenant, ref.messages) for ref in admin.prompts] == [("bob", expected)] * 5


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/inspect", {}, "messages"),
        ("/inspect", {"prompt": "a", "messages": []}, "messages"),
        ("/inspect", {"messages": [{"role": "robot", "content": ""}]}, "messages[0].role"),
        ("/inspect", {"prompt": "a", "speed": 1}, "speed"),
        ("/prefetch", {"prompt": "a", "to": "tape"}, "to"),
        ("/evict", {"tier": "nvme"}, "tier"),
        ("/tenants", {"name": "No Spaces"}, "name"),
    ],
    ids=["no prompt", "both prompts", "wrong role", "unknown field", "wrong target", "wrong tier", "bad name"],
)
async def test_bad_requests_name_the_field(client: httpx.AsyncClient, path: str, body: Any, param: str) -> None:
    response = await client.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_an_existing_tenant_is_409(client: httpx.AsyncClient) -> None:
    response = await client.post("/tenants", json={"name": "alice"})
    assert response.status_code == 409
    assert "alice" in response.json()["error"]["message"]


async def test_leaving_a_verify_ends_it(admin: FakeAdmin, runtime: FakeRuntime) -> None:
    app = admin_app(service(runtime), admin)
    left = asyncio.Event()
    inbox = [{"type": "http.request", "body": b"{}", "more_body": False}]

    async def receive() -> Any:
        if inbox:
            return inbox.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message.get("body"):
            left.set()
            await asyncio.Event().wait()

    scope = {"type": "http", "method": "POST", "path": "/v1/admin/verify", "headers": [], "query_string": b""}
    await asyncio.wait_for(app(scope, receive, send), 5)
    assert admin.closed == ["verify"]


async def test_health_and_metrics_need_no_key_here(client: httpx.AsyncClient) -> None:
    client.base_url = httpx.URL("http://admin")
    assert (await client.get("/health")).json() == {"status": "ok"}
    assert b"kvctl_tier_bytes" in (await client.get("/metrics")).content
