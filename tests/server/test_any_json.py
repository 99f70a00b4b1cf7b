"""Whatever JSON comes in, the answer is 200 or a 4xx in the shape of its API: never a 5xx."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.api.anthropic import MessagesRequest
from appliance.api.openai import ChatRequest, CompletionRequest, EmbeddingRequest
from appliance.api.responses import ResponsesRequest
from appliance.server.app import public_app
from tests.support.fake_runtime import FakeRuntime, service

NUMBERS = st.integers() | st.floats() | st.sampled_from([-1, 0, 1, 2**31, 2**63, 10**40])
LEAVES = st.none() | st.booleans() | NUMBERS | st.text(max_size=8) | st.sampled_from(["\ud800", "user", "text", "none"])
ANY = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
)
BLOCKS = st.lists(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "tool_use", "tool_result", "thinking", "image"])},
        optional={
            "text": ANY,
            "id": ANY,
            "name": ANY,
            "input": ANY,
            "tool_use_id": ANY,
            "content": ANY,
            "cache_control": ANY,
        },
    ),
    max_size=3,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", "tool", "x"]), "content": ANY | BLOCKS},
        optional={"tool_calls": ANY, "tool_call_id": ANY},
    ),
    max_size=3,
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.dictionaries(
        st.sampled_from(
            ["type", "properties", "required", "items", "prefixItems", "anyOf", "oneOf", "allOf", "enum", "const", "$ref", "$defs",
             "additionalProperties", "minItems", "maxItems", "minLength", "maxLength", "format", "pattern"]
        ),
        inner | st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.sampled_from(["object", "array", "string", "#", "#/$defs/a", "date"]),
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip
TOOLS = st.lists(
    st.fixed_dictionaries(
        {"type": st.just("function"), "function": st.fixed_dictionaries({"name": st.sampled_from(["f", "g", "<"]), "parameters": SCHEMAS})}
    ),
    max_size=3,
)  # fmt: skip
FORM = st.fixed_dictionaries(
    {"type": st.just("json_schema"), "json_schema": st.fixed_dictionaries({"schema": SCHEMAS, "strict": st.booleans()})}
)
VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9},
    "/v1/responses": {"input": "hi"},
    "/v1/embeddings": {"input": "hi"},
}
FIELDS = {
    "/v1/chat/completions": sorted(ChatRequest.model_fields),
    "/v1/completions": sorted(CompletionRequest.model_fields),
    "/v1/messages": sorted(MessagesRequest.model_fields),
    "/v1/responses": sorted(ResponsesRequest.model_fields),
    "/v1/embeddings": sorted(EmbeddingRequest.model_fields),
}


@st.composite
def bodies(draw: st.DrawFn, path: str) -> dict[str, Any]:
    changed = draw(st.dictionaries(st.sampled_from(FIELDS[path]), ANY, max_size=3))
    if "messages" in changed:
        changed["messages"] = draw(MESSAGES | ANY)
    shaped = {
        "tools": TOOLS,
        "response_format": FORM,
        "json_schema": SCHEMAS,
        "tool_choice": st.sampled_from(["required", "auto"]),
    }
    if path != "/v1/embeddings":
        changed |= draw(st.fixed_dictionaries({}, optional=shaped))
    return {**VALID[path], **changed}


@pytest.mark.parametrize("path", sorted(FIELDS))
@settings(max_examples=150, deadline=None)
@given(data=st.data())
async def test_never_a_server_error(path: str, data: st.DataObject) -> None:
    body = json.dumps(data.draw(bodies(path)))
    transport = httpx.ASGITransport(public_app(service(FakeRuntime())))
    headers = {"authorization": "Bearer key-of-alice"}
    async with httpx.AsyncClient(transport=transport, base_url="http://a", headers=headers) as client:
        response = await client.post(path, content=body)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        keys = {"message", "type"} if path == "/v1/messages" else {"message", "type", "param", "code"}
        assert set(response.json()["error"]) == keys
