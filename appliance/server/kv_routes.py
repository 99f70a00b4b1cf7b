"""/v1/kv: what a tenant may do about its own KV. Prefetch: bring a prompt up before it is asked about.

Invariant: nothing is done before the call was found valid; a client that leaves ends its prefetch. Another tenant's
session is answered as one that never was. Event loop only.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from appliance.api.chat_fields import conversation
from appliance.api.control import PrefetchProgress
from appliance.api.kv import PrefetchCall
from appliance.server import limits
from appliance.server.base import Service
from appliance.server.body import read_request
from appliance.server.stream import json_lines, unless_disconnected
from appliance.server.tool_use import for_template
from appliance.types import Namespace, Tier, Tokens


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1/kv")

    @routes.post("/prefetch")
    async def prefetch(request: Request) -> Response:
        call = await read_request(request, PrefetchCall, service.max_body_bytes)
        limits.check_model(call.model, service.model)
        ns = limits.namespace(call, request.state.tenant)
        tokens = await _tokens(service, call, ns)
        steps = service.prefetches.run(ns, tokens, to=Tier(call.to), compute=call.compute)
        if call.stream:
            return json_lines(_lines(steps))
        last = await unless_disconnected(request.receive, _last(steps))
        return Response(last.model_dump_json(), media_type="application/json")

    return routes


async def _tokens(service: Service, call: PrefetchCall, ns: Namespace) -> Tokens:
    runtime, param = service.runtime, "messages"
    if call.messages:
        tokens = await runtime.render(conversation(call.messages), for_template(call), call.template_options)
    elif call.prompt is not None:
        param = "prompt"
        tokens = call.prompt if isinstance(call.prompt, Tokens) else await runtime.tokenize(call.prompt)
        limits.check_vocabulary(tokens, service.model, param)
    else:
        return service.prefetches.session(ns, call.prompt_cache_key or "")
    limits.check_context(tokens, service.model, param)
    return tokens


async def _lines(steps: AsyncGenerator[PrefetchProgress, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(steps):
        async for step in steps:
            yield step.model_dump_json().encode() + b"\n"


async def _last(steps: AsyncGenerator[PrefetchProgress, None]) -> PrefetchProgress:
    async with aclosing(steps):
        return [step async for step in steps][-1]
