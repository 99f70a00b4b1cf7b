"""Answers of the Messages API: whole, and as the events of a stream.

Invariant: a stream's blocks are numbered from 0, and each ends before the next begins. One writer belongs to one answer.
Event loop only.
"""

from __future__ import annotations

import json
import os
from typing import Any

from appliance.api.anthropic import CalledBlock, MessageAnswer, MessageUsage, SaidBlock, StopReason
from appliance.chat.calls import CallArguments, CallEvent, CallStarted, Gathered, Said
from appliance.server.base import ServedModel
from appliance.server.converse import Writer, finished
from appliance.server.errors import ApiError
from appliance.server.generate import Tally
from appliance.server.stream import named_event
from appliance.types import FinishReason

PING = named_event("ping", b'{"type": "ping"}')


class MessageWriter(Writer):
    ping = PING

    def __init__(
        self, model: ServedModel, call_id: str, request_id: str, prompt_tokens: int, *, marked: bool, cut: bool
    ) -> None:
        """`marked`: the call says what to keep; `cut`: the context ends before what it asked for."""
        self._model = model
        self._id = call_id
        self._request_id = request_id
        self._prompt_tokens = prompt_tokens
        self._marked = marked
        self._cut = cut
        self._blocks = 0
        self._open: type[CallEvent] | None = None
        self._calls = 0

    def opening(self) -> list[bytes]:
        """Where the prompt comes from is known at the end: until then all of it counts as input."""
        usage = MessageUsage(
            input_tokens=self._prompt_tokens, cache_creation_input_tokens=0, cache_read_input_tokens=0, output_tokens=0
        )
        message = json.loads(self._message([], None, None, usage, {}))
        return [_event("message_start", message=message), PING]

    def found(self, event: CallEvent) -> list[bytes]:
        if isinstance(event, Said):
            opened = [] if self._open is Said else self._begin(Said, {"type": "text", "text": ""})
            return [*opened, self._delta({"type": "text_delta", "text": event.text})]
        if isinstance(event, CallStarted):
            self._calls += 1
            return self._begin(CallStarted, {"type": "tool_use", "id": _call_id(), "name": event.name, "input": {}})
        if isinstance(event, CallArguments):
            return [self._delta({"type": "input_json_delta", "partial_json": event.fragment})]
        return self._end()

    def ending(self, tally: Tally, extras: dict[str, Any]) -> list[bytes]:
        reason, stop = self._reason(tally, self._calls)
        return [
            *self._end(),
            _event(
                "message_delta",
                delta={"stop_reason": reason, "stop_sequence": stop},
                usage=self._usage(tally).model_dump(),
                **{name: value.model_dump() for name, value in extras.items()},
            ),
            _event("message_stop"),
        ]

    def whole(self, found: Gathered, tally: Tally, extras: dict[str, Any]) -> bytes:
        content: list[SaidBlock | CalledBlock] = [SaidBlock(type="text", text=found.text)] if found.text else []
        for call in found.calls:
            content.append(CalledBlock(type="tool_use", id=_call_id(), name=call.name, input=_input(call.arguments)))
        reason, stop = self._reason(tally, len(found.calls))
        return self._message(content, reason, stop, self._usage(tally), extras)

    def failed(self, error: ApiError) -> bytes:
        return named_event("error", error.to_anthropic_json(self._request_id))

    def _message(
        self,
        content: list[SaidBlock | CalledBlock],
        reason: StopReason | None,
        stop: str | None,
        usage: MessageUsage,
        extras: dict[str, Any],
    ) -> bytes:
        return MessageAnswer(
            id=self._id,
            type="message",
            role="assistant",
            model=self._model.id,
            content=content,
            stop_reason=reason,
            stop_sequence=stop,
            usage=usage,
            **extras,
        ).to_json()

    def _usage(self, tally: Tally) -> MessageUsage:
        end = finished(tally)
        computed = end.sources.computed
        return MessageUsage(
            input_tokens=0 if self._marked else computed,
            cache_creation_input_tokens=computed if self._marked else 0,
            cache_read_input_tokens=end.sources.cached,
            output_tokens=end.completion_tokens,
        )

    def _reason(self, tally: Tally, calls: int) -> tuple[StopReason, str | None]:
        """An answer that was cut off stays cut off, also inside a call."""
        end = finished(tally)
        if end.reason is FinishReason.LENGTH:
            return "model_context_window_exceeded" if self._cut else "max_tokens", None
        if end.stop is not None:
            return "stop_sequence", end.stop
        return "tool_use" if calls else "end_turn", None

    def _begin(self, kind: type[CallEvent], block: dict[str, Any]) -> list[bytes]:
        ended = self._end()
        self._open = kind
        return [*ended, _event("content_block_start", index=self._blocks, content_block=block)]

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._blocks, delta=delta)

    def _end(self) -> list[bytes]:
        if self._open is None:
            return []
        self._open, index = None, self._blocks
        self._blocks += 1
        return [_event("content_block_stop", index=index)]


def _event(kind: str, **fields: Any) -> bytes:
    return named_event(kind, json.dumps({"type": kind, **fields}, ensure_ascii=False).encode())


def _call_id() -> str:
    return f"toolu_{os.urandom(12).hex()}"


def _input(arguments: str) -> dict[str, Any]:
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):  # nested beyond what can be read
        return {}
    return value if isinstance(value, dict) else {}
