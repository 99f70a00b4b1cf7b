"""/v1/embeddings: every form of input and output, and what is refused before anything is computed."""

from __future__ import annotations

import base64
import struct
from typing import Any

import httpx
import pytest

from appliance.types import Tokens
from tests.support.fake_runtime import MODEL, FakeRuntime

PATH = "/v1/embeddings"


async def test_the_answer_has_the_openai_shape(client: httpx.AsyncClient) -> None:
    response = await client.post(PATH, json={"model": MODEL.id, "input": ["abc", "de"], "user": "u"})
    assert response.status_code == 200
    assert response.json() == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [4.0, 0.5]},
            {"object": "embedding", "index": 1, "embedding": [3.0, 0.5]},
        ],
        "model": MODEL.id,
        "usage": {"prompt_tokens": 7, "total_tokens": 7},
    }


@pytest.mark.parametrize(
    ("given", "tokens"),
    [("ab", [[1, 97, 98]]), (["a", "b"], [[1, 97], [1, 98]]), ([5, 6], [[5, 6]]), ([[5], [6, 7]], [[5], [6, 7]])],
)
async def test_text_and_tokens(
    client: httpx.AsyncClient, runtime: FakeRuntime, given: Any, tokens: list[list[int]]
) -> None:
    assert (await client.post(PATH, json={"input": given})).status_code == 200
    assert runtime.embedded == [Tokens.of(ids) for ids in tokens]


async def test_base64_is_the_same_numbers(client: httpx.AsyncClient) -> None:
    answer = (await client.post(PATH, json={"input": "abc", "encoding_format": "base64"})).json()
    assert struct.unpack("<2f", base64.b64decode(answer["data"][0]["embedding"])) == (4.0, 0.5)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": [1000]}, "input"),
        ({"input": [5] * 4097}, "input"),
        ({"input": ["a", "b" * 5000]}, "input"),
        ({"input": "a", "dimensions": 1}, "dimensions"),
        ({"input": "a", "dimensions": "2"}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
    ],
)
async def test_what_cannot_be_embedded_is_refused(
    client: httpx.AsyncClient, runtime: FakeRuntime, fields: dict[str, Any], param: str
) -> None:
    response = await client.post(PATH, json=fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert not runtime.embedded


async def test_the_models_own_width_may_be_asked_for(client: httpx.AsyncClient) -> None:
    assert (await client.post(PATH, json={"input": "a", "dimensions": 2})).status_code == 200


async def test_embeddings_need_a_key_and_the_served_model(client: httpx.AsyncClient) -> None:
    assert (await client.post(PATH, json={"input": "a"}, headers={"authorization": ""})).status_code == 401
    assert (await client.post(PATH, json={"input": "a", "model": "other"})).status_code == 404
