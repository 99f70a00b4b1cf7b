"""The one form that a request's answer must have, as a grammar; or none.

Invariant: what is returned is a grammar that the engine can follow; what cannot be one is refused before anything is
computed, under the name of the field that asked for it. Pure functions; they take up to some tenths of a second.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

from appliance.api.constraints import Constrained
from appliance.chat import gbnf
from appliance.chat.gbnf import GrammarError
from appliance.chat.grammar import ANY_OBJECT, calls_answer, json_answer, one_of
from appliance.chat.tools import ToolChoice, ToolUse
from appliance.errors import RequestError
from appliance.server.base import ServedModel

NO_TOOLS = ToolUse()


class _Wanted(NamedTuple):
    field: str
    make: Callable[[], str]
    """Its grammar."""
    schema: object = None
    """What it stands for, if it stands for a schema."""
    strict: bool = False


def grammar_of(call: Constrained, model: ServedModel, tools: ToolUse = NO_TOOLS) -> str | None:
    """The grammar of the answer; with tools that may be called, of calls or the answer."""
    wanted = list(_wanted(call))
    if len(wanted) > 1:
        fields = " and ".join(each.field for each in wanted)
        raise RequestError(f"{fields}: an answer can have only one form; send one of them", param=wanted[1].field)
    required = tools.callable and tools.choice is ToolChoice.REQUIRED
    if not wanted and not required:
        return None
    field, make, schema, strict = wanted[0] if wanted else _Wanted("tool_choice", str)
    if not model.grammars:
        raise RequestError(f"{field}: this engine cannot hold an answer to a form; leave it out", param=field)
    if required or (wanted and tools.callable):
        if not required and schema is None:
            raise RequestError(f"{field}: cannot be combined with tools that the model may call", param=field)
        field = "tool_choice" if required else field
        return _refusing(field, lambda: calls_answer(model.tool_format, tools, schema, strict=strict))
    return _refusing(field, make)


def _refusing(field: str, make: Callable[[], str]) -> str:
    try:
        return make()
    except GrammarError as error:
        raise RequestError(f"{field}: {error}", param=field) from None


def _wanted(call: Constrained) -> list[_Wanted]:
    found: list[_Wanted] = []

    def schema(field: str, value: object, strict: bool = False) -> None:
        tree = _tree(field, value)
        found.append(_Wanted(field, lambda: json_answer(tree, strict=strict), tree, strict))

    def grammar(field: str, text: str) -> None:
        found.append(_Wanted(field, lambda: _checked(text)))

    def choice(field: str, texts: list[str]) -> None:
        found.append(_Wanted(field, lambda: one_of(texts)))

    form = call.response_format
    if form and form.type == "json_schema":
        if form.json_schema is None or form.json_schema.content is None:
            if form.content is None:
                raise RequestError("response_format: json_schema needs a schema", param="response_format")
            schema("response_format", form.content)
        else:
            schema("response_format", form.json_schema.content, bool(form.json_schema.strict))
    elif form and form.type == "json_object":
        schema("response_format", ANY_OBJECT if form.content is None else form.content)
    if call.grammar:
        grammar("grammar", call.grammar)
    if call.json_schema is not None:
        schema("json_schema", call.json_schema)
    if call.guided_json is not None:
        schema("guided_json", call.guided_json)
    if call.guided_grammar:
        grammar("guided_grammar", call.guided_grammar)
    if call.guided_choice:
        choice("guided_choice", call.guided_choice)
    if outputs := call.structured_outputs:
        if outputs.json_ is not None:
            schema("structured_outputs", outputs.json_)
        if outputs.json_object:
            schema("structured_outputs", ANY_OBJECT)
        if outputs.grammar:
            grammar("structured_outputs", outputs.grammar)
        if outputs.choice:
            choice("structured_outputs", outputs.choice)
    return found


def _checked(text: str) -> str:
    gbnf.check(text)
    return text


def _tree(field: str, value: object) -> object:
    """vLLM also takes a schema as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise RequestError(f"{field}: is not JSON", param=field) from None
