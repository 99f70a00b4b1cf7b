"""Requests and responses of OpenAI's Responses API, and a request as the chat API would say it.

Nothing is kept between calls: the client sends the whole conversation, and the KV cache makes that cheap. Strict as
`openai.py` is. Reasoning items of a conversation are left out. Validators never put a value into a message: prompts are
content. Immutable values; any thread.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from appliance.api.answers import Body, Explanation, LlamaTimings
from appliance.api.chat_fields import MAX_TOOLS, CallId, ShallowObject, ToolName
from appliance.api.constraints import Schema
from appliance.api.fields import Request, Retention, joined_parts, only
from appliance.api.openai import MAX_MESSAGES

ITEM_TYPES = ("message", "function_call", "function_call_output", "reasoning")
NOT_KEPT = "responses are not kept here; send the whole conversation in input"


def _items(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    if not isinstance(value, list):
        raise ValueError("should be a string or a list of items")
    items = [{"type": "message", **item} if isinstance(item, dict) and "role" in item else item for item in value]
    if any(not isinstance(item, dict) or item.get("type") not in ITEM_TYPES for item in items):
        raise ValueError("only messages, function_call and function_call_output items are supported")
    return items


Text = Annotated[str, BeforeValidator(joined_parts)]


class MessageItem(Request):
    type: Literal["message"]
    role: Literal["system", "developer", "user", "assistant"]
    content: Text


class CallItem(Request):
    type: Literal["function_call"]
    call_id: CallId
    name: ToolName
    arguments: str


class OutputItem(Request):
    type: Literal["function_call_output"]
    call_id: CallId
    output: Text


class ReasoningItem(Request):
    type: Literal["reasoning"]


Item = Annotated[MessageItem | CallItem | OutputItem | ReasoningItem, Field(discriminator="type")]


class FunctionTool(Request):
    type: Annotated[str, only("function", hint="only functions; tools that OpenAI hosts do not run here")]
    name: ToolName
    description: str | None = None
    parameters: ShallowObject | None = None
    strict: bool | None = None

    def for_chat(self) -> dict[str, Any]:
        return {"type": "function", "function": self.model_dump(exclude={"type"}, exclude_none=True)}


class NamedTool(Request):
    type: Literal["function"]
    name: ToolName


class TextFormat(Request):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    strict: bool | None = None
    content: Schema = Field(None, alias="schema")


class TextOptions(Request):
    format: TextFormat | None = None


class Reasoning(Request):
    effort: str | None = Field(None, max_length=16)


class ResponsesRequest(Request):
    input: Annotated[list[Item], BeforeValidator(_items), Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    model: str | None = None
    stream: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    tools: list[FunctionTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    prompt_cache_key: str | None = Field(None, max_length=1024)
    prompt_cache_retention: Retention = None
    cache_salt: str | None = Field(None, min_length=32, max_length=128)
    store: bool | None = None
    """Accepted, as clients send it unasked; the answer says false."""
    previous_response_id: Annotated[Any, only(hint=NOT_KEPT)] = None
    conversation: Annotated[Any, only(hint=NOT_KEPT)] = None
    background: Annotated[Any, only(False, hint=NOT_KEPT)] = None
    prompt: Annotated[Any, only(hint="prompts are not kept here; send instructions and input")] = None
    truncation: Annotated[Any, only("disabled", hint="shorten the input yourself")] = None

    @property
    def retention_s(self) -> float | None:
        return self.prompt_cache_retention

    def for_chat(self) -> dict[str, Any]:
        """The same as a request of the chat API, before it is checked."""
        tree: dict[str, Any] = {
            "model": self.model,
            "messages": self._messages(),
            "max_completion_tokens": self.max_output_tokens,
            "stream": self.stream,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "parallel_tool_calls": self.parallel_tool_calls,
            "prompt_cache_key": self.prompt_cache_key,
            "cache_salt": self.cache_salt,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "tool_choice": self.tool_choice,
        }
        if self.tools:
            tree["tools"] = [tool.for_chat() for tool in self.tools]
        if isinstance(self.tool_choice, NamedTool):
            tree["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        if self.text and (form := self.text.format):
            schema = {"name": form.name, "strict": form.strict, "schema": form.content}
            tree["response_format"] = {"type": form.type}
            if form.type == "json_schema":
                tree["response_format"]["json_schema"] = schema
        return tree

    def _messages(self) -> list[dict[str, Any]]:
        """Calls belong to the assistant's message before them."""
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        for item in self.input:
            if isinstance(item, MessageItem):
                messages.append({"role": item.role, "content": item.content})
            elif isinstance(item, CallItem):
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": ""})
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                messages[-1].setdefault("tool_calls", []).append(call)
            elif isinstance(item, OutputItem):
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
        return messages


Status = Literal["in_progress", "completed", "incomplete", "failed"]


class TextPart(Body):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class SaidItem(Body):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Status
    content: list[TextPart]


class CalledItem(Body):
    id: str
    type: Literal["function_call"]
    status: Status
    call_id: str
    name: str
    arguments: str


class InputDetails(Body):
    cached_tokens: int


class OutputDetails(Body):
    reasoning_tokens: int


class ResponseUsage(Body):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseAnswer(Body):
    """Instructions are not sent back: with each of several events they would outweigh the answer."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Status
    model: str
    output: list[SaidItem | CalledItem]
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    instructions: None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    store: Literal[False]
    temperature: float | None
    top_p: float | None
    tool_choice: Any
    tools: list[dict[str, Any]]
    usage: ResponseUsage | None
    timings: LlamaTimings | None = None
    kvctl: Explanation | None = None
