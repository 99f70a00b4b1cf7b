"""llama-server's own paths: /health, /props, /tokenize, /detokenize; and /metrics.

Invariant: /health alone needs no key, and says nothing but the state. Event loop only.
"""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from appliance.api.answers import Content, TokenList
from appliance.api.openai import DetokenizeRequest, TokenizeRequest
from appliance.server import limits
from appliance.server.base import Service
from appliance.server.body import read_request
from appliance.server.metrics import CONTENT_TYPE, Metrics
from appliance.server.openai_routes import json_response

RETRY_AFTER_S = 2
_HEALTH = {"loading": "loading model"}
"""Where llama-server has a word of its own for a state."""


def not_ready(state: str) -> Response:
    return JSONResponse({"status": _HEALTH.get(state, state)}, 503, headers={"retry-after": str(RETRY_AFTER_S)})


def health_router(state: Callable[[], str]) -> APIRouter:
    routes = APIRouter()

    @routes.get("/health")
    async def health() -> Response:
        now = state()
        return JSONResponse({"status": "ok"}) if now == "ready" else not_ready(now)

    return routes


def metrics_router(metrics: Metrics) -> APIRouter:
    routes = APIRouter()

    @routes.get("/metrics")
    async def scrape() -> Response:
        return Response(await metrics.scrape(), headers={"content-type": CONTENT_TYPE})

    return routes


def router(service: Service) -> APIRouter:
    routes = APIRouter()
    model = service.model

    @routes.get("/props")
    async def props() -> Response:
        return JSONResponse(
            {
                "default_generation_settings": {"n_ctx": model.context_tokens},
                "total_slots": model.slots,
                "model_alias": model.id,
                "model_description": model.description,
                "build_info": model.build,
                "modalities": {"vision": False, "audio": False},
            }
        )

    @routes.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        call = await read_request(request, TokenizeRequest, service.max_body_bytes)
        tokens = await service.runtime.tokenize(
            call.content, add_special=call.add_special, parse_special=call.parse_special
        )
        return json_response(TokenList(tokens=tokens.ids()))

    @routes.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        call = await read_request(request, DetokenizeRequest, service.max_body_bytes)
        limits.check_vocabulary(call.tokens, model, "tokens")
        return json_response(Content(content=await service.runtime.detokenize(call.tokens)))

    return routes
