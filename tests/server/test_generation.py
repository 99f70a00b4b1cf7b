"""Answers of both endpoints, whole: shapes, sampling parameters, choices, log-probabilities, counts."""

from __future__ import annotations

import math
from typing import Any

import httpx
import pytest

from appliance.types import FinishReason, Namespace, SamplingParams, Tokens
from tests.support.fake_runtime import COMPLETION, HALF_A_CHARACTER, MODEL, FakeRuntime

HELLO = [{"role": "user", "content": "hi"}]


async def ask(client: httpx.AsyncClient, headers: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
    path = "/v1/completions" if "prompt" in fields else "/v1/chat/completions"
    response = await client.post(path, json={"messages": HELLO, **fields}, headers=headers)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def test_an_assistant_that_said_nothing_is_part_of_a_conversation(
    client: httpx.AsyncClient, runtime: FakeRuntime
) -> None:
    await ask(client, messages=[*HELLO, {"role": "assistant", "content": None}, *HELLO], tool_choice="auto")
    assert [message["content"] for message in runtime.messages[-1]] == ["hi", "", "hi"]


async def test_chat_answer_has_the_openai_shape(client: httpx.AsyncClient) -> None:
    answer = await ask(client)
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["model"], answer["system_fingerprint"]) == (MODEL.id, MODEL.system_fingerprint)
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": COMPLETION},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert "kvctl" not in answer


async def test_text_answer_has_the_openai_shape(client: httpx.AsyncClient) -> None:
    answer = await ask(client, prompt="hi", max_tokens=5)
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "text": COMPLETION[:5], "logprobs": None, "finish_reason": "length"}]


async def test_usage_and_timings_add_up(client: httpx.AsyncClient) -> None:
    answer = await ask(client, prompt=[5] * 100)
    usage, timings = answer["usage"], answer["timings"]
    assert usage["prompt_tokens"] == 100
    assert usage["prompt_tokens_details"] == {"cached_tokens": 50}
    assert usage["completion_tokens"] == len(COMPLETION)
    assert usage["total_tokens"] == 100 + len(COMPLETION)
    assert timings["cache_n"] + timings["prompt_n"] == 100
    assert timings["prompt_per_token_ms"] == pytest.approx(10.0 / 50)
    assert timings["prompt_per_second"] == pytest.approx(50 / 0.010)
    assert timings["predicted_n"] == len(COMPLETION)
    assert timings["predicted_per_second"] == pytest.approx(len(COMPLETION) / 0.020)


async def test_explanation_is_opt_in(client: httpx.AsyncClient) -> None:
    answer = await ask(client, {"x-kvctl-explain": "1"}, prompt=[5] * 100)
    assert answer["kvctl"]["tokens"] == {"hbm": 0, "dram": 0, "nvme": 50, "remote": 0, "computed": 50}
    measured = {"queue": 1.0, "load": 2.0, "prompt": 10.0, "predicted": 20.0, "ttft": 11.0}
    times = {**measured, "staged_ahead": 0.0, "paused": 0.0, "compute": 0.0, "service": 0.0}
    assert answer["kvctl"]["timings_ms"] == times
    (decision,) = answer["kvctl"]["decisions"]
    way = {"load_to_tokens": 8, "compute_first_tokens": 0, "load_ms": 2.0, "compute_ms": 8.0, "total_ms": 10.0}
    assert decision.pop("request").rpartition("-")[0] == answer["id"]
    assert decision == {
        "reason": "load", "load_to_tokens": 8, "estimated_ms": 10.0, "actual_ms": 10.0, "recompute_ms": 500.0,
        "alternatives": {"load": way},
    }  # fmt: skip


async def test_sampling_parameters_reach_the_runtime(client: httpx.AsyncClient, runtime: FakeRuntime) -> None:
    asked = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repeat_penalty": 1.1, "frequency_penalty": 0.2,
        "presence_penalty": -0.3, "seed": 7, "stop": ["a", "b"], "logit_bias": {"5": -100, "6": 1.5}, "ignore_eos": True,
        "max_completion_tokens": 9, "max_tokens": 3,
    }  # fmt: skip
    await ask(client, **asked)
    assert runtime.requests[0].sampling == SamplingParams(
        max_tokens=9, temperature=0.5, top_p=0.9, top_k=40, min_p=0.05, repeat_penalty=1.1, frequency_penalty=0.2,
        presence_penalty=-0.3, seed=7, stop=("a", "b"), logit_bias=((5, -100.0), (6, 1.5)), logprobs=None, ignore_eos=True,
    )  # fmt: skip


@pytest.mark.parametrize("top_k", [-1, 0])
async def test_top_k_off(client: httpx.AsyncClient, runtime: FakeRuntime, top_k: int) -> None:
    await ask(client, top_k=top_k, stop="x", seed=-1)
    sampling = runtime.requests[0].sampling
    assert (sampling.top_k, sampling.stop, sampling.seed) == (0, ("x",), None)


async def test_default_max_tokens_is_capped_to_what_fits(client: httpx.AsyncClient, runtime: FakeRuntime) -> None:
    await ask(client, prompt=[5] * 4090)
    assert runtime.requests[0].sampling.max_tokens == 6


async def test_tenant_and_salt_make_the_namespace(client: httpx.AsyncClient, runtime: FakeRuntime) -> None:
    salt = "é" * 32
    await ask(client)
    await ask(client, cache_salt=salt)
    await ask(client, {"authorization": "bearer key-of-bob"})
    assert [request.ns for request in runtime.requests] == [
        Namespace("alice"), Namespace("alice", salt=salt.encode()), Namespace("bob"),
    ]  # fmt: skip


async def test_content_parts_are_joined_and_roles_mapped(client: httpx.AsyncClient, runtime: FakeRuntime) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    await ask(
        client, messages=[{"role": "developer", "content": "be"}, {"role": "user", "content": parts, "name": "n"}]
    )
    assert runtime.messages == [[{"role": "system", "content": "be"}, {"role": "user", "content": "ab"}]]


async def test_token_prompts_pass_unchanged(client: httpx.AsyncClient, runtime: FakeRuntime) -> None:
    await ask(client, prompt=[5, 6, 999])
    assert runtime.requests[0].prompt == Tokens.of([5, 6, 999])


async def test_several_prompts_and_choices(client: httpx.AsyncClient, runtime: FakeRuntime) -> None:
    answer = await ask(client, prompt=[[5, 6, 7, 8], [5, 6]], n=2, seed=40, max_tokens=100)
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    assert [c["text"] for c in answer["choices"]] == [f"{COMPLETION} {seed}" for seed in (40, 41, 40, 41)]
    assert answer["usage"]["prompt_tokens"] == 4 + 2, "a prompt counts once"
    assert answer["usage"]["completion_tokens"] == 4 * (len(COMPLETION) + 3)
    assert len({request.request_id for request in runtime.requests}) == 4


async def test_the_first_choice_reads_the_prompt_for_all(client: httpx.AsyncClient, runtime: FakeRuntime) -> None:
    answer = await ask(client, n=8, prompt=[5] * 100)
    assert len(answer["choices"]) == 8
    assert answer["timings"]["prompt_n"] == 50
    leader, *followers = runtime.requests
    assert leader.request_id.endswith("-0")
    assert len(followers) == 7


async def test_unseeded_choices_stay_unseeded(client: httpx.AsyncClient, runtime: FakeRuntime) -> None:
    await ask(client, n=3)
    assert [request.sampling.seed for request in runtime.requests] == [None] * 3


async def test_one_failing_choice_fails_the_call_and_ends_the_others(
    client: httpx.AsyncClient, runtime: FakeRuntime
) -> None:
    runtime.error, runtime.error_after = RuntimeError("canary"), 3
    response = await client.post("/v1/chat/completions", json={"messages": HELLO, "n": 4})
    assert response.status_code == 500
    assert sorted(runtime.closed) == sorted(request.request_id for request in runtime.requests)


async def test_chat_logprobs(client: httpx.AsyncClient, runtime: FakeRuntime) -> None:
    runtime.completion = "Aö" + chr(HALF_A_CHARACTER)
    answer = await ask(client, logprobs=True, top_logprobs=2)
    content = answer["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["A", "ö", "\ufffd"]
    assert [entry["bytes"] for entry in content] == [[65], list("ö".encode()), None]
    assert content[0]["top_logprobs"] == [
        {"token": "A", "logprob": -0.5, "bytes": [65]},
        {"token": "\ufffd", "logprob": -9999.0, "bytes": None},
    ]


async def test_chat_logprobs_without_alternatives(client: httpx.AsyncClient, runtime: FakeRuntime) -> None:
    answer = await ask(client, logprobs=True)
    assert runtime.requests[0].sampling.logprobs == 0
    assert all(entry["top_logprobs"] == [] for entry in answer["choices"][0]["logprobs"]["content"])


async def test_text_logprobs(client: httpx.AsyncClient) -> None:
    logprobs = (await ask(client, prompt="hi", logprobs=1))["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == COMPLETION
    assert logprobs["text_offset"] == list(range(len(COMPLETION)))
    assert all(math.isclose(value, -0.5) for value in logprobs["token_logprobs"])
    assert logprobs["top_logprobs"][0] == {"H": -0.5}


async def test_an_answer_cut_short_by_a_stop_is_an_error(client: httpx.AsyncClient, runtime: FakeRuntime) -> None:
    runtime.reason = FinishReason.CANCELLED
    response = await client.post("/v1/chat/completions", json={"messages": HELLO})
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) > 0


async def test_models(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [m["id"] for m in listed["data"]] == [MODEL.id]
    assert (await client.get(f"/v1/models/{MODEL.id}")).json() == listed["data"][0]
    missing = await client.get("/v1/models/some/other")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


async def test_llama_server_paths(client: httpx.AsyncClient) -> None:
    assert (await client.get("/props")).json()["default_generation_settings"]["n_ctx"] == MODEL.context_tokens
    assert (await client.post("/tokenize", json={"content": "ab"})).json() == {"tokens": [97, 98]}
    assert (await client.post("/tokenize", json={"content": "ab", "add_special": True})).json() == {
        "tokens": [1, 97, 98]
    }
    assert (await client.post("/detokenize", json={"tokens": [97, 98]})).json() == {"content": "ab"}
    assert (await client.post("/detokenize", json={"tokens": []})).json() == {"content": ""}
