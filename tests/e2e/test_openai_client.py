"""The unmodified `openai` client, from eight threads at once: every answer is the one a single caller gets."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

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
