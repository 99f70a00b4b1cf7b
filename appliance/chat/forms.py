"""The forms in which models write calls, each as a coroutine that reads one opening's calls into a recorder.

Invariant: Unexpected before a call is announced means that it is none; after, that it breaks off. Lenient where nothing
is lost: an end marker may be missing when the arguments are complete. Pure functions.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from appliance.chat.found import Recorder
from appliance.chat.reader import Step, Unexpected
from appliance.chat.tools import (
    DEEPSEEK_BEGIN,
    DEEPSEEK_CALL,
    DEEPSEEK_CALL_END,
    DEEPSEEK_END,
    DEEPSEEK_SEP,
    PYTHON_TAG,
    TOOL_NAME,
    ToolFormat,
)

_KEYS = {"name", "type", "id", "arguments", "parameters"}
_ARGUMENTS = ("arguments", "parameters")


@dataclass(frozen=True)
class Form:
    openings: tuple[str, ...]
    read: Callable[[Recorder, str], Step[None]]
    """From just after the opening, which is its second argument."""
    anywhere: bool = True
    """False: an answer that does not begin with a call has none."""


def _hermes(found: Recorder, opening: str) -> Step[None]:
    yield from _objects(found)
    yield from found.reader.space()
    yield from found.reader.accept("</tool_call>")


def _llama(found: Recorder, opening: str) -> Step[None]:
    if opening == "{":
        found.reader.at -= len(opening)
    yield from _object(found, known=True)
    yield from found.reader.space()
    yield from found.reader.accept(";")


def _mistral(found: Recorder, opening: str) -> Step[None]:
    reader = found.reader
    mark = reader.at
    yield from reader.space()
    if (yield from reader.peek()) in ("[", "{"):
        yield from _objects(found)
        return
    name = yield from _word(found)
    if (yield from reader.accept("[CALL_ID]")):
        yield from _word(found)
    yield from reader.accept("[ARGS]")
    yield from _arguments(found, name)
    found.end(mark)


def _function(found: Recorder, opening: str) -> Step[None]:
    reader = found.reader
    mark = reader.at - len(opening)
    name = yield from _word(found)
    yield from reader.expect(">")
    yield from _arguments(found, name)
    yield from reader.space()
    yield from reader.accept("</function>")
    found.end(mark)


def _xml(found: Recorder, opening: str) -> Step[None]:
    reader = found.reader
    mark = reader.at - len(opening)
    if opening == "<tool_call>":
        yield from reader.space()
        yield from reader.expect("<function=")
    name = yield from _word(found)
    yield from reader.expect(">")
    found.start(name)
    found.argue("{")
    yield from reader.space()
    separator = ""
    while (yield from reader.accept("<parameter=")):
        key = yield from reader.until(">")
        text = yield from reader.until("</parameter>")
        value = _typed(found, name, key, text.removeprefix("\n").removesuffix("\n"))
        found.argue(f"{separator}{json.dumps(key, ensure_ascii=False)}: {value}")
        separator = ", "
        yield from reader.space()
    yield from reader.expect("</function>")
    found.argue("}")
    found.complete()
    yield from reader.space()
    yield from reader.accept("</tool_call>")
    found.end(mark)


def _deepseek(found: Recorder, opening: str) -> Step[None]:
    reader = found.reader
    if opening == DEEPSEEK_BEGIN:
        yield from reader.space()
        yield from reader.expect(DEEPSEEK_CALL)
    while True:
        mark = reader.at - len(DEEPSEEK_CALL)
        name = yield from _word(found)
        yield from reader.expect(DEEPSEEK_SEP)
        if name == "function":  # so V3 and R1 write it; later ones write the name in its place
            name = yield from _word(found)
            yield from reader.space()
            yield from reader.expect("```json")
        yield from _arguments(found, name)
        yield from reader.space()
        yield from reader.accept("```")
        yield from reader.space()
        yield from reader.accept(DEEPSEEK_CALL_END)
        found.end(mark)
        yield from reader.space()
        if not (yield from reader.accept(DEEPSEEK_CALL)):
            break
    yield from reader.accept(DEEPSEEK_END)


FORMS = {
    ToolFormat.HERMES: Form(("<tool_call>",), _hermes),
    ToolFormat.XML: Form(("<tool_call>", "<function="), _xml),
    ToolFormat.FUNCTION: Form(("<function=",), _function),
    ToolFormat.LLAMA: Form((PYTHON_TAG, "{"), _llama, anywhere=False),
    ToolFormat.MISTRAL: Form(("[TOOL_CALLS]",), _mistral),
    ToolFormat.DEEPSEEK: Form((DEEPSEEK_BEGIN, DEEPSEEK_CALL), _deepseek),
}


def _objects(found: Recorder) -> Step[None]:
    """One call, or a list of them."""
    reader = found.reader
    yield from reader.space()
    if not (yield from reader.accept("[")):
        yield from _object(found)
        return
    yield from _object(found)
    while (yield from reader.accept(",")):
        yield from _object(found)
    yield from reader.accept("]")


def _object(found: Recorder, *, known: bool = False) -> Step[None]:
    """{"name": ..., "arguments" or "parameters": {...}}, in any order, and the space after it.

    `known`: only what names a tool that was given is a call.
    """
    reader = found.reader
    yield from reader.space()
    mark = reader.at
    yield from reader.expect("{")
    name: str | None = None
    arguments: str | None = None
    while True:
        yield from reader.space()
        key = yield from reader.string()
        if key not in _KEYS:
            raise Unexpected
        yield from reader.space()
        yield from reader.expect(":")
        yield from reader.space()
        if key == "name" and not found.open:
            name = yield from reader.string()
            if known and name not in found.tools:
                raise Unexpected
        elif key in _ARGUMENTS and name is not None and not found.open and (yield from reader.peek()) == "{":
            yield from _arguments(found, name)
        else:
            value = yield from reader.value()
            arguments = value if key in _ARGUMENTS else arguments
        yield from reader.space()
        if not (yield from reader.accept(",")):
            break
    if not found.open:
        _whole(found, name, arguments)
    yield from reader.accept("}")
    found.end(mark)
    yield from reader.space()


def _whole(found: Recorder, name: str | None, arguments: str | None) -> None:
    """A call whose arguments came before its name, came as a string, or did not come."""
    try:
        value = {} if arguments is None else json.loads(arguments)
        text = value if isinstance(value, str) else arguments or "{}"
        well_formed = isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        raise Unexpected from None
    if name is None or not well_formed:
        raise Unexpected
    found.start(name)
    found.argue(text)
    found.complete()


def _arguments(found: Recorder, name: str) -> Step[None]:
    """Announce the call and pass its arguments on."""
    yield from found.reader.space()
    if (yield from found.reader.peek()) != "{":
        raise Unexpected
    found.start(name)
    raw = yield from found.reader.value(found.argue)
    try:
        json.loads(raw)
    except (ValueError, RecursionError):
        raise Unexpected from None
    found.complete()


def _word(found: Recorder) -> Step[str]:
    reader = found.reader
    start = reader.at
    while (character := (yield from reader.peek())) and TOOL_NAME.fullmatch(character):
        reader.at += 1
    return reader.text[start : reader.at]


def _typed(found: Recorder, name: str, key: str, text: str) -> str:
    """A parameter's text as JSON: a string where the tool wants one, else what it spells, else a string again."""
    properties = found.tools[name].parameters.get("properties") if name in found.tools else None
    wanted: Any = properties.get(key) if isinstance(properties, dict) else None
    if not (isinstance(wanted, dict) and wanted.get("type") == "string"):
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            pass
        else:
            return text.strip()
    return json.dumps(text, ensure_ascii=False)
