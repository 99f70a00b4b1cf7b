"""/v1/responses with the unmodified `openai` client: answers, events, tools, forms, what is not kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses import Response

from appliance.errors import Overloaded
from tests.support.fake_runtime import COMPLETION, MODEL, FakeRuntime
from tests.support.listening import listening

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {"type": "function", "name": "get_weather", "description": "d", "parameters": PARAMETERS}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'


@pytest.fixture
def client(tmp_path: Path, runtime: FakeRuntime) -> Iterator[openai.OpenAI]:
    with (
        listening(tmp_path / "kvctl.sock", runtime) as url,
        openai.OpenAI(base_url=url, api_key="key-of-alice", max_retries=0) as client,
    ):
        yield client


def ask(client: openai.OpenAI, **fields: Any) -> Response:
    answer: Response = client.responses.create(**{"model": MODEL.id, "input": "hi", "max_output_tokens": 500, **fields})
    return answer


def test_an_answer_and_its_usage(client: openai.OpenAI) -> None:
    first, again = ask(client), ask(client, store=True)
    assert (first.output_text, first.status, first.object) == (COMPLETION, "completed", "response")
    assert first.usage is not None
    assert again.usage is not None
    assert again.usage.input_tokens_details.cached_tokens == again.usage.input_tokens - 1
    assert first.usage.total_tokens == first.usage.input_tokens + len(COMPLETION)
    assert again.model_dump()["store"] is False


def test_a_stream_is_the_answer_and_its_events_are_numbered(client: openai.OpenAI) -> None:
    ask(client)
    events = list(client.responses.create(model=MODEL.id, input="hi", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    with client.responses.stream(model=MODEL.id, input="hi") as stream:
        final = stream.get_final_response()
    assert final.output_text == COMPLETION
    assert final.usage == ask(client).usage


def test_calls_whole_and_streamed(client: openai.OpenAI, runtime: FakeRuntime) -> None:
    runtime.completion = f"Let me look.\n{CALL}\n{CALL}"
    whole = ask(client, tools=[WEATHER])
    with client.responses.stream(model=MODEL.id, input="hi", tools=[WEATHER], max_output_tokens=500) as stream:
        streamed = stream.get_final_response()
    for answer in (whole, streamed):
        assert answer.output_text == "Let me look."
        calls = [item for item in answer.output if item.type == "function_call"]
        assert [(call.name, call.arguments) for call in calls] == [("get_weather", '{"city": "Rome"}')] * 2
        assert len({call.call_id for call in calls}) == 2


def test_a_conversation_with_results_reaches_the_template(client: openai.OpenAI, runtime: FakeRuntime) -> None:
    runtime.completion = CALL
    question: Any = {"role": "user", "content": [{"type": "input_text", "text": "Weather in Rome?"}]}
    answer = ask(client, input=[question], tools=[WEATHER])
    (called,) = answer.output
    assert called.type == "function_call"
    result = {"type": "function_call_output", "call_id": called.call_id, "output": "sunny"}
    ask(client, instructions="be brief", input=[question, called.model_dump(), result], tools=[WEATHER])
    function = {"name": "get_weather", "arguments": '{"city": "Rome"}'}
    assert runtime.messages[-1] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "Weather in Rome?"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": called.call_id, "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": called.call_id, "content": "sunny", "name": "get_weather"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        {"text": {"format": {"type": "json_object"}}},
        {"text": {"format": {"type": "json_schema", "name": "n", "schema": PARAMETERS, "strict": True}}},
        {"tools": [WEATHER], "tool_choice": "required"},
        {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "get_weather"}},
    ],
    ids=str,
)
def test_a_form_is_held_to(client: openai.OpenAI, runtime: FakeRuntime, fields: Any) -> None:
    ask(client, **fields)
    assert runtime.requests[-1].sampling.grammar


def test_what_is_said_about_the_cache_arrives(client: openai.OpenAI, runtime: FakeRuntime) -> None:
    ask(client, prompt_cache_key="session 1", prompt_cache_retention="24h", temperature=0.5, top_p=0.9)
    request = runtime.requests[-1]
    assert (request.session, request.retention_s) == ("session 1", 86_400)
    assert (request.sampling.temperature, request.sampling.top_p) == (0.5, 0.9)


def test_an_answer_that_is_cut_off_says_so(client: openai.OpenAI) -> None:
    answer = ask(client, max_output_tokens=3)
    assert (answer.status, answer.output_text) == ("incomplete", COMPLETION[:3])
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert list(client.responses.create(input="hi", max_output_tokens=3, stream=True))[-1].type == "response.incomplete"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"previous_response_id": "resp_1"}, "whole conversation"),
        ({"background": True}, "not kept"),
        ({"tools": [{"type": "web_search"}]}, "do not run here"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "items are supported"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "u"}]}]}, "images"),
        ({"input": []}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"enum": []}}}}, "text.format"),
        ({"tool_choice": {"type": "x"}}, " tool_choice: should"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused(client: openai.OpenAI, runtime: FakeRuntime, fields: Any, says: str) -> None:
    with pytest.raises(openai.BadRequestError, match=says):
        ask(client, **fields)
    assert not runtime.requests


def test_failures_are_the_clients_own_errors(client: openai.OpenAI, runtime: FakeRuntime) -> None:
    runtime.error = Overloaded("full", retry_after_s=3)
    with pytest.raises(openai.RateLimitError) as failed:
        ask(client)
    assert failed.value.response.headers["retry-after"] == "3"
    runtime.error_after = 2
    *_, last = client.responses.create(model=MODEL.id, input="hi", stream=True)
    assert (last.type, last.code) == ("error", "overloaded")  # type: ignore[union-attr]
