"""Tools for a model whose chat template knows none: described in a system message, calls and results as plain text.

The form is the one most models have seen most of, `ToolFormat.HERMES`. Messages and tools are those of chat templates,
with a call's arguments as the text of a JSON object. Pure functions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

Message = dict[str, Any]

_INSTRUCTION = """# Tools

You may call one or more functions to assist with the user query. These are their signatures:
<tools>
{tools}
</tools>

For each function call, answer with a JSON object with the function's name and arguments, and nothing after the last one:
<tool_call>
{{"name": "function name", "arguments": {{"argument": "value"}}}}
</tool_call>"""


def instructed(messages: Iterable[Message], tools: Sequence[dict[str, Any]]) -> list[Message]:
    """The same conversation for a template that knows system, user and assistant, and text."""
    plain: list[Message] = []
    after_result = False
    for message in messages:
        is_result = message["role"] == "tool"
        if is_result:
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if after_result:
                text = f"{plain.pop()['content']}\n{text}"
            message = {"role": "user", "content": text}
        elif message.get("tool_calls"):
            message = {"role": message["role"], "content": _with_calls(message)}
        after_result = is_result
        plain.append(message)
    if tools:
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        said = _INSTRUCTION.format(tools=listed)
        if plain and plain[0]["role"] == "system":
            said = f"{plain.pop(0)['content']}\n\n{said}"
        plain.insert(0, {"role": "system", "content": said})
    return plain


def _with_calls(message: Message) -> str:
    parts = [message["content"]] if message["content"] else []
    for call in message["tool_calls"]:
        function = call["function"]
        name = json.dumps(function["name"], ensure_ascii=False)
        parts.append(f'<tool_call>\n{{"name": {name}, "arguments": {function["arguments"]}}}\n</tool_call>')
    return "\n".join(parts)
