"""/v1: chat completions, completions, models. A call is read, checked, tokenized, generated and put into its shape.

Invariant: nothing is generated before the whole call was found valid; a client that leaves ends what it asked for.
Event loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime, timezone

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from appliance.api.answers import Body, Model, ModelList
from appliance.api.openai import MAX_CHOICES, ChatRequest, CompletionRequest, GenerationRequest
from appliance.errors import RequestError
from appliance.runtime import Chunk, GenerateRequest
from appliance.server import limits
from appliance.server.base import ServedModel, Service
from appliance.server.body import read_request
from appliance.server.constrain import grammar_of
from appliance.server.converse import read
from appliance.server.generate import Batch, Tally, generate
from appliance.server.logprobs import Pieces
from appliance.server.shapes import ChatShape, Collected, Shape, TextShape
from appliance.server.stream import event, event_stream, unless_disconnected
from appliance.types import Tokens


def json_response(body: Body) -> Response:
    return Response(body.to_json(), media_type="application/json")


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1")
    pieces = Pieces(service.runtime)
    card = _card(service.model)

    @routes.post("/chat/completions")
    async def chat(request: Request) -> Response:
        call = await read_request(request, ChatRequest, service.max_body_bytes)
        if call.top_logprobs is not None and not call.logprobs:
            raise RequestError("top_logprobs: needs logprobs to be true", param="top_logprobs")
        asked = await read(service, call)
        shape = ChatShape(service.model, asked.tools, usage_follows=_usage_wanted(call))
        return await _answer(request, call, [asked.prompt], shape, "messages", asked.grammar)

    @routes.post("/completions")
    async def completions(request: Request) -> Response:
        call = await read_request(request, CompletionRequest, service.max_body_bytes)
        limits.check_model(call.model, service.model)
        if len(call.prompt) * (call.n or 1) > MAX_CHOICES:
            raise RequestError(f"prompt: at most {MAX_CHOICES} completions can be asked for at once", param="prompt")
        grammar = await asyncio.to_thread(grammar_of, call, service.model)
        prompts = [p if isinstance(p, Tokens) else await service.runtime.tokenize(p) for p in call.prompt]
        for prompt in prompts:
            limits.check_vocabulary(prompt, service.model, "prompt")
        shape = TextShape(service.model, usage_follows=_usage_wanted(call))
        return await _answer(request, call, prompts, shape, "prompt", grammar)

    async def _answer(
        request: Request,
        call: GenerationRequest,
        prompts: Sequence[Tokens],
        shape: Shape,
        param: str,
        grammar: str | None,
    ) -> Response:
        batch = _batch(service, request.state.tenant, call, prompts, shape.id, param, grammar)
        answering = _Answering(service, pieces, call, batch, shape, request.headers.get("x-kvctl-explain") == "1")
        if call.stream:
            return event_stream(answering.stream())
        return Response(await unless_disconnected(request.receive, answering.whole()), media_type="application/json")

    @routes.get("/models")
    async def models() -> Response:
        return json_response(ModelList(object="list", data=[card], first_id=card.id, last_id=card.id, has_more=False))

    @routes.get("/models/{name:path}")
    async def model(name: str) -> Response:
        limits.check_model(name, service.model)
        return json_response(card)

    return routes


def _card(model: ServedModel) -> Model:
    return Model(
        id=model.id,
        object="model",
        created=model.created,
        owned_by="kvctl",
        max_model_len=model.context_tokens,
        type="model",
        display_name=model.description,
        created_at=datetime.fromtimestamp(model.created, timezone.utc),
    )


def _usage_wanted(call: GenerationRequest) -> bool:
    """Whether a stream ends with a chunk for usage."""
    return bool(call.stream and call.stream_options and call.stream_options.include_usage)


def _batch(
    service: Service,
    tenant: str,
    call: GenerationRequest,
    prompts: Sequence[Tokens],
    call_id: str,
    param: str,
    grammar: str | None,
) -> Batch:
    ns = limits.namespace(call, tenant)
    n = call.n or 1
    requests: list[GenerateRequest] = []
    for prompt in prompts:
        most = limits.completion_tokens(call, len(prompt), service.model, param)
        for choice in range(n):
            sampling = limits.sampling(call, most, service.model, choice, grammar)
            requests.append(
                GenerateRequest(
                    f"{call_id}-{len(requests)}",
                    ns,
                    prompt,
                    sampling,
                    call.prompt_cache_key,
                    call.retention_s,
                    # of several choices the first one's first text tells the others to start
                    in_pieces=bool(call.stream) or n > 1,
                )
            )
    return Batch(requests, n)


@dataclass(frozen=True)
class _Answering:
    """One call on its way to one response."""

    service: Service
    pieces: Pieces
    call: GenerationRequest
    batch: Batch
    shape: Shape
    explain: bool

    @property
    def _wants_logprobs(self) -> bool:
        return self.call.wanted_logprobs is not None

    async def whole(self) -> bytes:
        tally = Tally(self.batch)
        choices = [Collected() for _ in self.batch.requests]
        async with aclosing(generate(self.service.runtime, self.service.metrics, self.batch)) as events:
            async for index, happened in events:
                if isinstance(happened, Chunk):
                    choices[index].texts.append(happened.text)
                    choices[index].scored += await self.pieces.scored(happened)
                else:
                    choices[index].reason = happened.reason.value
                    tally.finished[index] = happened
        return self.shape.whole(
            choices, self._wants_logprobs, {"usage": tally.usage(), **tally.extras(explain=self.explain)}
        )

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events. Usage, if wanted, comes in a chunk of its own; timings come in whatever chunk is last."""
        tally = Tally(self.batch)
        usage_wanted = _usage_wanted(self.call)
        begun: set[int] = set()
        async with aclosing(generate(self.service.runtime, self.service.metrics, self.batch)) as events:
            async for index, happened in events:
                parts: list[bytes] = []
                if index not in begun:
                    begun.add(index)
                    parts += self.shape.opening(index)
                if isinstance(happened, Chunk):
                    scored = await self.pieces.scored(happened) if self._wants_logprobs else None
                    parts += self.shape.deltas(index, happened.text, scored)
                else:
                    tally.finished[index] = happened
                    last = tally.complete and not usage_wanted
                    parts += self.shape.ending(
                        index, happened.reason.value, tally.extras(explain=self.explain) if last else {}
                    )
                if parts:
                    yield b"".join(map(event, parts))
        if usage_wanted:
            yield event(self.shape.closing({"usage": tally.usage(), **tally.extras(explain=self.explain)}))
        yield event(b"[DONE]")
