"""/v1/responses.

Invariant: nothing is generated before the whole call was found valid; nothing of an answer is kept. Event loop only.
"""

from __future__ import annotations

import os

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from appliance.api.openai import ChatRequest
from appliance.api.responses import ResponsesRequest
from appliance.server.base import Service
from appliance.server.body import read_request, validate
from appliance.server.converse import answer, named, read
from appliance.server.responses_shape import ResponseWriter

NAMES = {"response_format": "text.format", "max_tokens": "max_output_tokens", "messages": "input"}
"""Where a field of the chat API is here."""


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1")

    @routes.post("/responses")
    async def responses(request: Request) -> Response:
        call = await read_request(request, ResponsesRequest, service.max_body_bytes)
        call_id = f"resp_{os.urandom(12).hex()}"
        writer = ResponseWriter(service.model, call_id, call)
        with named(NAMES):
            asked = await read(service, validate(ChatRequest, call.for_chat()))
            return await answer(service, request, asked, call_id, lambda _: writer, call.retention_s)

    return routes
