"""The admin API of api/control.py. It is mounted on the unix socket only; `listen.py` checks who connects.

Invariant: a prompt given here is normalised exactly as a tenant's would be, so that it has the same tokens. Event loop only.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from appliance.api.chat_fields import conversation
from appliance.api.control import EvictRequest, PrefetchRequest, PromptRef, TenantAdd, TenantQuota, VerifyRequest
from appliance.api.openai import ChatRequest
from appliance.errors import RequestError
from appliance.server.base import Admin
from appliance.server.body import read_request, validate
from appliance.server.stream import json_lines
from appliance.server.tool_use import for_template

RefT = TypeVar("RefT", bound=PromptRef)


def router(admin: Admin, max_body_bytes: int) -> APIRouter:
    routes = APIRouter(prefix="/v1/admin")

    @routes.get("/status")
    async def status() -> Response:
        return _json(await admin.status())

    @routes.get("/store")
    async def store() -> Response:
        return _json(await admin.store())

    @routes.get("/requests")
    async def requests() -> Response:
        return _json(await admin.requests(None))

    @routes.get("/requests/{call_id:path}")
    async def of_call(call_id: str) -> Response:
        return _json(await admin.requests(call_id))

    @routes.get("/sessions")
    async def sessions() -> Response:
        return _json(await admin.sessions())

    @routes.post("/inspect")
    async def inspect(request: Request) -> Response:
        return _json(await admin.inspect(_normalised(await read_request(request, PromptRef, max_body_bytes))))

    @routes.post("/prefetch")
    async def prefetch(request: Request) -> Response:
        call = _normalised(await read_request(request, PrefetchRequest, max_body_bytes))
        return json_lines(_lines(admin.prefetch(call)))

    @routes.post("/verify")
    async def verify(request: Request) -> Response:
        return json_lines(_lines(admin.verify(await read_request(request, VerifyRequest, max_body_bytes))))

    @routes.post("/evict")
    async def evict(request: Request) -> Response:
        return _json(await admin.evict(await read_request(request, EvictRequest, max_body_bytes)))

    @routes.get("/trace")
    async def trace() -> Response:
        return json_lines(_lines(admin.trace()))

    @routes.post("/erase")
    async def erase(request: Request) -> Response:
        return _json(await admin.erase(_normalised(await read_request(request, PromptRef, max_body_bytes))))

    @routes.post("/pin")
    async def pin(request: Request) -> Response:
        return _json(await admin.pin(_normalised(await read_request(request, PromptRef, max_body_bytes))))

    @routes.post("/unpin")
    async def unpin(request: Request) -> Response:
        return _json(await admin.unpin(_normalised(await read_request(request, PromptRef, max_body_bytes))))

    @routes.get("/tenants")
    async def tenants() -> Response:
        return _json(await admin.tenants())

    @routes.post("/tenants")
    async def add_tenant(request: Request) -> Response:
        return _json(await admin.add_tenant(await read_request(request, TenantAdd, max_body_bytes)))

    @routes.post("/quota")
    async def quota(request: Request) -> Response:
        return _json(await admin.set_quota(await read_request(request, TenantQuota, max_body_bytes)))

    return routes


def _json(body: BaseModel) -> Response:
    return Response(body.model_dump_json(), media_type="application/json")


async def _lines(source: AsyncGenerator[BaseModel | None, None]) -> AsyncGenerator[bytes, None]:
    """None is an empty line: a sign of life."""
    async with aclosing(source):
        async for item in source:
            yield (b"" if item is None else item.model_dump_json().encode()) + b"\n"


def _normalised(ref: RefT) -> RefT:
    session = ref.session if isinstance(ref, PrefetchRequest) else None
    if [ref.messages, ref.prompt, session].count(None) != 2:
        either = "messages, prompt or session" if isinstance(ref, PrefetchRequest) else "messages or prompt"
        raise RequestError(f"give one of {either}", param="messages")
    if ref.messages is None:
        return ref
    call = validate(ChatRequest, {"messages": ref.messages, "tools": ref.tools})
    return ref.model_copy(update={"messages": conversation(call.messages), "tools": for_template(call)})
