"""The two answer shapes of the OpenAI API, chat and text: whole, and as chunks of a stream.

Invariant: every chunk of a call carries the same id, time, model and system fingerprint. Event loop only.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from appliance.api.answers import (
    Answer,
    ChatChoice,
    ChatLogprobs,
    ChatMessage,
    FunctionCalled,
    ScoredToken,
    TextChoice,
    ToolCalled,
)
from appliance.chat.calls import CallArguments, CallEvent, CallParser, CallStarted, Gathered, Said
from appliance.chat.tools import ToolUse
from appliance.server.base import ServedModel
from appliance.server.logprobs import text_logprobs

Scored = Sequence[ScoredToken] | None
"""Log-probabilities of the tokens of a piece of text; None when they were not asked for."""


@dataclass
class Collected:
    """One choice of a whole answer, as it grows."""

    texts: list[str] = field(default_factory=list)
    scored: list[ScoredToken] = field(default_factory=list)
    reason: str = ""


class Shape(ABC):
    """Answers of one call. `extras` are usage, timings and kvctl, where they belong into the answer."""

    prefix: str
    chunk_object: Literal["chat.completion.chunk", "text_completion"]
    whole_object: Literal["chat.completion", "text_completion"]

    def __init__(self, model: ServedModel, *, usage_follows: bool) -> None:
        """`usage_follows`: a stream ends with a chunk of its own for usage, and says so in every earlier one."""
        self.id = f"{self.prefix}{os.urandom(12).hex()}"
        self._created = int(time.time())
        self._model = model
        self._promise: dict[str, Any] = {"usage": None} if usage_follows else {}

    def _answer(
        self,
        kind: Literal["chat.completion", "chat.completion.chunk", "text_completion"],
        choices: Sequence[ChatChoice | TextChoice],
        extras: dict[str, Any],
    ) -> bytes:
        return Answer(
            id=self.id,
            object=kind,
            created=self._created,
            model=self._model.id,
            system_fingerprint=self._model.system_fingerprint,
            choices=choices,
            **extras,
        ).to_json()

    def _chunk(self, choice: ChatChoice | TextChoice) -> bytes:
        return self._answer(self.chunk_object, [choice], self._promise)

    def closing(self, extras: dict[str, Any]) -> bytes:
        """The chunk without choices that follows the last one when usage was asked for."""
        return self._answer(self.chunk_object, [], extras)

    def whole(self, choices: Sequence[Collected], wanted_logprobs: bool, extras: dict[str, Any]) -> bytes:
        made = [
            self._choice(index, "".join(c.texts), c.scored if wanted_logprobs else None, c.reason)
            for index, c in enumerate(choices)
        ]
        return self._answer(self.whole_object, made, extras)

    @abstractmethod
    def opening(self, index: int) -> list[bytes]:
        """Chunks that come before the first text of a choice."""

    @abstractmethod
    def deltas(self, index: int, text: str, scored: Scored) -> list[bytes]:
        """Chunks of new text; none if it tells nothing yet."""

    @abstractmethod
    def ending(self, index: int, reason: str, extras: dict[str, Any]) -> list[bytes]:
        """The last chunks of one choice."""

    @abstractmethod
    def _choice(self, index: int, text: str, scored: Scored, reason: str) -> ChatChoice | TextChoice: ...


class ChatShape(Shape):
    prefix = "chatcmpl-"
    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def __init__(self, model: ServedModel, tools: ToolUse, *, usage_follows: bool) -> None:
        super().__init__(model, usage_follows=usage_follows)
        self._tools = tools
        self._parsers: dict[int, CallParser] = {}

    def opening(self, index: int) -> list[bytes]:
        if self._tools.callable:
            self._parsers[index] = self._parser()
        return [self._delta(index, ChatMessage(role="assistant", content=""), None)]

    def deltas(self, index: int, text: str, scored: Scored) -> list[bytes]:
        parser = self._parsers.get(index)
        messages = _messages(parser.feed(text)) if parser else [ChatMessage(content=text)] if text else []
        if scored and not messages:
            messages = [ChatMessage(content="")]
        return [self._delta(index, message, None if n else scored) for n, message in enumerate(messages)]

    def ending(self, index: int, reason: str, extras: dict[str, Any]) -> list[bytes]:
        parser = self._parsers.get(index)
        held = _messages(parser.finish()) if parser else []
        last = ChatChoice(
            index=index,
            delta=ChatMessage(),
            logprobs=None,
            finish_reason=_reason(reason, bool(parser and parser.calls)),
        )
        chunks = [self._delta(index, message, None) for message in held]
        return [*chunks, self._answer(self.chunk_object, [last], {**self._promise, **extras})]

    def _choice(self, index: int, text: str, scored: Scored, reason: str) -> ChatChoice:
        message = ChatMessage(role="assistant", content=text)
        if self._tools.callable:
            parser, found = self._parser(), Gathered()
            found.add([*parser.feed(text), *parser.finish()])
            reason = _reason(reason, bool(found.calls))
            message = ChatMessage(role="assistant", content=found.text)
            if found.calls:
                calls = [
                    ToolCalled(
                        id=call_id(), type="function", function=FunctionCalled(name=c.name, arguments=c.arguments)
                    )
                    for c in found.calls
                ]
                message = ChatMessage(role="assistant", content=found.text or None, tool_calls=calls)
        return ChatChoice(index=index, message=message, logprobs=_chat_logprobs(scored), finish_reason=reason)

    def _delta(self, index: int, delta: ChatMessage, scored: Scored) -> bytes:
        return self._chunk(ChatChoice(index=index, delta=delta, logprobs=_chat_logprobs(scored), finish_reason=None))

    def _parser(self) -> CallParser:
        return CallParser(self._model.tool_format, self._tools.tools, parallel=self._tools.parallel)


class TextShape(Shape):
    prefix = "cmpl-"
    chunk_object = "text_completion"
    whole_object = "text_completion"

    def __init__(self, model: ServedModel, *, usage_follows: bool) -> None:
        super().__init__(model, usage_follows=usage_follows)
        self._offsets: dict[int, int] = {}

    def opening(self, index: int) -> list[bytes]:
        return []

    def deltas(self, index: int, text: str, scored: Scored) -> list[bytes]:
        if not (text or scored):
            return []
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + sum(len(token.token) for token in scored or ())
        logprobs = None if scored is None else text_logprobs(scored, offset)
        return [self._chunk(TextChoice(index=index, text=text, logprobs=logprobs, finish_reason=None))]

    def ending(self, index: int, reason: str, extras: dict[str, Any]) -> list[bytes]:
        last = TextChoice(index=index, text="", logprobs=None, finish_reason=reason)
        return [self._answer(self.chunk_object, [last], {**self._promise, **extras})]

    def _choice(self, index: int, text: str, scored: Scored, reason: str) -> TextChoice:
        logprobs = None if scored is None else text_logprobs(scored, 0)
        return TextChoice(index=index, text=text, logprobs=logprobs, finish_reason=reason)


def call_id() -> str:
    return f"call_{os.urandom(12).hex()}"


def _messages(events: Sequence[CallEvent]) -> list[ChatMessage]:
    """Deltas of what a parser found: the name first, then its arguments."""
    made = []
    for event in events:
        if isinstance(event, Said):
            made.append(ChatMessage(content=event.text))
        elif isinstance(event, CallStarted):
            function = FunctionCalled(name=event.name, arguments="")
            made.append(
                ChatMessage(
                    tool_calls=[ToolCalled(index=event.index, id=call_id(), type="function", function=function)]
                )
            )
        elif isinstance(event, CallArguments):
            function = FunctionCalled(arguments=event.fragment)
            made.append(ChatMessage(tool_calls=[ToolCalled(index=event.index, function=function)]))
    return made


def _reason(reason: str, called: bool) -> str:
    """An answer that was cut off stays cut off, also inside a call."""
    return "tool_calls" if called and reason == "stop" else reason


def _chat_logprobs(scored: Scored) -> ChatLogprobs | None:
    return None if scored is None else ChatLogprobs(content=list(scored), refusal=None)
