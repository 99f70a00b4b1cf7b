"""Answers of the Responses API: whole, and as the events of a stream.

Invariant: events are numbered from 0; an output item ends before the next begins, and what its last event says is what its
deltas add up to. One writer belongs to one answer. Event loop only.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from appliance.api.responses import (
    CalledItem,
    InputDetails,
    OutputDetails,
    ResponseAnswer,
    ResponsesRequest,
    ResponseUsage,
    SaidItem,
    Status,
    TextPart,
)
from appliance.chat.calls import CallArguments, CallEvent, CallStarted, Gathered, Said
from appliance.server.base import ServedModel
from appliance.server.converse import Writer, finished
from appliance.server.errors import ApiError
from appliance.server.generate import Tally
from appliance.server.stream import named_event
from appliance.types import FinishReason


class ResponseWriter(Writer):
    def __init__(self, model: ServedModel, call_id: str, call: ResponsesRequest) -> None:
        self._model = model
        self._id = call_id
        self._call = call
        self._created = int(time.time())
        self._sent = 0
        self._output: list[SaidItem | CalledItem] = []
        """Whole items."""
        self._item: SaidItem | CalledItem | None = None
        """The one that grows, as it was announced."""
        self._pieces: list[str] = []

    def opening(self) -> list[bytes]:
        begun = self._response("in_progress", [], None, {})
        return [self._event("response.created", response=begun), self._event("response.in_progress", response=begun)]

    def found(self, event: CallEvent) -> list[bytes]:
        if isinstance(event, Said):
            opened = [] if isinstance(self._item, SaidItem) else self._begin(_said("", "in_progress"))
            self._pieces.append(event.text)
            return [
                *opened,
                self._of_item("response.output_text.delta", content_index=0, delta=event.text, logprobs=[]),
            ]
        if isinstance(event, CallStarted):
            return self._begin(_called(event.name, "", "in_progress"))
        if isinstance(event, CallArguments):
            self._pieces.append(event.fragment)
            return [self._of_item("response.function_call_arguments.delta", delta=event.fragment)]
        return self._end("completed")

    def ending(self, tally: Tally, extras: dict[str, Any]) -> list[bytes]:
        status = _status(tally)
        ended = self._end(status)
        response = self._response(status, self._output, _usage(tally), extras)
        return [*ended, self._event(f"response.{status}", response=response)]

    def whole(self, found: Gathered, tally: Tally, extras: dict[str, Any]) -> bytes:
        status = _status(tally)
        output: list[SaidItem | CalledItem] = []
        if found.text or not found.calls:
            output.append(_said(found.text, status))
        output += [_called(call.name, call.arguments, "completed") for call in found.calls]
        return self._answer(status, output, _usage(tally), extras).to_json()

    def failed(self, error: ApiError) -> bytes:
        return self._event("error", code=error.code or error.kind, message=error.message, param=error.param)

    def _answer(
        self,
        status: Status,
        output: list[SaidItem | CalledItem],
        usage: ResponseUsage | None,
        extras: dict[str, Any],
    ) -> ResponseAnswer:
        call = self._call
        return ResponseAnswer(
            id=self._id,
            object="response",
            created_at=self._created,
            status=status,
            model=self._model.id,
            output=output,
            error=None,
            incomplete_details={"reason": "max_output_tokens"} if status == "incomplete" else None,
            instructions=None,
            max_output_tokens=call.max_output_tokens,
            metadata={},
            parallel_tool_calls=call.parallel_tool_calls is not False,
            previous_response_id=None,
            store=False,
            temperature=call.temperature,
            top_p=call.top_p,
            tool_choice=call.model_dump(include={"tool_choice"})["tool_choice"] or "auto",
            tools=[tool.model_dump() for tool in call.tools or ()],
            usage=usage,
            **extras,
        )

    def _response(self, *of: Any) -> dict[str, Any]:
        made: dict[str, Any] = json.loads(self._answer(*of).to_json())
        return made

    def _begin(self, item: SaidItem | CalledItem) -> list[bytes]:
        ended = self._end("completed")
        self._item, self._pieces = item, []
        announced = item.model_copy(update={"content": []}) if isinstance(item, SaidItem) else item
        events = [
            self._event("response.output_item.added", output_index=len(self._output), item=announced.model_dump())
        ]
        if isinstance(item, SaidItem):
            part = item.content[0].model_dump()
            events.append(self._of_item("response.content_part.added", content_index=0, part=part))
        return [*ended, *events]

    def _end(self, status: Status) -> list[bytes]:
        if self._item is None:
            return []
        text = "".join(self._pieces)
        if isinstance(self._item, SaidItem):
            part = _part(text)
            whole: SaidItem | CalledItem = self._item.model_copy(update={"content": [part], "status": status})
            events = [
                self._of_item("response.output_text.done", content_index=0, text=text, logprobs=[]),
                self._of_item("response.content_part.done", content_index=0, part=part.model_dump()),
            ]
        else:
            whole = self._item.model_copy(update={"arguments": text, "status": status})
            done = {"name": self._item.name, "arguments": text}
            events = [self._of_item("response.function_call_arguments.done", **done)]
        index = len(self._output)
        events.append(self._event("response.output_item.done", output_index=index, item=whole.model_dump()))
        self._output.append(whole)
        self._item = None
        return events

    def _of_item(self, kind: str, **fields: Any) -> bytes:
        assert self._item is not None, "an item was begun"
        return self._event(kind, item_id=self._item.id, output_index=len(self._output), **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._sent, **fields}
        self._sent += 1
        return named_event(kind, json.dumps(event, ensure_ascii=False).encode())


def _status(tally: Tally) -> Status:
    return "incomplete" if finished(tally).reason is FinishReason.LENGTH else "completed"


def _usage(tally: Tally) -> ResponseUsage:
    end = finished(tally)
    return ResponseUsage(
        input_tokens=end.sources.total,
        input_tokens_details=InputDetails(cached_tokens=end.sources.cached),
        output_tokens=end.completion_tokens,
        output_tokens_details=OutputDetails(reasoning_tokens=0),
        total_tokens=end.sources.total + end.completion_tokens,
    )


def _part(text: str) -> TextPart:
    return TextPart(type="output_text", text=text, annotations=[], logprobs=[])


def _said(text: str, status: Status) -> SaidItem:
    return SaidItem(id=_id("msg"), type="message", role="assistant", status=status, content=[_part(text)])


def _called(name: str, arguments: str, status: Status) -> CalledItem:
    return CalledItem(
        id=_id("fc"), type="function_call", status=status, call_id=_id("call"), name=name, arguments=arguments
    )


def _id(prefix: str) -> str:
    return f"{prefix}_{os.urandom(12).hex()}"
