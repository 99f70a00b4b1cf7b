"""One conversation, one answer: what the Messages and the Responses API do alike.

A call of theirs is put as a call of the chat API, so that its fields, tools and forms mean the same everywhere. Its answer
is text and calls as they are found; a Writer gives them the shape of its API. Invariant: nothing is generated before the
whole call was found valid. Event loop only.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from appliance.api.chat_fields import conversation
from appliance.api.openai import ChatRequest
from appliance.chat.calls import CallEvent, CallParser, Gathered, Said
from appliance.chat.tools import ToolUse
from appliance.errors import RequestError
from appliance.runtime import Finished, GenerateRequest
from appliance.server import limits
from appliance.server.base import Service
from appliance.server.constrain import grammar_of
from appliance.server.errors import ApiError
from appliance.server.generate import Batch, Tally, generate
from appliance.server.stream import COMMENT, Streamed, unless_disconnected
from appliance.server.tool_use import tool_use
from appliance.types import Tokens


class Writer(ABC):
    """The shape of one answer."""

    ping = COMMENT
    """What is sent while there is nothing to say."""

    @abstractmethod
    def opening(self) -> list[bytes]:
        """Events that come before anything was found."""

    @abstractmethod
    def found(self, event: CallEvent) -> list[bytes]: ...

    @abstractmethod
    def ending(self, tally: Tally, extras: dict[str, Any]) -> list[bytes]:
        """The last events. `extras` are timings and kvctl."""

    @abstractmethod
    def whole(self, found: Gathered, tally: Tally, extras: dict[str, Any]) -> bytes: ...

    @abstractmethod
    def failed(self, error: ApiError) -> bytes:
        """The last event, if the answer breaks off."""


@dataclass(frozen=True)
class Read:
    """A call, checked and tokenized."""

    call: ChatRequest
    prompt: Tokens
    tools: ToolUse
    grammar: str | None


@contextmanager
def named(names: Mapping[str, str]) -> Iterator[None]:
    """What is wrong with a field is said under the name that the caller's API has for it."""
    try:
        yield
    except RequestError as error:
        theirs, said = names.get(error.param or ""), str(error)
        if error.param is None or theirs is None:
            raise
        if said.startswith(error.param):
            said = theirs + said.removeprefix(error.param)
        raise RequestError(said, param=theirs, code=error.code, status=error.status) from None


async def read(service: Service, call: ChatRequest) -> Read:
    """Checked against the model, and tokenized as its template says."""
    limits.check_model(call.model, service.model)
    tools = tool_use(call, service.model)
    grammar = await asyncio.to_thread(grammar_of, call, service.model, tools)
    listed = [tool.for_template() for tool in tools.tools]
    prompt = await service.runtime.render(conversation(call.messages), listed, call.template_options)
    return Read(call, prompt, tools, grammar)


def capped(asked: Read, context_tokens: int) -> Read:
    """The same with the most tokens to generate that fit, where the client has to name a number and cannot know."""
    fits = max(1, context_tokens - len(asked.prompt))
    limit = min(asked.call.token_limit or fits, fits)
    call = asked.call.model_copy(update={"max_completion_tokens": limit})
    return Read(call, asked.prompt, asked.tools, asked.grammar)


async def answer(
    service: Service,
    request: Request,
    asked: Read,
    call_id: str,
    make: Callable[[GenerateRequest], Writer],
    retention_s: float | None,
) -> Response:
    """`make` is called once it is certain that this will be generated."""
    call = asked.call
    most = limits.completion_tokens(call, len(asked.prompt), service.model, "messages")
    generation = GenerateRequest(
        call_id,
        limits.namespace(call, request.state.tenant),
        asked.prompt,
        limits.sampling(call, most, service.model, 0, asked.grammar),
        call.prompt_cache_key,
        retention_s,
        in_pieces=bool(call.stream),
    )
    explain = request.headers.get("x-kvctl-explain") == "1"
    answering = _Answering(service, asked.tools, generation, make(generation), explain)
    if call.stream:
        return Streamed(answering.stream(), "text/event-stream", answering.writer.failed, answering.writer.ping)
    return Response(await unless_disconnected(request.receive, answering.whole()), media_type="application/json")


class _Answering:
    """One call on its way to one response."""

    def __init__(
        self, service: Service, tools: ToolUse, generation: GenerateRequest, writer: Writer, explain: bool
    ) -> None:
        self.writer = writer
        self._service = service
        self._parser = (
            CallParser(service.model.tool_format, tools.tools, parallel=tools.parallel) if tools.callable else None
        )
        self._batch = Batch([generation], 1)
        self._tally = Tally(self._batch)
        self._explain = explain

    async def whole(self) -> bytes:
        found = Gathered()
        async with aclosing(self._found()) as events:
            async for event in events:
                found.add(event)
        return self.writer.whole(found, self._tally, self._tally.extras(explain=self._explain))

    async def stream(self) -> AsyncGenerator[bytes, None]:
        begun = False
        async with aclosing(self._found()) as events:
            async for event in events:
                parts = [] if begun else self.writer.opening()
                begun = True
                for found in event:
                    parts += self.writer.found(found)
                if parts:
                    yield b"".join(parts)
        yield b"".join(self.writer.ending(self._tally, self._tally.extras(explain=self._explain)))

    async def _found(self) -> AsyncGenerator[list[CallEvent], None]:
        """What each piece of the answer brings to light, be it nothing."""
        parser = self._parser
        async with aclosing(generate(self._service.runtime, self._service.metrics, self._batch)) as events:
            async for _, happened in events:
                if isinstance(happened, Finished):
                    self._tally.finished[0] = happened
                    yield parser.finish() if parser else []
                elif parser:
                    yield parser.feed(happened.text)
                else:
                    yield [Said(happened.text)] if happened.text else []


def finished(tally: Tally) -> Finished:
    """Of the one answer."""
    return tally.finished[0]
