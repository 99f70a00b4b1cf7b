"""POST /v1/kv/prefetch: whose prompt it is, what it says, and that it ends with its client."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from appliance.errors import Overloaded
from appliance.prefetch import Prefetches
from appliance.server.base import Service
from appliance.types import Namespace, Tier, Tokens
from tests.server.test_disconnect import Connection
from tests.support.fake_runtime import FakePrefetches, FakeRuntime
from tests.support.kv import NS, prompt
from tests.support.stub_runtime import answer, engine_of, request, running, until

URL = "/v1/kv/prefetch"


def asked(served: Service) -> tuple[Namespace, Tokens, Tier, bool]:
    assert isinstance(served.prefetches, FakePrefetches)
    return served.prefetches.asked[-1]


async def test_a_prompt_is_brought_up_as_its_completion_will_ask(client: httpx.AsyncClient, served: Service) -> None:
    response = await client.post(URL, json={"prompt": "abc"})
    assert response.status_code == 200
    assert response.json() == {
        "prompt_tokens": 4, "found": {"nvme": 4}, "moved_tokens": 4, "computed_tokens": 0, "moved_bytes": 32,
        "seconds": 0.1, "done": True,
    }  # fmt: skip
    assert asked(served) == (Namespace("alice"), Tokens.of([1, 97, 98, 99]), Tier.DRAM, False)
    await client.post(URL, json={"prompt": [5, 6], "to": "hbm", "compute": True, "cache_salt": "s" * 32})
    assert asked(served) == (Namespace("alice", salt=b"s" * 32), Tokens.of([5, 6]), Tier.HBM, True)


async def test_messages_become_the_tokens_of_their_chat(
    client: httpx.AsyncClient, served: Service, runtime: FakeRuntime
) -> None:
    body = {
        "messages": [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "hi"}],
        "tools": [{"type": "function", "function": {"name": "look"}}],
        "max_tokens": 5,
    }
    assert (await client.post(URL, json=body)).status_code == 200
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    assert asked(served)[1] == runtime.requests[-1].prompt
    assert runtime.messages[0] == runtime.messages[1]


async def test_a_session_is_its_own_tenants(client: httpx.AsyncClient, served: Service) -> None:
    assert (await client.post(URL, json={"prompt_cache_key": "hers"})).status_code == 200
    assert asked(served)[1] == Tokens.of([1, 2, 3])
    unknown = await client.post(URL, json={"prompt_cache_key": "nobody's"})
    client.headers["authorization"] = "Bearer key-of-bob"
    foreign = await client.post(URL, json={"prompt_cache_key": "hers"})
    assert unknown.status_code == foreign.status_code == 404
    assert unknown.json() == foreign.json()
    assert foreign.json()["error"]["code"] == "session_not_found"


async def test_with_stream_it_is_lines_and_the_last_is_done(client: httpx.AsyncClient) -> None:
    response = await client.post(URL, json={"prompt": "abc", "stream": True})
    assert response.headers["content-type"] == "application/x-ndjson"
    assert [json.loads(line)["done"] for line in response.text.splitlines()] == [False, True]


@pytest.mark.parametrize("stream", [False, True])
async def test_too_many_at_once_is_429(client: httpx.AsyncClient, served: Service, stream: bool) -> None:
    assert isinstance(served.prefetches, FakePrefetches)
    served.prefetches.busy = True
    response = await client.post(URL, json={"prompt": "abc", "stream": stream})
    assert (response.status_code, response.headers["retry-after"]) == (429, "2")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_its_prefetch(served: Service, stream: bool) -> None:
    assert isinstance(served.prefetches, FakePrefetches)
    served.prefetches.hold = True
    connection = Connection(served, {"prompt": "abc", "stream": stream}, URL)
    await until(lambda: asked_once(served))
    await connection.leave()
    assert served.prefetches.closed == 1


def asked_once(served: Service) -> bool:
    assert isinstance(served.prefetches, FakePrefetches)
    return bool(served.prefetches.asked)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, None),
        ({"messages": []}, 400, None),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, 400, None),
        ({"prompt": ""}, 200, None),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": ["a", "b"]}, 400, "prompt"),
        ({"prompt": [1000]}, 400, "prompt"),
        ({"prompt": "a" * 4096}, 400, "prompt"),
        ({"prompt": "a", "to": "nvme"}, 400, "to"),
        ({"prompt": "a", "compute": "yes"}, 400, "compute"),
        ({"prompt": "a", "model": "other"}, 404, "model"),
        ({"prompt": "a", "cache_salt": "short"}, 400, "cache_salt"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]}, 400, "tools[0].function"),
    ],
)
async def test_what_cannot_be_done_is_refused(
    client: httpx.AsyncClient, body: dict[str, Any], status: int, param: str | None
) -> None:
    response = await client.post(URL, json=body)
    assert response.status_code == status, response.text
    if param:
        assert response.json()["error"]["param"] == param


async def test_of_one_tenant_half_as_many_run_as_of_all(tmp_path: Any) -> None:
    async with running(tmp_path, max_queue=16) as runtime:
        engine_of(runtime).decoding.shut()
        prefetches = Prefetches(runtime, at_once=4)
        others = Namespace("other")

        def start(ns: Namespace, seed: int) -> Any:
            return prefetches.run(ns, prompt(seed, 40), to=Tier.DRAM, compute=True)

        steps = [start(ns, n) for n, ns in enumerate((NS, NS, others, others))]
        for each in steps[:2]:
            await anext(each)
        with pytest.raises(Overloaded):
            await anext(start(NS, 8))
        for each in steps[2:]:
            await anext(each)
        with pytest.raises(Overloaded):
            await anext(start(Namespace("default", "third"), 9))
        for each in steps:
            await each.aclose()
        engine_of(runtime).decoding.open()
        assert [step async for step in start(NS, 8)][-1].computed_tokens == 40


async def test_a_prefetch_never_displaces_what_a_running_request_needs(tmp_path: Any) -> None:
    async with running(tmp_path, slots=8) as runtime:
        stored = prompt(1, 16 * 6)
        await answer(runtime, request("r", stored))
        await until(lambda: not engine_of(runtime).known)
        await runtime.store.flush(5)
        runtime.store.evict_dram()
        engine_of(runtime).decoding.shut()
        mine = prompt(2, 16 * 5)
        task = asyncio.ensure_future(answer(runtime, request("mine", mine)))
        await until(lambda: engine_of(runtime).decoding.waiting and runtime.store.lookup(NS, mine).tokens == len(mine))
        await runtime.store.flush(5)
        steps = Prefetches(runtime).run(NS, stored, to=Tier.DRAM, compute=False)
        last = [step async for step in steps][-1]
        assert (last.found, last.moved_tokens) == ({"nvme": 16 * 6}, 16 * 3)
        assert runtime.store.lookup(NS, mine).by_tier() == {Tier.DRAM: len(mine)}
        engine_of(runtime).decoding.open()
        await task


async def test_a_long_prompt_is_computed_piece_by_piece_and_given_up_in_between(tmp_path: Any) -> None:
    async with running(tmp_path, slots=64) as runtime:
        tokens = prompt(1, 16 * 30 + 3)
        seen: list[int] = []
        steps = Prefetches(runtime).run(NS, tokens, to=Tier.DRAM, compute=True)
        async for step in steps:
            seen.append(step.computed_tokens)
            if step.computed_tokens >= 256:
                break
        await steps.aclose()
        await until(lambda: not engine_of(runtime).known)
        assert seen == [0, 128, 256]
        assert runtime.store.lookup(NS, tokens).tokens == 256, "what was computed is kept"
        (*_, last) = [step async for step in Prefetches(runtime).run(NS, tokens, to=Tier.DRAM, compute=True)]
        assert (last.found, last.done) == ({"dram": 256, "none": len(tokens) - 256}, True)
        assert runtime.store.lookup(NS, tokens).tokens == len(tokens)
