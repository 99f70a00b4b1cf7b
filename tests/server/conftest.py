from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from appliance.server.app import public_app
from appliance.server.base import Service
from tests.support.fake_runtime import FakeRuntime, service

ALICE = {"authorization": "Bearer key-of-alice"}


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


@pytest.fixture
def served(runtime: FakeRuntime) -> Service:
    return service(runtime)


@pytest.fixture
async def client(served: Service) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(public_app(served))
    async with httpx.AsyncClient(transport=transport, base_url="http://appliance", headers=ALICE) as client:
        yield client
