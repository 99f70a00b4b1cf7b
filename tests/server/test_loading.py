"""Before the model is loaded every request is answered: not yet, come back."""

from __future__ import annotations

import httpx
import pytest
from starlette.types import ASGIApp

from appliance.api.control import Loading
from appliance.server import loading
from tests.support.fake_runtime import LOADING

PUBLIC = loading.public_app(lambda: LOADING)
ADMIN = loading.admin_app(lambda: LOADING)


async def answer(app: ASGIApp, method: str, path: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://appliance") as client:
        return await client.request(method, path)


@pytest.mark.parametrize("app", [PUBLIC, ADMIN], ids=["public", "admin"])
async def test_health_is_llama_servers(app: ASGIApp) -> None:
    response = await answer(app, "GET", "/health")
    assert (response.status_code, response.json()) == (503, {"status": "loading model"})
    assert int(response.headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    ("app", "method", "path"),
    [
        (PUBLIC, "POST", "/v1/chat/completions"),
        (PUBLIC, "GET", "/v1/models"),
        (PUBLIC, "GET", "/v1/admin/status"),
        (ADMIN, "POST", "/v1/admin/tenants"),
    ],
)
async def test_everything_else_is_an_openai_error_that_says_how_far_it_is(app: ASGIApp, method: str, path: str) -> None:
    response = await answer(app, method, path)
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "the appliance is loading fake (42%)"
    assert int(response.headers["retry-after"]) >= 1
    assert response.headers["x-request-id"]


async def test_the_admin_socket_tells_the_state() -> None:
    response = await answer(ADMIN, "GET", "/v1/admin/status")
    assert response.status_code == 200
    assert Loading.model_validate_json(response.content) == LOADING
