"""The unmodified `openai` client, from eight threads at once: every answer is the one a single caller gets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import Any, Literal

import anthropic
import numpy as np
import openai
import pytest
from pydantic import BaseModel, Field

from kvctl.client import read_client_file
from tests.support.appliance import BLOCK, COMPLETION_TOKENS, Appliance, prompt, text

THREADS = 8
PROMPTS = [prompt(seed, BLOCK * (1 + seed % 4) + 7 * seed) for seed in range(THREADS)]


@pytest.fixture(scope="module")
def client(served: Appliance) -> Iterator[openai.OpenAI]:
    api_key = read_client_file(served.home)[1]
    with openai.OpenAI(base_url=f"{served.base_url}/v1", api_key=api_key, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def alone(served: Appliance) -> list[str]:
    """Completions of PROMPTS, one after the other, in a part of the cache that nobody else uses."""
    return [served.complete(tokens, cache_salt="0" * 32).text for tokens in PROMPTS]


def complete(client: openai.OpenAI, tokens: str | list[int], salt: str) -> str:
    answer = client.completions.create(
        model="tiny", prompt=tokens, temperature=0, max_tokens=COMPLETION_TOKENS, extra_body={"cache_salt": salt}
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(tokens)
    return answer.choices[0].text


def stream(client: openai.OpenAI, tokens: str | list[int], salt: str) -> str:
    chunks = client.completions.create(
        model="tiny",
        prompt=tokens,
        temperature=0,
        max_tokens=COMPLETION_TOKENS,
        stream=True,
        extra_body={"cache_salt": salt},
    )
    return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)


def test_eight_threads_get_what_one_gets(client: openai.OpenAI, alone: list[str]) -> None:
    def ask(thread: int) -> list[list[str]]:
        """All prompts, each thread from another one on, half the threads in a cache that is still cold."""
        order = [(thread + n) % len(PROMPTS) for n in range(len(PROMPTS))]
        salt = str(thread % 2) * 32
        answers: dict[int, list[str]] = {}
        for n in order:
            ids = PROMPTS[n]
            answers[n] = [complete(client, ids, salt), stream(client, text(ids), salt)]
        return [answers[n] for n in range(len(PROMPTS))]

    with ThreadPoolExecutor(THREADS) as pool:
        for answers in pool.map(ask, range(THREADS)):
            assert answers == [[expected, expected] for expected in alone]


def test_chats_stream_what_they_answer(client: openai.OpenAI) -> None:
    def ask(n: int) -> tuple[str, str]:
        messages = [{"role": "system", "content": text(PROMPTS[n])}, {"role": "user", "content": f"question {n}"}]
        options = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": COMPLETION_TOKENS}
        whole = client.chat.completions.create(**options)
        chunks = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
        parts, cached = [], None
        for chunk in chunks:
            parts += [choice.delta.content or "" for choice in chunk.choices]
            if chunk.usage is not None:
                cached = chunk.usage.prompt_tokens_details.cached_tokens
        assert cached == whole.usage.prompt_tokens - 1
        return whole.choices[0].message.content, "".join(parts)

    with ThreadPoolExecutor(THREADS) as pool:
        answers = list(pool.map(ask, range(THREADS)))
    assert all(whole == streamed for whole, streamed in answers)
    assert len({whole for whole, _ in answers}) == THREADS, "each prompt has an answer of its own"
    assert answers == [ask(n) for n in range(THREADS)]


def test_responses_and_messages_say_what_a_chat_says(served: Appliance, client: openai.OpenAI) -> None:
    """One conversation is one prompt, whatever API it comes by: the second to ask finds what the first computed."""
    said: list[Any] = [{"role": "user", "content": text(prompt(80, 200))}]
    chat = client.chat.completions.create(model="tiny", messages=said, temperature=0, max_tokens=COMPLETION_TOKENS)
    expected, usage = chat.choices[0].message.content, chat.usage
    assert usage is not None
    options: dict[str, Any] = {"model": "tiny", "input": said, "temperature": 0, "max_output_tokens": COMPLETION_TOKENS}
    response = client.responses.create(**options)
    *_, last = client.responses.create(**options, stream=True)
    for answer in (response, last.response):
        assert answer.output_text == expected
        assert answer.usage is not None
        assert answer.usage.input_tokens == usage.prompt_tokens
        assert answer.usage.input_tokens_details.cached_tokens == usage.prompt_tokens - 1
        assert answer.status == ("incomplete" if chat.choices[0].finish_reason == "length" else "completed")
    with anthropic.Anthropic(base_url=served.base_url, api_key=client.api_key, max_retries=0) as other:
        message = other.messages.create(
            model="tiny", messages=said, max_tokens=COMPLETION_TOKENS, extra_body={"temperature": 0}
        )
    assert [block.text for block in message.content if block.type == "text"] == [expected]
    assert (message.usage.cache_read_input_tokens, message.usage.input_tokens) == (usage.prompt_tokens - 1, 1)


def test_several_choices_and_log_probabilities(client: openai.OpenAI, alone: list[str]) -> None:
    answer = client.completions.create(
        model="tiny", prompt=PROMPTS[:2], n=2, temperature=0, max_tokens=COMPLETION_TOKENS, logprobs=2
    )
    assert [choice.text for choice in answer.choices] == [alone[0], alone[0], alone[1], alone[1]]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or ()) == alone[0]
    assert all(
        max(top.values()) == chosen for top, chosen in zip(logprobs.top_logprobs, logprobs.token_logprobs, strict=True)
    ), "greedy"


def test_the_model_is_called_as_its_file(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError, match="tiny"):
        client.completions.create(model="large", prompt="x")


# --- forms of answers, tools, embeddings: the tiny model says noise, so a grammar makes it say something ---------------


class Size(Enum):
    SMALL = "small"
    LARGE = "large"


class Order(BaseModel):
    dish: Literal["soup", "bread"]
    size: Size
    extras: list[Literal["salt", "oil"]] = Field(max_length=2)
    note: str | None = Field(max_length=4)


CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"], "additionalProperties": False}  # fmt: skip
WEATHER: Any = {"type": "function", "function": {"name": "get_weather", "description": "Of a city", "parameters": CITY}}
ASK: Any = [{"role": "user", "content": "Is it warm in Rome?"}]
ONE_CALL: dict[str, Any] = {"model": "tiny", "tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 200}  # fmt: skip


def test_an_answer_is_parsed_into_the_model_that_was_asked_for(client: openai.OpenAI) -> None:
    seen = set()
    for seed in range(3):
        answer = client.chat.completions.parse(
            model="tiny", messages=ASK, response_format=Order, max_tokens=400, seed=seed, temperature=1.5
        )
        assert isinstance(answer.choices[0].message.parsed, Order)
        assert answer.choices[0].finish_reason == "stop"
        seen.add(answer.choices[0].message.content)
    assert len(seen) > 1


def test_a_parsed_answer_streams(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="tiny", messages=ASK, response_format=Order, max_tokens=400, seed=1
    ) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Order)


@pytest.mark.parametrize("form", [{"grammar": 'root ::= "yes" | "no"'}, {"guided_choice": ["yes", "no"]}])
def test_a_text_completion_keeps_to_a_grammar(client: openai.OpenAI, form: dict[str, Any]) -> None:
    answers = [
        client.completions.create(model="tiny", prompt="?", seed=seed, temperature=2, extra_body=form).choices[0].text
        for seed in range(6)
    ]
    assert set(answers) <= {"yes", "no"}


def test_a_tool_is_called_and_its_result_goes_back(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(messages=ASK, **ONE_CALL)
    assert first.choices[0].finish_reason == "tool_calls"
    (call,) = first.choices[0].message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "warm"}
    turn: Any = first.choices[0].message.model_dump(exclude_none=True)
    second = client.chat.completions.create(
        model="tiny", messages=[*ASK, turn, result], tools=[WEATHER], max_tokens=20, temperature=0
    )
    assert second.choices[0].message.content
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert (second.usage.prompt_tokens_details.cached_tokens or 0) >= (
        first.usage.prompt_tokens if first.usage else 0
    ) - 1


def test_a_call_streams_name_first(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=ASK, seed=5, **ONE_CALL)
    deltas, reasons = [], []
    for chunk in client.chat.completions.create(messages=ASK, seed=5, stream=True, **ONE_CALL):
        deltas += chunk.choices[0].delta.tool_calls or []
        reasons.append(chunk.choices[0].finish_reason)
    first, *rest = deltas
    assert first.id
    assert first.function
    assert first.function.name == "get_weather"
    assert all(delta.function and delta.function.name is None for delta in rest)
    (call,) = whole.choices[0].message.tool_calls or ()
    assert call.type == "function"
    assert "".join(delta.function.arguments or "" for delta in rest if delta.function) == call.function.arguments
    assert reasons[-1] == "tool_calls"


def test_embeddings_are_unit_vectors_and_alike_for_like_texts(client: openai.OpenAI) -> None:
    texts = ["soup with salt", "soup with oil", "soup with salt", text(prompt(3, 900))]
    answer = client.embeddings.create(model="tiny", input=texts)
    vectors = [np.array(each.embedding) for each in answer.data]
    assert all(abs(np.linalg.norm(vector) - 1) < 1e-5 for vector in vectors)
    assert np.allclose(vectors[0], vectors[2], atol=1e-6)
    assert not np.allclose(vectors[0], vectors[3], atol=1e-3)
    assert answer.usage.prompt_tokens == sum(map(len, texts))
    as_floats = client.embeddings.create(model="tiny", input=texts[0], encoding_format="float")
    assert np.allclose(as_floats.data[0].embedding, vectors[0], atol=1e-6)


def test_embeddings_do_not_change_what_streams_beside_them(client: openai.OpenAI, alone: list[str]) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        embedded = [pool.submit(client.embeddings.create, model="tiny", input=PROMPTS[n]) for n in range(4)]
        answers = [pool.submit(complete, client, PROMPTS[n], "2" * 32) for n in range(4)]
        assert [answer.result() for answer in answers] == alone[:4]
        assert all(len(each.result().data) == 1 for each in embedded)
