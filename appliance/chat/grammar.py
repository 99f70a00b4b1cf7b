"""Grammars of whole answers: JSON of a schema, one of several texts, calls of tools; and calls or an answer.

Invariant: every grammar made here passes `gbnf.check`; GrammarError says why one cannot be made. Pure functions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from appliance.chat import gbnf
from appliance.chat.schema import GrammarBuilder, literal
from appliance.chat.tools import (
    DEEPSEEK_BEGIN,
    DEEPSEEK_CALL,
    DEEPSEEK_CALL_END,
    DEEPSEEK_END,
    DEEPSEEK_SEP,
    Tool,
    ToolChoice,
    ToolFormat,
    ToolUse,
)

MAX_MADE_CHARS = 4 * gbnf.MAX_CHARS
"""Of a grammar made here: it repeats little, but names much."""
MAX_CALLS = 32
"""Of one answer that must hold calls."""
MAX_CHOICES = 1_000

ANY_OBJECT: dict[str, Any] = {"type": "object"}


def json_answer(schema: object, *, strict: bool) -> str:
    """Any JSON that the schema describes, and nothing around it."""
    grammar = GrammarBuilder()
    return _checked(grammar, grammar.schema(schema, strict=strict))


def one_of(texts: Sequence[str]) -> str:
    if not 1 <= len(texts) <= MAX_CHOICES:
        raise gbnf.GrammarError(f"should have 1 to {MAX_CHOICES} choices")
    grammar = GrammarBuilder()
    return _checked(grammar, grammar.rule(" | ".join(map(literal, texts))))


def calls_answer(form: ToolFormat, use: ToolUse, otherwise: object = None, *, strict: bool = False) -> str:
    """Calls of the tools that may be called, or JSON of the schema `otherwise` where calls are not required."""
    grammar = GrammarBuilder()
    tools = [tool for tool in use.tools if use.name in (None, tool.name)]
    root = _WRITERS[form](grammar, tools, MAX_CALLS if use.parallel else 1)
    if use.choice is not ToolChoice.REQUIRED:
        root = f"{root} | {grammar.schema(otherwise, strict=strict)}"
    return _checked(grammar, root)


def _checked(grammar: GrammarBuilder, root: str) -> str:
    text = grammar.text(root)
    gbnf.check(text, max_chars=MAX_MADE_CHARS)
    return text


# --- how each family writes calls; arguments keep to their schema as far as a grammar can --------------------------


def _hermes(grammar: GrammarBuilder, tools: Sequence[Tool], most: int) -> str:
    call = f"{literal('<tool_call>')} {literal(chr(10))} {_object(grammar, tools, 'arguments')} {literal(chr(10) + '</tool_call>')}"
    return _row(grammar, call, "\n", most)


def _llama(grammar: GrammarBuilder, tools: Sequence[Tool], most: int) -> str:
    return _row(grammar, _object(grammar, tools, "parameters"), "; ", most)


def _mistral(grammar: GrammarBuilder, tools: Sequence[Tool], most: int) -> str:
    row = _row(grammar, _object(grammar, tools, "arguments"), ", ", most)
    return grammar.rule(f"{literal('[TOOL_CALLS][')} {row} {literal(']')}")


def _function(grammar: GrammarBuilder, tools: Sequence[Tool], most: int) -> str:
    calls = (
        f"{literal(f'<function={tool.name}>')} {_arguments(grammar, tool)} {literal('</function>')}" for tool in tools
    )
    return _row(grammar, grammar.rule(" | ".join(calls)), "", most)


def _deepseek(grammar: GrammarBuilder, tools: Sequence[Tool], most: int) -> str:
    calls = (
        f"{literal(DEEPSEEK_CALL + tool.name + DEEPSEEK_SEP)} {_arguments(grammar, tool)} {literal(DEEPSEEK_CALL_END)}"
        for tool in tools
    )
    row = _row(grammar, grammar.rule(" | ".join(calls)), "", most)
    return grammar.rule(f"{literal(DEEPSEEK_BEGIN)} {row} {literal(DEEPSEEK_END)}")


def _xml(grammar: GrammarBuilder, tools: Sequence[Tool], most: int) -> str:
    calls = []
    for tool in tools:
        properties = tool.parameters.get("properties")
        required = tool.parameters.get("required")
        parts = [literal(f"<tool_call>\n<function={tool.name}>\n")]
        for key, schema in properties.items() if isinstance(properties, dict) else ():
            if ">" in key or "\n" in key:
                continue
            value = _parameter(grammar, schema, tool)
            one = f"{literal(f'<parameter={key}>{chr(10)}')} {value} {literal(chr(10) + '</parameter>' + chr(10))}"
            parts.append(one if isinstance(required, list) and key in required else f"({one})?")
        calls.append(" ".join([*parts, literal("</function>\n</tool_call>")]))
    return _row(grammar, grammar.rule(" | ".join(calls)), "\n", most)


def _parameter(grammar: GrammarBuilder, schema: object, tool: Tool) -> str:
    """Text as it is, anything else as JSON."""
    if isinstance(schema, dict) and schema.get("type") == "string":
        choices = schema.get("enum")
        if isinstance(choices, list) and choices and all(isinstance(choice, str) for choice in choices):
            return grammar.rule(" | ".join(map(literal, choices)))
        return grammar.rule('([^<] | "<" [^/])*')
    return grammar.schema(_with_definitions(schema, tool), strict=False)


def _with_definitions(schema: object, tool: Tool) -> object:
    """A part of a tool's parameters, with what it may refer to."""
    definitions = {key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}
    return {**definitions, **schema} if isinstance(schema, dict) else schema


def _object(grammar: GrammarBuilder, tools: Sequence[Tool], arguments: str) -> str:
    calls = (
        f"{literal(f'{{{chr(34)}name{chr(34)}: {json.dumps(tool.name)}, {json.dumps(arguments)}: ')}"
        f" {_arguments(grammar, tool)} {literal('}')}"
        for tool in tools
    )
    return grammar.rule(" | ".join(calls))


def _arguments(grammar: GrammarBuilder, tool: Tool) -> str:
    return grammar.schema({"type": "object", **tool.parameters}, strict=False)


def _row(grammar: GrammarBuilder, call: str, separator: str, most: int) -> str:
    one = grammar.rule(call)
    if most == 1:
        return one
    more = grammar.rule(f"{literal(separator)} {one}" if separator else one)
    return grammar.rule(f"{one} {more}{{0,{most - 1}}}")


_WRITERS = {
    ToolFormat.HERMES: _hermes,
    ToolFormat.XML: _xml,
    ToolFormat.FUNCTION: _function,
    ToolFormat.LLAMA: _llama,
    ToolFormat.MISTRAL: _mistral,
    ToolFormat.DEEPSEEK: _deepseek,
}
