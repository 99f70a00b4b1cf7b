"""/v1/messages and /v1/messages/count_tokens.

Invariant: nothing is generated before the whole call was found valid. Event loop only.
"""

from __future__ import annotations

import os

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from appliance.api.anthropic import CountRequest, MessagesRequest, TokenCount
from appliance.api.openai import ChatRequest
from appliance.runtime import GenerateRequest
from appliance.server.anthropic_shape import MessageWriter
from appliance.server.base import Service
from appliance.server.body import read_request, validate
from appliance.server.converse import Read, answer, capped, named, read
from appliance.server.openai_routes import json_response

NAMES = {"response_format": "output_config.format"}
"""Where a field of the chat API is here."""


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1/messages")
    model = service.model

    async def _read(call: CountRequest) -> Read:
        with named(NAMES):
            return await read(service, validate(ChatRequest, call.for_chat()))

    @routes.post("")
    async def messages(request: Request) -> Response:
        call = await read_request(request, MessagesRequest, service.max_body_bytes)
        asked = capped(await _read(call), model.context_tokens)
        call_id = f"msg_{os.urandom(12).hex()}"

        def writer(generation: GenerateRequest) -> MessageWriter:
            return MessageWriter(
                model,
                call_id,
                request.state.request_id,
                len(generation.prompt),
                marked=bool(call.marks),
                cut=generation.sampling.max_tokens < call.max_tokens,
            )

        return await answer(service, request, asked, call_id, writer, call.retention_s)

    @routes.post("/count_tokens")
    async def count(request: Request) -> Response:
        call = await read_request(request, CountRequest, service.max_body_bytes)
        asked = await _read(call)
        return json_response(TokenCount(input_tokens=len(asked.prompt)))

    return routes
