"""The unmodified `anthropic` client against a real web server on loopback: answers, streams, tools, errors, retries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest

from appliance.errors import EngineDied, Overloaded
from appliance.types import FinishReason
from tests.support.fake_runtime import COMPLETION, MODEL, FakeRuntime
from tests.support.listening import listening

HELLO: list[Any] = [{"role": "user", "content": "hi"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {"name": "get_weather", "description": "d", "input_schema": PARAMETERS}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'


@pytest.fixture
def base_url(tmp_path: Path, runtime: FakeRuntime) -> Iterator[str]:
    with listening(tmp_path / "kvctl.sock", runtime) as url:
        yield url.removesuffix("/v1")


@pytest.fixture
def client(base_url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=base_url, api_key="key-of-alice", max_retries=0) as client:
        yield client


def ask(client: anthropic.Anthropic, **fields: Any) -> anthropic.types.Message:
    return client.messages.create(**{"model": MODEL.id, "messages": HELLO, "max_tokens": 500, **fields})


def test_an_answer(client: anthropic.Anthropic) -> None:
    answer = ask(client)
    assert [block.model_dump(exclude_none=True) for block in answer.content] == [{"type": "text", "text": COMPLETION}]
    assert (answer.stop_reason, answer.stop_sequence, answer.role, answer.model) == (
        "end_turn",
        None,
        "assistant",
        MODEL.id,
    )
    assert answer._request_id


def test_usage_adds_up_to_the_prompt_and_a_mark_names_what_is_kept(client: anthropic.Anthropic) -> None:
    n = client.messages.count_tokens(model=MODEL.id, messages=HELLO).input_tokens
    first, again = ask(client).usage, ask(client).usage
    assert (first.input_tokens, first.cache_read_input_tokens) == (n - n // 2, n // 2)
    assert (again.input_tokens, again.cache_read_input_tokens, again.cache_creation_input_tokens) == (1, n - 1, 0)
    marked = ask(client, system=[{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}]).usage
    assert (marked.input_tokens, marked.cache_creation_input_tokens) == (0, -(-(n + 10) // 2))
    assert first.output_tokens == len(COMPLETION)


def test_a_stream_is_the_answer_and_its_events_come_in_order(client: anthropic.Anthropic) -> None:
    ask(client)
    with client.messages.stream(model=MODEL.id, messages=HELLO, max_tokens=500) as stream:
        message = stream.get_final_message()
    assert message.content[0].text == COMPLETION  # type: ignore[union-attr]
    assert message.usage.model_dump(exclude_none=True) == ask(client).usage.model_dump(exclude_none=True)
    events = list(client.messages.create(model=MODEL.id, messages=HELLO, max_tokens=500, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}


def test_calls_are_tool_use_whole_and_streamed(client: anthropic.Anthropic, runtime: FakeRuntime) -> None:
    runtime.completion = f"Let me look.\n{CALL}\n{CALL}"
    whole = ask(client, tools=[WEATHER])
    with client.messages.stream(model=MODEL.id, messages=HELLO, max_tokens=500, tools=[WEATHER]) as stream:
        streamed = stream.get_final_message()
    for answer in (whole, streamed):
        said, *calls = answer.content
        assert said.type == "text"
        assert said.text == "Let me look."
        assert [(call.type, call.name, call.input) for call in calls] == [("tool_use", "get_weather", {"city": "Rome"})] * 2  # type: ignore[union-attr]  # fmt: skip
        assert len({call.id for call in calls}) == 2  # type: ignore[union-attr]
        assert answer.stop_reason == "tool_use"


def test_a_conversation_with_results_reaches_the_template(client: anthropic.Anthropic, runtime: FakeRuntime) -> None:
    billing = {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=0a1b2;"}
    ask(
        client,
        system=[billing, {"type": "text", "text": "be"}, {"type": "text", "text": "brief"}],
        messages=[
            *HELLO,
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "text", "text": "looking"},
                    {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Rome"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sunny"}]},
                    {"type": "text", "text": "and?"},
                ],
            },
        ],
        tools=[WEATHER],
    )
    call = {"id": "t1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    assert runtime.messages[-1] == [
        {"role": "system", "content": "be\nbrief"},
        *HELLO,
        {"role": "assistant", "content": "looking", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "t1", "content": "sunny", "name": "get_weather"},
        {"role": "user", "content": "and?"},
    ]
    assert runtime.tools[-1] == [
        {"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": PARAMETERS}}
    ]


@pytest.mark.parametrize(
    ("choice", "held"),
    [({"type": "any"}, True), ({"type": "tool", "name": "get_weather"}, True), ({"type": "auto"}, False), ({"type": "none"}, False)],
)  # fmt: skip
def test_a_tool_that_must_be_called_is(
    client: anthropic.Anthropic, runtime: FakeRuntime, choice: Any, held: bool
) -> None:
    ask(client, tools=[WEATHER], tool_choice=choice)
    assert (runtime.requests[-1].sampling.grammar is not None) is held


def test_what_is_asked_for_is_sampled(client: anthropic.Anthropic, runtime: FakeRuntime) -> None:
    ask(
        client, stop_sequences=["END"], metadata={"user_id": "u"}, max_tokens=5,
        cache_control={"type": "ephemeral", "ttl": "1h"}, thinking={"type": "enabled", "budget_tokens": 1024},
        extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 7},
    )  # fmt: skip
    request = runtime.requests[-1]
    sampling = request.sampling
    assert (sampling.stop, sampling.temperature, sampling.top_p, sampling.top_k) == (("END",), 0.5, 0.9, 7)
    assert (sampling.max_tokens, request.session, request.retention_s) == (5, "u", 3600)


def test_the_reason_of_the_end(client: anthropic.Anthropic, runtime: FakeRuntime) -> None:
    assert ask(client, max_tokens=3).stop_reason == "max_tokens"
    runtime.stop = "END"
    answer = ask(client, stop_sequences=["END"])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "END")
    runtime.stop, runtime.reason = None, FinishReason.LENGTH
    assert ask(client, max_tokens=20_000).stop_reason == "model_context_window_exceeded"


def test_models_are_the_clients_own(client: anthropic.Anthropic) -> None:
    (model,) = client.models.list()
    assert (model.id, model.type, model.display_name) == (MODEL.id, "model", MODEL.description)
    assert int(client.models.retrieve(MODEL.id).created_at.timestamp()) == MODEL.created
    with pytest.raises(anthropic.NotFoundError):
        client.models.retrieve("other")


def test_a_bearer_token_is_a_key_too(base_url: str) -> None:
    with anthropic.Anthropic(base_url=base_url, auth_token="key-of-bob", api_key=None) as client:
        assert ask(client).stop_reason == "end_turn"


@pytest.mark.parametrize(
    ("error", "raised", "kind"),
    [
        (Overloaded("full", retry_after_s=3), anthropic.RateLimitError, "rate_limit_error"),
        (Overloaded("stopping", retry_after_s=3, status=503), anthropic.InternalServerError, "overloaded_error"),
        (EngineDied("died"), anthropic.InternalServerError, "overloaded_error"),
        (ValueError("a bug"), anthropic.InternalServerError, "api_error"),
    ],
)
def test_failures_are_the_clients_own_errors(
    client: anthropic.Anthropic,
    runtime: FakeRuntime,
    error: Exception,
    raised: type[anthropic.APIStatusError],
    kind: str,
) -> None:
    runtime.error = error
    with pytest.raises(raised) as failed:
        ask(client)
    assert failed.value.body["error"]["type"] == kind  # type: ignore[index]
    assert failed.value.request_id
    assert ("retry-after" in failed.value.response.headers) is not isinstance(error, ValueError)
    runtime.error_after = 2
    with pytest.raises(anthropic.APIStatusError) as late, client.messages.stream(model=MODEL.id, messages=HELLO, max_tokens=9) as stream:  # fmt: skip
        stream.until_done()
    assert late.value.body["error"]["type"] == kind  # type: ignore[index]


def test_mistakes_are_the_clients_own_errors(client: anthropic.Anthropic, base_url: str) -> None:
    with pytest.raises(anthropic.NotFoundError):
        ask(client, model="other")
    with pytest.raises(anthropic.BadRequestError, match="images"):
        ask(client, messages=[{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "u"}}]}])
    with pytest.raises(anthropic.BadRequestError, match="continued"):
        ask(client, messages=[*HELLO, {"role": "assistant", "content": "It"}])
    with pytest.raises(anthropic.BadRequestError, match=r"output_config\.format: "):
        ask(client, output_config={"format": {"type": "json_schema", "schema": {"enum": []}}})
    with pytest.raises(anthropic.BadRequestError, match="host"):
        ask(client, tools=[{"type": "web_search_20250305", "name": "web_search"}])
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.post("/v1/messages", body={"messages": HELLO}, cast_to=object)
    with (
        anthropic.Anthropic(base_url=base_url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(anthropic.AuthenticationError),
    ):
        stranger.models.list()


def test_a_full_queue_is_tried_again(base_url: str, runtime: FakeRuntime) -> None:
    runtime.error, runtime.errors_left = Overloaded("full", retry_after_s=0.1), 1
    with anthropic.Anthropic(base_url=base_url, api_key="key-of-alice", max_retries=2) as client:
        assert ask(client).stop_reason == "end_turn"
    assert len(runtime.requests) == 2
