"""The unmodified `openai` client against a real web server on loopback, streaming and not, from eight threads."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.support.fake_runtime import COMPLETION, MODEL, FakeRuntime
from tests.support.listening import listening

THREADS = 8


@pytest.fixture(scope="module")
def base_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with listening(tmp_path_factory.mktemp("home") / "kvctl.sock", FakeRuntime()) as url:
        yield url


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key="key-of-alice", max_retries=0) as client:
        yield client


def whole(client: openai.OpenAI, seed: int) -> str:
    answer = client.chat.completions.create(
        model=MODEL.id, messages=[{"role": "user", "content": f"hi {seed}"}], seed=seed
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens is not None
    return answer.choices[0].message.content or ""


def streamed(client: openai.OpenAI, seed: int) -> str:
    stream = client.chat.completions.create(
        model=MODEL.id,
        messages=[{"role": "user", "content": f"hi {seed}"}],
        seed=seed,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts, usage = [], None
    for chunk in stream:
        usage = chunk.usage
        texts += [choice.delta.content or "" for choice in chunk.choices]
    assert usage is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    return "".join(texts)


def test_eight_threads_streaming_and_not(client: openai.OpenAI) -> None:
    def ask(seed: int) -> tuple[str, str]:
        return whole(client, seed), streamed(client, seed)

    with ThreadPoolExecutor(THREADS) as pool:
        for seed, answers in enumerate(pool.map(ask, range(1000, 1000 + 3 * THREADS)), 1000):
            assert answers == (f"{COMPLETION} {seed}",) * 2


def test_text_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL.id, prompt=[[5, 6], [7]], n=2, logprobs=1, max_tokens=4)
    assert [choice.text for choice in answer.choices] == [COMPLETION[:4]] * 4
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == list(COMPLETION[:4])
    chunks = client.completions.create(model=MODEL.id, prompt="hi", stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == COMPLETION


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL.id, messages=[{"role": "user", "content": "hi"}], logprobs=True, top_logprobs=1
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == COMPLETION
    assert logprobs.content[0].top_logprobs[0].token == COMPLETION[0]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL.id]
    assert client.models.retrieve(MODEL.id).created == MODEL.created


def test_errors_are_the_clients_own(client: openai.OpenAI, base_url: str) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "hi"}])
    assert missing.value.code == "model_not_found"
    assert missing.value.request_id
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL.id, messages=[])
    assert bad.value.param == "messages"
    with (
        openai.OpenAI(base_url=base_url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()
