"""How one chat template wants tools: its family, whether it renders tools, and in which shape it takes calls.

Found out once, by its source and by rendering a conversation with a call in it: templates of one family differ in whether
arguments are text or an object, and whether an assistant that only calls has content. Immutable; any thread.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, TemplateError, meta

from appliance.chat.instructed import instructed
from appliance.chat.tools import ToolFormat, detect

Message = dict[str, Any]
Render = Callable[[list[Message], list[dict[str, Any]]], str]

RENDERING_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What a template may raise for messages that are not to its taste."""

_PROBE_TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
_PROBE_ARGUMENTS = {"probe_key": "probe_value"}
_MISTRAL_ID_CHARS = 9


@dataclass(frozen=True)
class ToolTemplate:
    form: ToolFormat
    renders: bool
    """False: tools are described in a system message, and calls and results are text."""
    arguments_as_object: bool
    content_may_be_null: bool

    @classmethod
    def of(cls, source: str, environment: Environment, render: Render) -> ToolTemplate:
        form = detect(source)
        takes_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))
        if form is None or not takes_tools:
            return cls(ToolFormat.HERMES, False, False, False)
        as_object = '"probe_key"' in _probed(render, _PROBE_ARGUMENTS, "")
        arguments: Any = _PROBE_ARGUMENTS if as_object else json.dumps(_PROBE_ARGUMENTS)
        empty, null = _probed(render, arguments, ""), _probed(render, arguments, None)
        takes_null = "probe_key" in null and null.count("None") == empty.count("None")
        return cls(form, True, as_object, takes_null)

    def conversation(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]
    ) -> tuple[list[Message], list[dict[str, Any]]]:
        """Messages and tools as this template takes them."""
        if not self.renders:
            return instructed(messages, tools), []
        return [self._message(message) for message in messages], list(tools)

    def _message(self, message: Message) -> Message:
        if "tool_call_id" in message and self.form is ToolFormat.MISTRAL:
            return {**message, "tool_call_id": _mistral_id(message["tool_call_id"])}
        if not message.get("tool_calls"):
            return message
        content = message["content"] or (None if self.content_may_be_null else "")
        return {**message, "content": content, "tool_calls": [self._call(call) for call in message["tool_calls"]]}

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        if self.arguments_as_object:
            function = {**function, "arguments": _decoded(function["arguments"])}
        call_id = _mistral_id(call["id"]) if self.form is ToolFormat.MISTRAL else call["id"]
        return {**call, "id": call_id, "function": function}


def _decoded(arguments: str) -> Any:
    """A call that broke off, handed back by its client, stays the text it is."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def _mistral_id(call_id: str) -> str:
    """Mistral's templates take ids of nine letters and digits only; the same id is always the same nine."""
    if len(call_id) == _MISTRAL_ID_CHARS and call_id.isascii() and call_id.isalnum():
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:_MISTRAL_ID_CHARS]


def _probed(render: Render, arguments: Any, content: str | None) -> str:
    """The rendering of a conversation with one call; empty if the template refuses it."""
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages: list[Message] = [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "content": "r", "tool_call_id": "abcdefghi", "name": "f"},
    ]
    try:
        return render(messages, [_PROBE_TOOL])
    except RENDERING_ERRORS:
        return ""
