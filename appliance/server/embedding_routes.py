"""/v1/embeddings: texts to unit vectors of the served model.

Invariant: nothing is computed before every text was found to fit. Event loop only.
"""

from __future__ import annotations

import base64
from array import array
from collections.abc import Sequence

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from appliance.api.answers import Embedding, EmbeddingList, EmbeddingUsage
from appliance.api.openai import EmbeddingRequest
from appliance.errors import RequestError
from appliance.server import limits
from appliance.server.base import ServedModel, Service
from appliance.server.body import read_request
from appliance.server.stream import unless_disconnected
from appliance.types import Tokens


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1")

    @routes.post("/embeddings")
    async def embeddings(request: Request) -> Response:
        call = await read_request(request, EmbeddingRequest, service.max_body_bytes)
        limits.check_model(call.model, service.model)
        _check_width(call, service.model)
        texts = [
            # a text is content: nothing in it becomes a special token
            text if isinstance(text, Tokens) else await service.runtime.tokenize(text, parse_special=False)
            for text in call.input
        ]
        for text in texts:
            _check(text, service.model)
        answer = _answer(service, request.state.tenant, call, texts)
        return Response(await unless_disconnected(request.receive, answer), media_type="application/json")

    return routes


async def _answer(service: Service, tenant: str, call: EmbeddingRequest, texts: Sequence[Tokens]) -> bytes:
    """One after the other: who asks for many waits longer, not the others."""
    packed = call.encoding_format == "base64"
    made = []
    for index, text in enumerate(texts):
        vector = await service.runtime.embed(tenant, text)
        embedding = base64.b64encode(vector).decode() if packed else array("f", vector).tolist()
        made.append(Embedding(object="embedding", index=index, embedding=embedding))
    tokens = sum(map(len, texts))
    usage = EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)
    return EmbeddingList(object="list", data=made, model=service.model.id, usage=usage).to_json()


def _check_width(call: EmbeddingRequest, model: ServedModel) -> None:
    if not model.embedding_width:
        raise RequestError("this model makes no embeddings", code="unsupported_model")
    if call.dimensions not in (None, model.embedding_width):
        raise RequestError(
            f"dimensions: this model's embeddings have {model.embedding_width}; leave dimensions out",
            param="dimensions",
        )


def _check(text: Tokens, model: ServedModel) -> None:
    limits.check_vocabulary(text, model, "input")
    if not text:
        raise RequestError("input: a text is empty", param="input", code="invalid_value")
    if len(text) > model.context_tokens:
        raise RequestError(
            f"the context holds {model.context_tokens} tokens, but a text has {len(text)}; send it in parts",
            param="input",
            code="context_length_exceeded",
        )
