"""The exposition parses, names start with kvctl_, labels are bounded, and the numbers are those of the requests."""

from __future__ import annotations

import httpx
import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from appliance.errors import EngineDied, Overloaded
from tests.support.fake_runtime import FakeRuntime

PROMPT = {"prompt": [5] * 100}


async def families(client: httpx.AsyncClient) -> dict[str, Metric]:
    response = await client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {family.name: family for family in text_string_to_metric_families(response.text)}


def value(family: Metric, **labels: str) -> float:
    (sample,) = (s for s in family.samples if s.labels == labels and s.name.removesuffix("_total") == family.name)
    return sample.value


async def test_all_names_start_with_kvctl(client: httpx.AsyncClient) -> None:
    await client.post("/v1/completions", json=PROMPT)
    found = await families(client)
    assert all(name.startswith("kvctl_") for name in found)
    assert {
        "kvctl_requests", "kvctl_http_responses", "kvctl_ttft_seconds", "kvctl_tpot_seconds", "kvctl_tier_bytes", "kvctl_tier_capacity_bytes", "kvctl_running_requests",
    } <= set(found)  # fmt: skip


async def test_requests_are_counted(client: httpx.AsyncClient) -> None:
    await client.post("/v1/completions", json=PROMPT)
    await client.post("/v1/completions", json={**PROMPT, "max_tokens": 2})
    found = await families(client)
    assert value(found["kvctl_requests"], outcome="stop") == 1
    assert value(found["kvctl_requests"], outcome="length") == 1
    (count,) = (s.value for s in found["kvctl_ttft_seconds"].samples if s.name == "kvctl_ttft_seconds_count")
    assert count == 2


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(Overloaded("full", retry_after_s=1), "overloaded"), (EngineDied("gone"), "engine_error"), (KeyError(), "error")],
)
async def test_failures_are_counted_once(
    client: httpx.AsyncClient, runtime: FakeRuntime, error: Exception, outcome: str
) -> None:
    runtime.error = error
    await client.post("/v1/completions", json=PROMPT)
    found = await families(client)
    assert [(s.labels, s.value) for s in found["kvctl_requests"].samples if s.name.endswith("_total")] == [
        ({"outcome": outcome}, 1.0)
    ]
    statuses = {s.labels["status"] for s in found["kvctl_http_responses"].samples if s.name.endswith("_total")}
    assert len(statuses) == 1


async def test_the_snapshot_of_the_appliance_is_in_it(client: httpx.AsyncClient) -> None:
    found = await families(client)
    assert value(found["kvctl_tier_bytes"], tier="dram") == 2**20
    assert value(found["kvctl_tier_capacity_bytes"], tier="nvme") == 2**34
    assert value(found["kvctl_tier_healthy"], tier="nvme") == 0
    assert value(found["kvctl_tier_pending_blocks"], tier="dram") == 2
    assert value(found["kvctl_tier_read_bytes"], tier="nvme") == 4096
    assert value(found["kvctl_tier_read_bytes"], tier="dram") == 512
    assert value(found["kvctl_integrity_failures"], reason="tag") == 1
    assert value(found["kvctl_evicted_blocks"]) == 3
    assert value(found["kvctl_running_requests"]) == 2


async def test_no_tenant_or_model_in_labels(client: httpx.AsyncClient) -> None:
    await client.post("/v1/completions", json=PROMPT)
    labels = {name for family in (await families(client)).values() for s in family.samples for name in s.labels}
    assert labels <= {"outcome", "status", "tier", "reason", "le"}


async def test_only_the_operator_sees_numbers_of_all_tenants(client: httpx.AsyncClient) -> None:
    refused = await client.get("/metrics", headers={"authorization": "Bearer key-of-bob"})
    assert refused.status_code == 403
    assert '"alice"' in refused.json()["error"]["message"]
