"""A chat request's tools as the appliance takes them.

Invariant: what may be called exists. Pure functions.
"""

from __future__ import annotations

from typing import Any

from appliance.api.chat_fields import NamedTool
from appliance.api.openai import ChatRequest
from appliance.chat.tools import Tool, ToolChoice, ToolFormat, ToolUse
from appliance.errors import RequestError
from appliance.server.base import ServedModel


def tools_of(call: ChatRequest) -> tuple[Tool, ...]:
    return tuple(
        Tool(tool.function.name, tool.function.description, tool.function.parameters)
        if tool.function.parameters is not None
        else Tool(tool.function.name, tool.function.description)
        for tool in call.tools or ()
    )


def for_template(call: ChatRequest) -> list[dict[str, Any]]:
    """Its tools, as chat templates know them."""
    return [tool.for_template() for tool in tools_of(call)]


def tool_use(call: ChatRequest, model: ServedModel) -> ToolUse:
    tools = tools_of(call)
    name = call.tool_choice.function.name if isinstance(call.tool_choice, NamedTool) else None
    choice = ToolChoice.REQUIRED if isinstance(call.tool_choice, NamedTool) else ToolChoice(call.tool_choice or "auto")
    if choice is ToolChoice.REQUIRED and not tools:
        raise RequestError("tool_choice: there are no tools to call; send tools", param="tool_choice")
    if name is not None and all(tool.name != name for tool in tools):
        raise RequestError("tool_choice: names a tool that is not in tools", param="tool_choice")
    # Llama's templates refuse a turn with two calls, so there is never one.
    parallel = call.parallel_tool_calls is not False and model.tool_format is not ToolFormat.LLAMA
    return ToolUse(tools, choice, name, parallel)
