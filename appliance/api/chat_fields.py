"""What a chat request says about messages and tools, checked field by field, and as the rest of the appliance takes it.

Validators never put a value into a message: prompts are content. Immutable values; any thread.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PlainValidator, ValidationInfo, field_validator

from appliance.api.fields import Request, joined_parts, shallow

MAX_TOOLS = 512
MAX_CALLS = 256
"""Of one message."""
MAX_SCHEMA_DEPTH = 64
MAX_TEMPLATE_OPTIONS = 16
MAX_OPTION_CHARS = 256
RESERVED_OPTIONS = {
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "bos_token", "eos_token",
    "raise_exception", "strftime_now", "chat_template",
}  # fmt: skip

ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}\z")]
CallId = Annotated[str, Field(min_length=1, max_length=128)]


class CalledFunction(Request):
    name: ToolName
    arguments: str


class CallMade(Request):
    """A call that an earlier answer made."""

    id: CallId
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Request):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: Annotated[list[CallMade] | None, Field(max_length=MAX_CALLS)] = None
    content: Annotated[str, Field(validate_default=True)] = None  # type: ignore[assignment]
    tool_call_id: CallId | None = Field(None, validate_default=True)

    @field_validator("tool_calls")
    @classmethod
    def _calls(cls, value: list[CallMade] | None, info: ValidationInfo) -> list[CallMade] | None:
        if value and info.data.get("role", "assistant") != "assistant":
            raise ValueError("only an assistant calls tools")
        return value

    @field_validator("content", mode="before")
    @classmethod
    def _text(cls, value: object, info: ValidationInfo) -> object:
        said_nothing = value is None and info.data.get("role") == "assistant"
        return "" if said_nothing else joined_parts(value)

    @field_validator("tool_call_id")
    @classmethod
    def _answers(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and info.data.get("role") == "tool":
            raise ValueError("a tool message should say which call it answers")
        return value

    def for_template(self) -> dict[str, Any]:
        """As chat templates know it: they have no developer role."""
        plain: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.content,
        }
        if self.tool_calls:
            plain["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.role == "tool":
            plain["tool_call_id"] = self.tool_call_id
        return plain


def conversation(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages for a chat template; a result also bears the name of the tool that was called."""
    names: dict[str, str] = {}
    plain = []
    for message in messages:
        names.update({call.id: call.function.name for call in message.tool_calls or ()})
        fields = message.for_template()
        if message.tool_call_id in names and message.role == "tool":
            fields["name"] = names[message.tool_call_id]
        plain.append(fields)
    return plain


def _shallow(value: dict[str, Any]) -> dict[str, Any]:
    return shallow(value, MAX_SCHEMA_DEPTH)


ShallowObject = Annotated[dict[str, Any], AfterValidator(_shallow)]


class DefinedFunction(Request):
    name: ToolName
    description: str | None = None
    parameters: ShallowObject | None = None
    strict: bool | None = None


class DefinedTool(Request):
    type: Literal["function"]
    function: DefinedFunction


def _distinct(tools: list[DefinedTool] | None) -> list[DefinedTool] | None:
    if tools and len({tool.function.name for tool in tools}) < len(tools):
        raise ValueError("two tools have the same name")
    return tools


Tools = Annotated[list[DefinedTool] | None, Field(max_length=MAX_TOOLS), AfterValidator(_distinct)]


class NamedFunction(Request):
    name: ToolName


class NamedTool(Request):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def _options(value: object) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_TEMPLATE_OPTIONS:
        raise ValueError(f"should be an object of at most {MAX_TEMPLATE_OPTIONS} options")
    for name, option in value.items():
        if not (name.isidentifier() and name.isascii() and len(name) <= 64):
            raise ValueError("names of options should be identifiers")
        if name in RESERVED_OPTIONS:
            raise ValueError("an option has a name that the appliance sets itself")
        if not (option is None or isinstance(option, (str, bool, int, float))):
            raise ValueError("options should be strings, numbers, booleans or null")
        if isinstance(option, str) and len(option) > MAX_OPTION_CHARS:
            raise ValueError(f"an option should have at most {MAX_OPTION_CHARS} characters")
    return value


TemplateOptions = Annotated[dict[str, Any], PlainValidator(_options)]
