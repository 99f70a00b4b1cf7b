"""Tools and forms of answers through the API: what reaches the model, what a client gets back, whole and streamed."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import httpx
import pytest

from appliance.chat.gbnf import check
from appliance.server.app import public_app
from tests.support.fake_runtime import FakeRuntime, service

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Weather in Rome?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": PARAMETERS}}
TIME = {"type": "function", "function": {"name": "get_time"}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'


async def ask(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post(CHAT, json={"messages": HELLO, "tools": [WEATHER, TIME], "max_tokens": 500, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def chunks(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    body = {"messages": HELLO, "tools": [WEATHER, TIME], "max_tokens": 500, "stream": True, **fields}
    async with client.stream("POST", CHAT, json=body) as response:
        lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def test_a_call_is_a_tool_call(client: httpx.AsyncClient, runtime: FakeRuntime) -> None:
    runtime.completion = CALL
    choice = (await ask(client))["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert call["id"].startswith("call_")
    assert (call["type"], call["function"]) == ("function", {"name": "get_weather", "arguments": '{"city": "Rome"}'})
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == "tool_calls"


async def test_text_before_calls_is_kept(client: httpx.AsyncClient, runtime: FakeRuntime) -> None:
    runtime.completion = f"Let me look.\n{CALL}\n{CALL}"
    message = (await ask(client))["choices"][0]["message"]
    assert message["content"] == "Let me look."
    assert len({call["id"] for call in message["tool_calls"]}) == 2


async def test_an_answer_without_calls_is_as_without_tools(client: httpx.AsyncClient, runtime: FakeRuntime) -> None:
    choice = (await ask(client))["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": runtime.completion}
    assert choice["finish_reason"] == "stop"


async def test_a_malformed_call_stays_text(client: httpx.AsyncClient, runtime: FakeRuntime) -> None:
    runtime.completion = '<tool_call>{"name": "get_weather", "arguments": {"city": </tool_call>'
    choice = (await ask(client))["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": runtime.completion}
    assert choice["finish_reason"] == "stop"


async def test_a_call_that_is_cut_off_says_so(client: httpx.AsyncClient, runtime: FakeRuntime) -> None:
    runtime.completion = CALL
    answer = await ask(client, max_tokens=len(CALL) - 20)
    assert answer["choices"][0]["finish_reason"] == "length"
    streamed = await chunks(client, max_tokens=len(CALL) - 20)
    assert streamed[-1]["choices"][0]["finish_reason"] == "length"


async def test_calls_stream_name_first_then_arguments(client: httpx.AsyncClient, runtime: FakeRuntime) -> None:
    runtime.completion = f"Let me look.\n{CALL}\n{CALL}"
    deltas = [chunk["choices"][0]["delta"] for chunk in await chunks(client)]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content") or "" for delta in deltas) == "Let me look."
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    for index in (0, 1):
        first, *rest = [call for call in calls if call["index"] == index]
        assert first["function"] == {"name": "get_weather", "arguments": ""}
        assert first["id"].startswith("call_")
        assert len(rest) > 3, "arguments come as they are written"
        assert all(set(call) == {"index", "function"} for call in rest)
        assert "".join(call["function"]["arguments"] for call in rest) == '{"city": "Rome"}'


async def test_a_stream_of_calls_ends_with_tool_calls_and_usage(
    client: httpx.AsyncClient, runtime: FakeRuntime
) -> None:
    runtime.completion = CALL
    streamed = await chunks(client, stream_options={"include_usage": True})
    *earlier, last = streamed
    assert earlier[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert all("usage" in chunk and chunk["usage"] is None for chunk in earlier)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len(CALL)


async def test_log_probabilities_of_calls_are_not_lost(client: httpx.AsyncClient, runtime: FakeRuntime) -> None:
    runtime.completion = CALL
    streamed = await chunks(client, logprobs=True)
    scored = [
        entry
        for chunk in streamed
        if chunk["choices"][0]["logprobs"]
        for entry in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert "".join(entry["token"] for entry in scored) == CALL


async def test_several_choices_are_parsed_apart(client: httpx.AsyncClient, runtime: FakeRuntime) -> None:
    runtime.completion = CALL
    whole = await ask(client, n=3)
    assert [len(choice["message"]["tool_calls"]) for choice in whole["choices"]] == [1, 1, 1]
    streamed = await chunks(client, n=3)
    starts = [
        chunk["choices"][0] for chunk in streamed if "name" in str(chunk["choices"][0]["delta"].get("tool_calls", ""))
    ]
    assert sorted(choice["index"] for choice in starts) == [0, 1, 2]


async def test_without_parallel_calls_only_the_first_counts(client: httpx.AsyncClient, runtime: FakeRuntime) -> None:
    runtime.completion = f"{CALL}\n{CALL}"
    message = (await ask(client, parallel_tool_calls=False))["choices"][0]["message"]
    assert len(message["tool_calls"]) == 1


async def test_no_choice_of_tools_leaves_text_alone(client: httpx.AsyncClient, runtime: FakeRuntime) -> None:
    runtime.completion = CALL
    choice = (await ask(client, tool_choice="none"))["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": CALL}
    assert runtime.tools[-1] == [WEATHER, {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}], "the prompt, so its KV, does not depend on the choice"  # fmt: skip


@pytest.mark.parametrize(
    ("choice", "named", "unnamed"),
    [("required", ("get_weather", "get_time"), ()), ({"type": "function", "function": {"name": "get_time"}}, ("get_time",), ("get_weather",))],
)  # fmt: skip
async def test_a_required_call_is_enforced_by_a_grammar(
    client: httpx.AsyncClient, runtime: FakeRuntime, choice: Any, named: tuple[str, ...], unnamed: tuple[str, ...]
) -> None:
    await ask(client, tool_choice=choice)
    grammar = runtime.requests[-1].sampling.grammar
    assert grammar
    check(grammar)
    assert all(name in grammar for name in named)
    assert not any(name in grammar for name in unnamed)


async def test_a_conversation_with_calls_reaches_the_template(client: httpx.AsyncClient, runtime: FakeRuntime) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        {"role": "developer", "content": "be brief"},
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "sunny"}]},
    ]
    await ask(client, messages=messages, chat_template_kwargs={"enable_thinking": False}, reasoning_effort="low")
    assert runtime.messages[-1] == [
        {"role": "system", "content": "be brief"},
        *HELLO,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny", "name": "get_weather"},
    ]
    assert runtime.options[-1] == {"enable_thinking": False, "reasoning_effort": "low"}


FORMS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": PARAMETERS, "strict": True}}},
    {"response_format": {"type": "json_object", "schema": PARAMETERS}},
    {"json_schema": PARAMETERS},
    {"grammar": 'root ::= "a"'},
    {"guided_json": PARAMETERS},
    {"guided_json": json.dumps(PARAMETERS)},
    {"guided_grammar": 'root ::= "a"'},
    {"guided_choice": ["a", "b"]},
    {"structured_outputs": {"json": PARAMETERS}},
    {"structured_outputs": {"choice": ["a", "b"]}},
    {"structured_outputs": {"json_object": True}},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
async def test_every_way_to_ask_for_a_form_is_a_grammar(
    client: httpx.AsyncClient, runtime: FakeRuntime, path: str, form: dict[str, Any]
) -> None:
    response = await client.post(path, json={"messages": HELLO, "prompt": "p", "n": 2, **form})
    assert response.status_code == 200, response.text
    grammars = {request.sampling.grammar for request in runtime.requests}
    assert len(grammars) == 1
    check(grammars.pop() or "")


@pytest.mark.parametrize(
    "form", [{"response_format": {"type": "text"}}, {"response_format": None, "grammar": None}, {"grammar": ""}]
)
async def test_text_needs_no_grammar(client: httpx.AsyncClient, runtime: FakeRuntime, form: dict[str, Any]) -> None:
    await ask(client, tools=None, **form)
    assert runtime.requests[-1].sampling.grammar is None


async def test_a_form_and_tools_are_calls_or_an_answer(client: httpx.AsyncClient, runtime: FakeRuntime) -> None:
    await ask(client, response_format={"type": "json_object"})
    grammar = runtime.requests[-1].sampling.grammar
    assert grammar
    assert grammar.splitlines()[0].count("|") == 1


async def test_an_engine_without_grammars_says_so(runtime: FakeRuntime) -> None:
    plain = service(runtime)
    app = public_app(dataclasses.replace(plain, model=dataclasses.replace(plain.model, grammars=False)))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://a", headers={"authorization": "Bearer key-of-alice"}
    ) as client:
        response = await client.post(CHAT, json={"messages": HELLO, "response_format": {"type": "json_object"}})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "response_format")
    assert not runtime.requests


async def test_what_clients_say_about_the_cache_and_penalties_arrives(
    client: httpx.AsyncClient, runtime: FakeRuntime
) -> None:
    await ask(client, prompt_cache_key="session 1", prompt_cache_retention="24h", repetition_penalty=1.3, min_tokens=2)
    request = runtime.requests[-1]
    assert (request.session, request.retention_s) == ("session 1", 86_400)
    assert (request.sampling.repeat_penalty, request.sampling.min_tokens) == (1.3, 2)
    await ask(client, prompt_cache_retention="30m")
    assert runtime.requests[-1].retention_s == 1800
    await ask(client, prompt_cache_retention="in_memory")
    assert (runtime.requests[-1].session, runtime.requests[-1].retention_s) == (None, 0)
