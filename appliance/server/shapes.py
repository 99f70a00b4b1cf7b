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

from appliance.api.answers import Answer, ChatChoice, ChatLogprobs, ChatMessage, ScoredToken, TextChoice
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

    def __init__(self, model: ServedModel) -> None:
        self.id = f"{self.prefix}{os.urandom(12).hex()}"
        self._created = int(time.time())
        self._model = model

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

    def chunk(self, choice: ChatChoice | TextChoice) -> bytes:
        return self._answer(self.chunk_object, [choice], {})

    def ending(self, index: int, reason: str, extras: dict[str, Any]) -> bytes:
        """The last chunk of one choice."""
        return self._answer(self.chunk_object, [self._end(index, reason)], extras)

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
    def opening(self, index: int) -> bytes | None:
        """The chunk that comes before the first text of a choice, if the shape has one."""

    @abstractmethod
    def delta(self, index: int, text: str, scored: Scored) -> bytes: ...

    @abstractmethod
    def _end(self, index: int, reason: str) -> ChatChoice | TextChoice: ...

    @abstractmethod
    def _choice(self, index: int, text: str, scored: Scored, reason: str) -> ChatChoice | TextChoice: ...


class ChatShape(Shape):
    prefix = "chatcmpl-"
    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def opening(self, index: int) -> bytes:
        first = ChatMessage(role="assistant", content="")
        return self.chunk(ChatChoice(index=index, delta=first, logprobs=None, finish_reason=None))

    def delta(self, index: int, text: str, scored: Scored) -> bytes:
        delta = ChatMessage(content=text)
        return self.chunk(ChatChoice(index=index, delta=delta, logprobs=_chat_logprobs(scored), finish_reason=None))

    def _end(self, index: int, reason: str) -> ChatChoice:
        return ChatChoice(index=index, delta=ChatMessage(), logprobs=None, finish_reason=reason)

    def _choice(self, index: int, text: str, scored: Scored, reason: str) -> ChatChoice:
        message = ChatMessage(role="assistant", content=text)
        return ChatChoice(index=index, message=message, logprobs=_chat_logprobs(scored), finish_reason=reason)


class TextShape(Shape):
    prefix = "cmpl-"
    chunk_object = "text_completion"
    whole_object = "text_completion"

    def __init__(self, model: ServedModel) -> None:
        super().__init__(model)
        self._offsets: dict[int, int] = {}

    def opening(self, index: int) -> None:
        return None

    def delta(self, index: int, text: str, scored: Scored) -> bytes:
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + sum(len(token.token) for token in scored or ())
        logprobs = None if scored is None else text_logprobs(scored, offset)
        return self.chunk(TextChoice(index=index, text=text, logprobs=logprobs, finish_reason=None))

    def _end(self, index: int, reason: str) -> TextChoice:
        return TextChoice(index=index, text="", logprobs=None, finish_reason=reason)

    def _choice(self, index: int, text: str, scored: Scored, reason: str) -> TextChoice:
        logprobs = None if scored is None else text_logprobs(scored, 0)
        return TextChoice(index=index, text=text, logprobs=logprobs, finish_reason=reason)


def _chat_logprobs(scored: Scored) -> ChatLogprobs | None:
    return None if scored is None else ChatLogprobs(content=list(scored), refusal=None)
