"""What is known to have killed or stalled servers like this one, at every endpoint that takes text: a 4xx or an answer, soon."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.support.fake_runtime import FakeRuntime

CANARY = "canary-7f3a"
SOON_S = 10.0
Body = dict[str, Any]


@dataclass(frozen=True)
class Endpoint:
    path: str
    say: Callable[[Any], Body]
    """A call about this text, or about whatever else is given for one."""
    offer: Callable[[Any], Body] | None = None
    """A call that has to use a tool whose arguments have this schema."""
    form: Callable[[Any], Body] | None = None
    """A call whose answer has to have this schema."""
    anthropic: bool = False


def message(text: Any) -> list[Body]:
    return [{"role": "user", "content": text}]


def function(schema: Any) -> Body:
    return {"name": "f", "parameters": schema}


ENDPOINTS = [
    Endpoint(
        "/v1/messages",
        lambda text: {"messages": message(text), "max_tokens": 8},
        lambda schema: {"messages": message("hi"), "max_tokens": 8, "tools": [{"name": "f", "input_schema": schema}], "tool_choice": {"type": "any"}},
        lambda schema: {"messages": message("hi"), "max_tokens": 8, "output_config": {"format": {"type": "json_schema", "schema": schema}}},
        anthropic=True,
    ),
    Endpoint(
        "/v1/messages/count_tokens",
        lambda text: {"messages": message(text)},
        lambda schema: {"messages": message("hi"), "tools": [{"name": "f", "input_schema": schema}], "tool_choice": {"type": "any"}},
        anthropic=True,
    ),
    Endpoint(
        "/v1/responses",
        lambda text: {"input": text},
        lambda schema: {"input": "hi", "tools": [{"type": "function", **function(schema)}], "tool_choice": "required"},
        lambda schema: {"input": "hi", "text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}},
    ),
    Endpoint(
        "/v1/chat/completions",
        lambda text: {"messages": message(text)},
        lambda schema: {"messages": message("hi"), "tools": [{"type": "function", "function": function(schema)}], "tool_choice": "required"},
        lambda schema: {"messages": message("hi"), "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
    ),
    Endpoint("/v1/completions", lambda text: {"prompt": text}, form=lambda schema: {"prompt": "hi", "json_schema": schema}),
    Endpoint("/v1/embeddings", lambda text: {"input": text}),
    Endpoint(
        "/v1/kv/prefetch",
        lambda text: {"messages": message(text)},
        lambda schema: {"messages": message("hi"), "tools": [{"type": "function", "function": function(schema)}], "tool_choice": "required"},
    ),
]  # fmt: skip


def nested(levels: int, inner: Any, key: str = "items") -> Any:
    for _ in range(levels):
        inner = {key: inner}
    return inner


TEXTS: dict[str, Any] = {
    **{f"100,000 of {name}": character * 100_000 for name, character in
       (("a", "a"), ("!", "!"), ("7", "7"), ("space", " "), ("CJK", "漢"), ("emoji", "🧨"), ("NUL", "\0"))},
    "a million line ends": "\n" * 1_000_000,
    "special tokens": "<|im_end|>\n<|im_start|>system\n<s></s>[INST]<|endoftext|>" * 100,
    "a template": "{{ messages }}{% for x in range(10**9) %}{% endfor %}",
    "combining marks": "a" + "\u0301" * 100_000,
    "right to left": "\u202e" * 10_000,
    "nothing": "",
    "null": None,
    "a number": 10**30,
    "an object": {"text": CANARY},
    "a list of nothing": [],
    "a list of lists": [[]],
    "a list of 100,000 parts": [{"type": "text", "text": "a"}] * 100_000,
    "an image": [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": CANARY * 10_000}}],
    "an image's address": [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + CANARY * 10_000}}],
    "a file": [{"type": "input_file", "file_data": CANARY}],
    "100,000 token ids": [5] * 100_000,
    "token ids beyond the vocabulary": [2**31, 2**40, -1],
}  # fmt: skip
SCHEMAS: dict[str, Any] = {
    "maxLength 20,000": {"type": "object", "properties": {"a": {"type": "string", "maxLength": 20_000}}},
    "minLength 20,000": {"type": "object", "properties": {"a": {"type": "string", "minLength": 20_000}}},
    "maxItems 20,000": {"type": "object", "properties": {"a": {"type": "array", "maxItems": 20_000}}},
    "minItems 20,000": {"type": "object", "properties": {"a": {"type": "array", "minItems": 20_000}}},
    "pattern ^*$": {"type": "object", "properties": {"a": {"type": "string", "pattern": "^*$"}}},
    "deep pattern": {"type": "object", "properties": {"a": {"type": "string", "pattern": "(" * 20_000 + ")" * 20_000}}},
    "lookbehind": {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?<=a)b"}}},
    "300 deep": {"type": "object", "properties": nested(300, {}, "properties")},
    "60 deep": {"type": "object", "properties": {"a": nested(60, {})}},
    "itself": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    "elsewhere": {"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1:1/x"}}},
    "nowhere": {"type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}},
    "doubling": {
        "type": "object",
        "$defs": {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(40)} | {"d40": {"type": "string"}},
        "properties": {"a": {"$ref": "#/$defs/d0"}},
    },
    "10,000 properties": {"type": "object", "properties": {f"p{n}": {} for n in range(10_000)}},
    "enum of 100,000": {"type": "object", "properties": {"a": {"enum": list(range(100_000))}}},
    "a huge integer": {"type": "object", "properties": {"a": {"type": "integer", "minimum": -(10**300), "maximum": 10**300}}},
    "keys of grammar": {"type": "object", "properties": {'"\n::= root': {"const": '"\\n" | root'}}},
    "special tokens": {"type": "object", "description": "<|im_end|>", "properties": {"<|im_start|>": {"type": "string"}}},
    "a list": [],
    "null": None,
    "a text": CANARY,
}  # fmt: skip
RAW: dict[str, bytes] = {
    "nothing": b"",
    "NUL": b"\0" * 1000,
    "not UTF-8": b'{"input": "\xff\xfe"}',
    "nested lists": b'{"messages": ' + b"[" * 200_000,
    "nested objects": b'{"input": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
    "the same key twice": b'{"model": "a", "model": "b"}',
    "NaN": b'{"messages": [{"role": "user", "content": "hi"}], "input": "hi", "prompt": "hi", "max_tokens": 1, "temperature": NaN}',
    "a long integer": b'{"max_tokens": ' + b"9" * 100_000 + b"}",
    "a list": b"[1, 2]",
    "a surrogate": b'{"input": "\\ud800", "prompt": "\\ud800", "messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 1}',
}  # fmt: skip
FIELDS: dict[str, Body] = {
    "max_tokens -1": {"max_tokens": -1, "max_output_tokens": -1},
    "max_tokens 2^63": {"max_tokens": 2**63, "max_output_tokens": 2**63},
    "temperature 1e308": {"temperature": 1e308},
    "top_k 2^63": {"top_k": 2**63},
    "n 10^6": {"n": 10**6},
    "10,000 stops": {"stop": ["x"] * 10_000, "stop_sequences": ["x"] * 10_000},
    "a stop of a megabyte": {"stop": "x" * 900_000, "stop_sequences": ["x" * 900_000]},
    "10^5 biases": {"logit_bias": {str(n): 1 for n in range(100_000)}},
    "100,000 messages": {"messages": message("x") * 20_000, "input": message("x") * 20_000},
    "10,000 tools": {"tools": [{"type": "function", "name": f"f{n}", "function": {"name": f"f{n}"}} for n in range(10_000)]},
    "chat_template": {"chat_template": "{% for x in range(10**9) %}{% endfor %}"},
    "template options": {"chat_template_kwargs": {"messages": [], "__class__": 1}},
    "a salt": {"cache_salt": "\0" * 33},
    "a session": {"prompt_cache_key": "x" * 100_000, "metadata": {"user_id": "x" * 100_000}},
    "an unknown model": {"model": CANARY * 1000},
    "a system prompt of parts": {"system": [{"type": "image"}], "instructions": [{"type": "image"}]},
    "a stored prompt": {"previous_response_id": CANARY, "prompt_cache_retention": CANARY},
    "a call nobody made": {"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}], "messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "x"}]}]},
    "calls that answer nothing": {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": nested(60, {})}]}, *message("x")]},
    "explicit nulls": dict.fromkeys(("model", "tools", "tool_choice", "system", "stream", "stop", "temperature", "metadata", "text", "reasoning", "encoding_format", "dimensions")),
    "dimensions": {"dimensions": 2**63},
    "a tool without a name": {"tools": [{}], "tool_choice": {"type": "tool"}},
    "a tool that is not there": {"tool_choice": {"type": "tool", "name": "g"}},
    "tools of another house": {"tools": [{"type": "computer_20250124", "name": "computer"}, {"type": "web_search"}]},
}  # fmt: skip

CASES = [
    *((e, f"text: {name}", e.say(text)) for e in ENDPOINTS for name, text in TEXTS.items()),
    *((e, f"tool: {name}", e.offer(schema)) for e in ENDPOINTS if e.offer for name, schema in SCHEMAS.items()),
    *((e, f"form: {name}", e.form(schema)) for e in ENDPOINTS if e.form for name, schema in SCHEMAS.items()),
    *((e, f"field: {name}", {**e.say("hi"), **fields}) for e in ENDPOINTS for name, fields in FIELDS.items()),
]


async def refused_or_answered(client: httpx.AsyncClient, endpoint: Endpoint, content: bytes) -> None:
    response = await asyncio.wait_for(client.post(endpoint.path, content=content), SOON_S)
    assert response.status_code in (200, 400, 404, 413), response.text[:500]
    assert CANARY not in response.text, "a value of the request is in the answer"
    if response.status_code != 200:
        tree = response.json()
        assert (tree.get("type") == "error") is endpoint.anthropic
        assert 15 < len(tree["error"]["message"]) < 400


@pytest.mark.parametrize(
    ("endpoint", "body"), [case[::2] for case in CASES], ids=[f"{case[0].path} {case[1]}" for case in CASES]
)
async def test_it_is_refused_or_answered(client: httpx.AsyncClient, endpoint: Endpoint, body: Body) -> None:
    await refused_or_answered(client, endpoint, json.dumps(body).encode())


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.path)
@pytest.mark.parametrize("content", RAW.values(), ids=RAW)
async def test_what_is_no_json_is_refused(
    client: httpx.AsyncClient, runtime: FakeRuntime, endpoint: Endpoint, content: bytes
) -> None:
    await refused_or_answered(client, endpoint, content)
    assert not runtime.requests


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.path)
async def test_after_all_of_it_there_is_an_answer(client: httpx.AsyncClient, endpoint: Endpoint) -> None:
    for text in TEXTS.values():
        await client.post(endpoint.path, json=endpoint.say(text))
    assert (await client.post(endpoint.path, json=endpoint.say("hi"))).status_code == 200
