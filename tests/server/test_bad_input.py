"""Every malformed or impossible request is a 4xx in the OpenAI shape that says what to change; nothing is generated."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from appliance.api.fields import MAX_BIASES, MAX_STOPS
from appliance.api.openai import MAX_MESSAGES
from tests.support.fake_runtime import MODEL, FakeRuntime

CANARY = "canary-7f3a"
HELLO = [{"role": "user", "content": "hi"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def chat(**fields: Any) -> bytes:
    return json.dumps({"messages": HELLO, **fields}).encode()


def text(**fields: Any) -> bytes:
    return json.dumps({"prompt": "hi", **fields}).encode()


def tool(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


def schema(content: Any, **fields: Any) -> bytes:
    named = {"name": "x", "schema": content, **fields}
    return chat(response_format={"type": "json_schema", "json_schema": named})


def deep(levels: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": "string"}
    for _ in range(levels // 2):
        inner = {"type": "object", "properties": {"a": inner}}
    return inner


def nested_lists(levels: int) -> dict[str, Any]:
    inner: dict[str, Any] = {}
    for _ in range(levels):
        inner = {"items": inner}
    return inner


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
DOUBLING = "\n".join(["root ::= r0", *(f"r{n} ::= r{n + 1} r{n + 1}" for n in range(30)), 'r30 ::= "" | "x"'])

BODIES: list[tuple[str, str, bytes, str | None]] = [
    ("empty body", CHAT, b"", None),
    ("cut off json", CHAT, b'{"messages": [', None),
    ("not an object", CHAT, b"[1, 2]", None),
    ("null", CHAT, b"null", None),
    ("trailing garbage", CHAT, chat() + b"x", None),
    ("byte order mark", CHAT, b"\xef\xbb\xbf" + chat(), None),
    ("not utf-8", CHAT, b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', None),
    ("raw surrogate bytes", CHAT, b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}', None),
    ("utf-16", CHAT, chat().decode().encode("utf-16"), None),
    ("duplicate key", CHAT, b'{"model": "a", "model": "b", "messages": []}', None),
    ("duplicate nested key", CHAT, b'{"messages": [{"role": "user", "role": "system", "content": ""}]}', None),
    ("deep nesting", CHAT, b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
    ("deep nesting in an unknown field", CHAT, b'{"x": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}", None),
    ("endless integer", CHAT, b'{"max_tokens": ' + b"9" * 10_000 + b"}", None),
    ("NaN temperature", CHAT, chat(temperature=float("nan")), None),
    ("Infinity temperature", CHAT, chat(temperature=float("inf")), None),
    ("overflowing temperature", CHAT, b'{"messages": [{"role": "user", "content": ""}], "temperature": 1e999}', "temperature"),
    ("NaN in an unknown field", CHAT, chat(x=float("nan")), None),
    ("no messages", CHAT, b"{}", "messages"),
    ("empty messages", CHAT, chat(messages=[]), "messages"),
    ("messages not a list", CHAT, chat(messages=CANARY), "messages"),
    ("too many messages", CHAT, chat(messages=HELLO * (MAX_MESSAGES + 1)), "messages"),
    ("message not an object", CHAT, chat(messages=[CANARY]), "messages[0]"),
    ("wrong role", CHAT, chat(messages=[{"role": CANARY, "content": ""}]), "messages[0].role"),
    ("tool role", CHAT, chat(messages=[*HELLO, {"role": "tool", "content": ""}]), "messages[1].tool_call_id"),
    ("tool role without content", CHAT, chat(messages=[*HELLO, {"role": "tool", "tool_call_id": "c"}]), "messages[1].content"),
    ("role not a string", CHAT, chat(messages=[{"role": 1, "content": ""}]), "messages[0].role"),
    ("no content", CHAT, chat(messages=[{"role": "user"}]), "messages[0].content"),
    ("null content", CHAT, chat(messages=[{"role": "user", "content": None}]), "messages[0].content"),
    ("content a number", CHAT, chat(messages=[{"role": "user", "content": 3}]), "messages[0].content"),
    ("lone surrogate", CHAT, chat(messages=[{"role": "user", "content": "\ud800"}]), None),
    ("image part", CHAT, chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": CANARY}}]}]), "messages[0].content"),
    ("part not an object", CHAT, chat(messages=[{"role": "user", "content": [CANARY]}]), "messages[0].content"),
    ("part without text", CHAT, chat(messages=[{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content"),
    ("lone surrogate in a part", CHAT, chat(messages=[{"role": "user", "content": [{"type": "text", "text": "\udfff"}]}]), None),
    ("tool calls without an id", CHAT, chat(messages=[{"role": "assistant", "tool_calls": [{}]}]), "messages[0].tool_calls[0].id"),
    ("tool calls of a user", CHAT, chat(messages=[{"role": "user", "content": "", "tool_calls": [CALL]}]), "messages[0].tool_calls"),
    ("tool call arguments an object", CHAT, chat(messages=[{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {}}}]}]), "messages[0].tool_calls[0].function.arguments"),
    ("tool call of a special name", CHAT, chat(messages=[{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "<|im_end|>", "arguments": "{}"}}]}]), "messages[0].tool_calls[0].function.name"),
    ("too many tool calls", CHAT, chat(messages=[{"role": "assistant", "tool_calls": [CALL] * 257}]), "messages[0].tool_calls"),
    ("model a number", CHAT, chat(model=3), "model"),
    ("negative max_tokens", CHAT, chat(max_tokens=-1), "max_tokens"),
    ("zero max_tokens", CHAT, chat(max_tokens=0), "max_tokens"),
    ("huge max_tokens", CHAT, chat(max_tokens=2**63), "max_tokens"),
    ("huge max_completion_tokens", CHAT, chat(max_completion_tokens=10**30), "max_tokens"),
    ("max_tokens a string", CHAT, chat(max_tokens="5"), "max_tokens"),
    ("max_tokens a float", CHAT, chat(max_tokens=5.5), "max_tokens"),
    ("max_tokens a bool", CHAT, chat(max_tokens=True), "max_tokens"),
    ("temperature too high", CHAT, chat(temperature=2.1), "temperature"),
    ("temperature negative", CHAT, chat(temperature=-0.1), "temperature"),
    ("temperature a string", CHAT, chat(temperature=CANARY), "temperature"),
    ("top_p too high", CHAT, chat(top_p=1.5), "top_p"),
    ("top_k a float", CHAT, chat(top_k=0.5), "top_k"),
    ("min_p negative", CHAT, chat(min_p=-1), "min_p"),
    ("repeat_penalty zero", CHAT, chat(repeat_penalty=0), "repeat_penalty"),
    ("frequency_penalty too high", CHAT, chat(frequency_penalty=3), "frequency_penalty"),
    ("presence_penalty too low", CHAT, chat(presence_penalty=-3), "presence_penalty"),
    ("seed a string", CHAT, chat(seed="1"), "seed"),
    ("huge seed", CHAT, chat(seed=2**63), "seed"),
    ("n zero", CHAT, chat(n=0), "n"),
    ("n huge", CHAT, chat(n=10**6), "n"),
    ("stop a number", CHAT, chat(stop=1), "stop"),
    ("empty stop string", CHAT, chat(stop=[""]), "stop"),
    ("stop with a number inside", CHAT, chat(stop=["a", 1]), "stop"),
    ("too many stop strings", CHAT, chat(stop=["a"] * (MAX_STOPS + 1)), "stop"),
    ("long stop string", CHAT, chat(stop="a" * 5000), "stop"),
    ("lone surrogate in stop", CHAT, chat(stop="\ud800"), None),
    ("logit_bias a list", CHAT, chat(logit_bias=[1]), "logit_bias"),
    ("logit_bias key a word", CHAT, chat(logit_bias={CANARY: 1}), "logit_bias"),
    ("logit_bias value a string", CHAT, chat(logit_bias={"1": CANARY}), "logit_bias"),
    ("logit_bias too high", CHAT, chat(logit_bias={"1": 101}), "logit_bias"),
    ("logit_bias beyond the vocabulary", CHAT, chat(logit_bias={"1000": 1}), "logit_bias"),
    ("logit_bias too many", CHAT, chat(logit_bias={str(n): 1 for n in range(MAX_BIASES + 1)}), "logit_bias"),
    ("top_logprobs without logprobs", CHAT, chat(top_logprobs=2), "top_logprobs"),
    ("top_logprobs too many", CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    ("logprobs a number", CHAT, chat(logprobs=5), "logprobs"),
    ("stream a string", CHAT, chat(stream="yes"), "stream"),
    ("stream_options a list", CHAT, chat(stream_options=[]), "stream_options"),
    ("include_usage a number", CHAT, chat(stream_options={"include_usage": 1}), "stream_options.include_usage"),
    ("tools without a function", CHAT, chat(tools=[{"type": "function"}]), "tools[0].function"),
    ("tools of another type", CHAT, chat(tools=[{"type": "web_search"}]), "tools[0].type"),
    ("tools an object", CHAT, chat(tools={}), "tools"),
    ("tool with a special name", CHAT, chat(tools=[tool(name="<|im_start|>")]), "tools[0].function.name"),
    ("tool with a line end in its name", CHAT, chat(tools=[tool(name="f\n")]), "tools[0].function.name"),
    ("tool with an empty name", CHAT, chat(tools=[tool(name="")]), "tools[0].function.name"),
    ("tool twice", CHAT, chat(tools=[tool(), tool()]), "tools"),
    ("too many tools", CHAT, chat(tools=[tool(name=f"f{n}") for n in range(513)]), "tools"),
    ("tool parameters a list", CHAT, chat(tools=[tool(parameters=[])]), "tools[0].function.parameters"),
    ("tool parameters too deep", CHAT, chat(tools=[tool(parameters=deep(100))]), "tools[0].function.parameters"),
    ("functions", CHAT, chat(functions=[{"name": "f"}]), "functions"),
    ("function_call", CHAT, chat(function_call={"name": "f"}), "function_call"),
    ("tool_choice without tools", CHAT, chat(tool_choice="required"), "tool_choice"),
    ("tool_choice of no tool", CHAT, chat(tools=[tool()], tool_choice={"type": "function", "function": {"name": "g"}}), "tool_choice"),
    ("required tool with an impossible schema", CHAT, chat(tools=[tool(parameters={"properties": {"a": {"$ref": "http://x"}}})], tool_choice="required"), "tool_choice"),
    ("template option of a reserved name", CHAT, chat(chat_template_kwargs={"messages": 1}), "chat_template_kwargs"),
    ("template option an object", CHAT, chat(chat_template_kwargs={"a": {}}), "chat_template_kwargs"),
    ("template option too long", CHAT, chat(chat_template_kwargs={"a": "x" * 257}), "chat_template_kwargs"),
    ("too many template options", CHAT, chat(chat_template_kwargs={f"a{n}": 1 for n in range(17)}), "chat_template_kwargs"),
    ("chat_template", CHAT, chat(chat_template="{{ messages }}"), "chat_template"),
    ("unknown response_format", CHAT, chat(response_format={"type": "xml"}), "response_format.type"),
    ("response_format without a schema", CHAT, chat(response_format={"type": "json_schema"}), "response_format"),
    ("response_format with a pattern, strict", CHAT, schema({"type": "string", "pattern": "^a"}, strict=True), "response_format"),
    ("response_format with a pattern, strict, and tools", CHAT, chat(tools=[tool()], response_format={"type": "json_schema", "json_schema": {"schema": {"type": "string", "pattern": "^a"}, "strict": True}}), "response_format"),
    ("schema no object", CHAT, schema(3), "response_format"),
    ("schema false", CHAT, schema({"properties": {"a": False}}), "response_format"),
    ("schema too deep", CHAT, schema(nested_lists(40)), "response_format"),
    ("schema much too deep", CHAT, schema(deep(300)), "response_format.json_schema.schema"),
    ("schema with a remote reference", CHAT, schema({"$ref": "https://example.com/schema.json"}), "response_format"),
    ("schema with a dangling reference", CHAT, schema({"$ref": "#/$defs/a"}), "response_format"),
    ("schema that is itself", CHAT, schema({"$ref": "#"}), "response_format"),
    ("schemas that are each other", CHAT, schema({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}), "response_format"),
    ("schema with itself in allOf", CHAT, schema({"allOf": [{"$ref": "#"}]}), "response_format"),
    ("schema of too many parts", CHAT, schema({"anyOf": [{"anyOf": [{"type": "string"}] * 100}] * 100}), "response_format"),
    ("enum too long", CHAT, schema({"enum": list(range(1001))}), "response_format"),
    ("enum too large", CHAT, schema({"enum": ["x" * 60_000]}), "response_format"),
    ("enum empty", CHAT, schema({"enum": []}), "response_format"),
    ("too many properties", CHAT, schema({"properties": {str(n): {} for n in range(201)}}), "response_format"),
    ("minLength too large", CHAT, schema({"type": "string", "minLength": 20_000}), "response_format"),
    ("maxLength too large, strict", CHAT, schema({"type": "string", "maxLength": 20_000}, strict=True), "response_format"),
    ("minItems above maxItems", CHAT, schema({"type": "array", "minItems": 3, "maxItems": 2}), "response_format"),
    ("minimum too large", CHAT, schema({"type": "integer", "minimum": "@"}).replace(b'"@"', b"1e999"), "response_format"),
    ("minimum a word", CHAT, schema({"type": "integer", "minimum": "x"}), "response_format"),
    ("minimum above maximum", CHAT, schema({"type": "integer", "minimum": 3, "maximum": 2}), "response_format"),
    ("constant too large", CHAT, schema({"const": "@"}).replace(b'"@"', b"1e999"), "response_format"),
    ("type nobody knows", CHAT, schema({"type": "int"}), "response_format"),
    ("grammar without a root", CHAT, chat(grammar="a ::= [0-9]"), "grammar"),
    ("grammar cut off", CHAT, chat(grammar='root ::= "a'), "grammar"),
    ("grammar that begins with itself", CHAT, chat(grammar='root ::= root "a" | "b"'), "grammar"),
    ("grammar with a rule that is not there", CHAT, chat(grammar="root ::= digit"), "grammar"),
    ("grammar too deep", CHAT, chat(grammar="root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000), "grammar"),
    ("grammar that repeats too much", CHAT, chat(grammar='root ::= "a"{1000000}'), "grammar"),
    ("grammar that doubles", CHAT, chat(grammar=DOUBLING), "grammar"),
    ("grammar too long", CHAT, chat(grammar='root ::= "a"' + " " * 70_000), "grammar"),
    ("two forms", CHAT, chat(grammar='root ::= "a"', response_format={"type": "json_object"}), "grammar"),
    ("grammar and tools", CHAT, chat(grammar='root ::= "a"', tools=[tool()]), "grammar"),
    ("grammar and ignore_eos", CHAT, chat(grammar='root ::= "a"', ignore_eos=True), "ignore_eos"),
    ("json_schema", TEXT, text(json_schema={"type": "tuple"}), "json_schema"),
    ("guided_json no JSON", TEXT, text(guided_json="{"), "guided_json"),
    ("guided_regex", TEXT, text(guided_regex="a*"), "guided_regex"),
    ("guided_choice empty", TEXT, text(guided_choice=[]), "guided_choice"),
    ("structured_outputs regex", TEXT, text(structured_outputs={"regex": "(a+)+$"}), "structured_outputs.regex"),
    ("min_tokens above max_tokens", TEXT, text(min_tokens=9, max_tokens=8), "min_tokens"),
    ("two repetition penalties", TEXT, text(repetition_penalty=1.1, repeat_penalty=1.2), "repetition_penalty"),
    ("prompt_cache_retention", TEXT, text(prompt_cache_retention="1y"), "prompt_cache_retention"),
    ("audio", CHAT, chat(modalities=["text", "audio"]), "modalities"),
    ("short cache_salt", CHAT, chat(cache_salt="a" * 31), "cache_salt"),
    ("long cache_salt", CHAT, chat(cache_salt="a" * 129), "cache_salt"),
    ("over-long prompt", CHAT, chat(messages=[{"role": "user", "content": "a" * 5000}]), "messages"),
    ("no prompt", TEXT, b"{}", "prompt"),
    ("null prompt", TEXT, text(prompt=None), "prompt"),
    ("empty prompt list", TEXT, text(prompt=[]), "prompt"),
    ("empty inner list", TEXT, text(prompt=[[]]), "prompt"),
    ("mixed prompt list", TEXT, text(prompt=["a", 1]), "prompt"),
    ("bools for ids", TEXT, text(prompt=[True, False]), "prompt"),
    ("float ids", TEXT, text(prompt=[1.5]), "prompt"),
    ("mixed ids", TEXT, text(prompt=[[1, "a"]]), "prompt"),
    ("negative id", TEXT, text(prompt=[-1]), "prompt"),
    ("id beyond the vocabulary", TEXT, text(prompt=[1, 1000]), "prompt"),
    ("id beyond 32 bits", TEXT, text(prompt=[[2**40]]), "prompt"),
    ("id beyond 31 bits", TEXT, text(prompt=[2**31]), "prompt"),
    ("lone surrogate in prompt", TEXT, text(prompt="\ud83d"), None),
    ("lone surrogate in one of the prompts", TEXT, text(prompt=["a", "\udc00"]), None),
    ("too many prompts", TEXT, text(prompt=["a"] * 65), "prompt"),
    ("too many prompts times n", TEXT, text(prompt=["a"] * 33, n=2), "prompt"),
    ("over-long token prompt", TEXT, text(prompt=[5] * 4096), "prompt"),
    ("prompt and max_tokens too long together", TEXT, text(prompt=[5] * 4000, max_tokens=97), "prompt"),
    ("echo", TEXT, text(echo=True), "echo"),
    ("suffix", TEXT, text(suffix=CANARY), "suffix"),
    ("best_of", TEXT, text(best_of=2), "best_of"),
    ("text logprobs too many", TEXT, text(logprobs=21), "logprobs"),
    ("text logprobs a bool", TEXT, text(logprobs=True), "logprobs"),
    ("tokenize without content", "/tokenize", b"{}", "content"),
    ("tokenize a number", "/tokenize", b'{"content": 1}', "content"),
    ("tokenize a lone surrogate", "/tokenize", b'{"content": "\\ud800"}', None),
    ("detokenize a word", "/detokenize", b'{"tokens": "x"}', "tokens"),
    ("detokenize beyond the vocabulary", "/detokenize", b'{"tokens": [1000]}', "tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "param"), [case[1:] for case in BODIES], ids=[case[0] for case in BODIES])
async def test_bad_body_is_refused(
    client: httpx.AsyncClient, runtime: FakeRuntime, path: str, body: bytes, param: str | None
) -> None:
    response = await client.post(path, content=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert len(error["message"]) > 15
    assert CANARY not in response.text, "a value of the request is in the answer"
    assert response.headers["x-request-id"]
    assert not runtime.requests


async def test_the_appliance_goes_on_after_bad_input(client: httpx.AsyncClient) -> None:
    for _, path, body, _ in BODIES[:20]:
        await client.post(path, content=body)
    response = await client.post(CHAT, content=chat())
    assert response.status_code == 200


async def test_over_long_prompt_names_the_numbers(client: httpx.AsyncClient) -> None:
    response = await client.post(TEXT, content=text(prompt=[5] * 4000, max_tokens=97))
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert all(number in error["message"] for number in ("4096", "4000", "97"))


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_unknown_model_names_the_served_one(client: httpx.AsyncClient, path: str) -> None:
    body = {"model": CANARY, "messages": HELLO, "prompt": "hi"}
    response = await client.post(path, json=body)
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert MODEL.id in error["message"]
    assert CANARY not in response.text


async def test_unknown_fields_are_ignored(client: httpx.AsyncClient) -> None:
    extra = {"store": True, "metadata": {"a": 1}, "user": "u", "prompt_cache_key": "k", "cache_prompt": True}
    response = await client.post(CHAT, json={"messages": HELLO, "unheard_of": [1], **extra})
    assert response.status_code == 200


async def test_null_means_the_default(client: httpx.AsyncClient, runtime: FakeRuntime) -> None:
    names = [
        "max_tokens",
        "temperature",
        "top_p",
        "seed",
        "stop",
        "logit_bias",
        "n",
        "stream",
        "stream_options",
        "tools",
    ]
    nulls = dict.fromkeys([*names, "response_format", "tool_choice", "logprobs", "cache_salt", "model"])
    response = await client.post(CHAT, json={"messages": HELLO, **nulls})
    assert response.status_code == 200
    assert runtime.requests[0].sampling.temperature == 1.0
    assert runtime.requests[0].sampling.max_tokens == MODEL.default_max_tokens


async def test_a_body_over_the_limit_is_413(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, content=b" " * (2**20 + 1))
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert str(2**20) in response.json()["error"]["message"]


async def test_a_body_of_exactly_the_limit_is_read(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, content=chat().ljust(2**20))
    assert response.status_code == 200
