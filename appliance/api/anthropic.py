"""Requests and responses of the Anthropic Messages API, and a request as the chat API would say it.

Strict about the fields it knows, as `openai.py` is. Thinking is accepted and not done: blocks of it in a conversation are
left out, and no answer holds any. Validators never put a value into a message: prompts are content. Immutable values; any
thread.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator

from appliance.api.answers import Body, Explanation, LlamaTimings
from appliance.api.chat_fields import MAX_TOOLS, CallId, ShallowObject, ToolName
from appliance.api.fields import Request, only, stops
from appliance.api.openai import MAX_MESSAGES

TTL_S = {"5m": 300.0, "1h": 3600.0}
MAX_BLOCKS = 10_000
"""Of one message."""
BILLING_LINE = "x-anthropic-billing-header:"
"""Claude Code begins its system prompt with such a block. It is another for each request, and not for the model: with it
nothing of the conversation would ever be found again."""
BLOCK_TYPES = ("text", "tool_use", "tool_result", "thinking", "redacted_thinking")


class CacheControl(Request):
    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Marked(Request):
    """What may bear a mark that the prompt up to here is worth keeping. Everything is kept, marked or not."""

    cache_control: CacheControl | None = None


def _texts(value: object) -> object:
    """Text, or blocks of text, as blocks."""
    if value is None or isinstance(value, str):
        return [{"type": "text", "text": value}] if value else []
    return _known(value, ("text",), "only blocks of text are supported here; leave images and documents out")


def _blocks(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    return _known(
        value, BLOCK_TYPES, "only text, tool_use and tool_result blocks are supported; leave images and documents out"
    )


def _known(value: object, types: Sequence[str], otherwise: str) -> object:
    if isinstance(value, list) and any(not isinstance(part, dict) or part.get("type") not in types for part in value):
        raise ValueError(otherwise)
    return value


class TextBlock(Marked):
    type: Literal["text"]
    text: str


Texts = Annotated[list[TextBlock], BeforeValidator(_texts), Field(max_length=MAX_BLOCKS)]


class ToolUseBlock(Marked):
    type: Literal["tool_use"]
    id: CallId
    name: ToolName
    input: ShallowObject


class ToolResultBlock(Marked):
    """Whether it is an error is for its text to say: templates do not know."""

    type: Literal["tool_result"]
    tool_use_id: CallId
    content: Texts = Field(default_factory=list)
    is_error: bool | None = None


class ThinkingBlock(Request):
    type: Literal["thinking", "redacted_thinking"]


Block = Annotated[TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock, Field(discriminator="type")]


class MessageParam(Request):
    role: Literal["user", "assistant", "system"]
    content: Annotated[list[Block], BeforeValidator(_blocks), Field(max_length=MAX_BLOCKS)]

    def for_chat(self) -> Iterator[dict[str, Any]]:
        """As messages of the chat API: results come before what else the user says, as they answer the last turn."""
        said = "\n".join(block.text for block in self.content if isinstance(block, TextBlock))
        results = [block for block in self.content if isinstance(block, ToolResultBlock)]
        calls = [block for block in self.content if isinstance(block, ToolUseBlock)]
        for result in results:
            text = "\n".join(block.text for block in result.content)
            yield {"role": "tool", "tool_call_id": result.tool_use_id, "content": text}
        if said or not results:
            message: dict[str, Any] = {"role": self.role, "content": said}
            if calls:
                message["tool_calls"] = [_call(block) for block in calls]
            yield message


def _call(block: ToolUseBlock) -> dict[str, Any]:
    arguments = json.dumps(block.input, ensure_ascii=False)
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def _asks(messages: list[MessageParam]) -> list[MessageParam]:
    if messages[-1].role == "assistant":
        raise ValueError("the last one should be the user's: an answer that was begun cannot be continued")
    return messages


class ToolParam(Marked):
    type: Annotated[str | None, only("custom", hint="only tools of your own; tools that Anthropic hosts do not run here")] = None  # fmt: skip
    name: ToolName
    description: str | None = None
    input_schema: ShallowObject = Field(default_factory=lambda: {"type": "object", "properties": {}})

    def for_chat(self) -> dict[str, Any]:
        described = {} if self.description is None else {"description": self.description}
        return {"type": "function", "function": {"name": self.name, **described, "parameters": self.input_schema}}


class ToolChoice(Request):
    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool | None = None


class Metadata(Request):
    user_id: str | None = Field(None, max_length=1024)


class Thinking(Request):
    type: Literal["enabled", "disabled", "adaptive"]


class OutputFormat(Request):
    type: Literal["json_schema"]
    content: ShallowObject = Field(alias="schema")


class OutputConfig(Request):
    effort: str | None = None
    format: OutputFormat | None = None


class CountRequest(Request):
    """What a prompt is made of."""

    model: str | None = None
    messages: Annotated[list[MessageParam], Field(min_length=1, max_length=MAX_MESSAGES), AfterValidator(_asks)]
    system: Texts = Field(default_factory=list)
    tools: list[ToolParam] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None
    mcp_servers: Annotated[Any, only([], hint="leave mcp_servers out; call the tools yourself")] = None
    container: Annotated[Any, only(hint="leave container out")] = None

    def for_chat(self) -> dict[str, Any]:
        """The same as a request of the chat API, before it is checked."""
        system = [block.text for block in self.system if not block.text.startswith(BILLING_LINE)]
        messages = [{"role": "system", "content": "\n".join(system)}] if system else []
        for message in self.messages:
            messages += message.for_chat()
        tree: dict[str, Any] = {"model": self.model, "messages": messages}
        if self.tools:
            tree["tools"] = [tool.for_chat() for tool in self.tools]
        if choice := self.tool_choice:
            kinds = {"auto": "auto", "any": "required", "none": "none"}
            named = {"type": "function", "function": {"name": choice.name}}
            tree["tool_choice"] = kinds.get(choice.type, named)
            tree["parallel_tool_calls"] = not choice.disable_parallel_tool_use
        if self.output_config and self.output_config.format:
            schema = {"schema": self.output_config.format.content}
            tree["response_format"] = {"type": "json_schema", "json_schema": schema}
        return tree

    @property
    def marks(self) -> list[CacheControl]:
        """All cache_control of the request."""
        marked: list[Any] = [self, *self.system, *(self.tools or ())]
        marked += [block for message in self.messages for block in message.content if isinstance(block, Marked)]
        return [mark for holder in marked if (mark := holder.cache_control) is not None]

    @property
    def retention_s(self) -> float | None:
        """The longest that was asked for; None if nothing says how long."""
        return max((TTL_S[mark.ttl] for mark in self.marks if mark.ttl), default=None)


class MessagesRequest(CountRequest):
    max_tokens: int = Field(ge=1, le=2**31 - 1)
    """At most what fits into the context: clients cannot leave it out."""
    stream: bool | None = None
    stop_sequences: Annotated[tuple[str, ...], PlainValidator(stops)] = ()
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**31 - 1)
    metadata: Metadata | None = None
    cache_salt: str | None = Field(None, min_length=32, max_length=128)

    def for_chat(self) -> dict[str, Any]:
        return {
            **super().for_chat(),
            "max_completion_tokens": self.max_tokens,
            "stream": self.stream,
            "stop": list(self.stop_sequences),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "prompt_cache_key": self.metadata.user_id if self.metadata else None,
            "cache_salt": self.cache_salt,
        }


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class MessageUsage(Body):
    """The prompt is the sum of the three kinds of input."""

    input_tokens: int
    cache_creation_input_tokens: int
    """Computed, of a request that marks what to keep; else they are input_tokens."""
    cache_read_input_tokens: int
    output_tokens: int


class SaidBlock(Body):
    type: Literal["text"] = "text"
    text: str


class CalledBlock(Body):
    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any]


class MessageAnswer(Body):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[SaidBlock | CalledBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage
    timings: LlamaTimings | None = None
    kvctl: Explanation | None = None


class TokenCount(Body):
    input_tokens: int
