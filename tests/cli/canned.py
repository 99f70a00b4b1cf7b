"""Answers of an appliance, as the models of appliance/api/control.py."""

from __future__ import annotations

from typing import Any

from appliance.api import control

TIERS: list[dict[str, Any]] = [
    {"tier": "hbm", "state": "ok", "capacity_bytes": 201326592, "used_bytes": 100663296, "blocks": 32, "tokens": 8192},
    {
        "tier": "dram",
        "state": "ok",
        "capacity_bytes": 2**30,
        "used_bytes": 2**29,
        "blocks": 160,
        "tokens": 40960,
        "pending_blocks": 0,
    },
    {
        "tier": "nvme",
        "state": "degraded",
        "capacity_bytes": 2**34,
        "used_bytes": 2**30,
        "blocks": 310,
        "tokens": 79360,
        "pending_blocks": 3,
        "pending_bytes": 3 * 256 * 12288,
        "notes": ["EIO"],
    },
]

STATUS = control.Status(
    state="ready",
    version="0.1.0",
    pid=4242,
    uptime_s=192.4,
    home="/var/lib/kvctl",
    base_url="http://127.0.0.1:8080/v1",
    running=1,
    waiting=0,
    rss_bytes=230 * 2**20,
    engine=control.EngineStatus(
        engine="llama.cpp 0.3.36",
        pid=4243,
        restarts=1,
        model="qwen2.5-0.5b-q8_0",
        description="qwen2 0.5B Q8_0 [/x]",
        kv_mode="rows",
        context_tokens=16384,
        threads=1,
        quiet_threads=2,
        batch_threads=2,
        decode_step_ms=21.4,
        prefill_tokens_per_s=412.0,
        kv_bytes_per_token=12288,
        weight_bytes=530 * 2**20,
        cell_bytes=192 * 2**20,
        sequences_resident=3,
        notes=["the pool could not be locked in memory: ulimit -l is too small"],
    ),
    tiers=[control.TierStatus(**tier) for tier in TIERS],
    totals=control.Totals(
        requests=12,
        prompt_tokens=12345,
        cached_tokens={"hbm": 8000, "dram": 2000, "nvme": 0},
        computed_tokens=2345,
        completion_tokens=960,
        loaded_bytes={"dram": 2**20, "nvme": 2**26},
        load_bytes_per_s={"dram": 0.0, "nvme": 2**29},
        stored_bytes={"nvme": 2**30},
        evicted_blocks={"dram": 70, "nvme": 0},
        quarantined_blocks=1,
        integrity_failures=2,
        tier_failures=0,
    ),
)

LOADING = control.Loading(
    version="0.1.0",
    pid=4242,
    uptime_s=1.5,
    home="/var/lib/kvctl",
    base_url="http://127.0.0.1:8080/v1",
    doing="loading x",
    fraction=0.43,
)

STORE = control.StoreOverview(
    model="qwen2.5-0.5b-q8_0",
    kv_mode="rows",
    block_tokens=256,
    kv_bytes_per_token=12288,
    tiers=[
        control.TierStore(tier="hbm", state="ok", blocks=32, tokens=8192, used_bytes=2**26, capacity_bytes=2**27),
        control.TierStore(
            tier="nvme",
            state="ok",
            blocks=310,
            tokens=79360,
            used_bytes=2**30,
            capacity_bytes=2**34,
            oldest_s=90000,
            newest_s=2.5,
        ),
    ],
    notes=[],
)

EXPLAINED = control.RequestList(
    requests=[
        control.RequestRecord(
            request="chatcmpl-6f-0",
            tenant="default",
            ended_s=1.8e9,
            finish_reason="stop",
            prompt_tokens=8410,
            completion_tokens=20,
            tokens={"hbm": 0, "dram": 0, "nvme": 8192, "remote": 0, "computed": 218},
            loaded_bytes=8192 * 12288,
            decision="load",
            alternatives={
                "load": control.RequestWay(
                    load_to_tokens=8192,
                    compute_first_tokens=0,
                    load_s=0.1,
                    compute_s=1.0,
                    service_s=1.1,
                    total_s=1.5,
                ),
                "recompute-is-faster": control.RequestWay(
                    load_to_tokens=0, compute_first_tokens=0, load_s=0, compute_s=44, service_s=44, total_s=44
                ),
            },
            recompute_s=44,
            queue_s=0.2,
            staged_ahead_s=0,
            load_s=0.11,
            compute_s=0.9,
            service_s=1.01,
            prompt_s=1.3,
            ttft_s=1.5,
            generate_s=0.4,
            paused_s=0,
        )
    ]
)

INSPECTION = control.PromptInspection(
    prompt_tokens=1000,
    cached_tokens=900,
    spans=[
        control.Span(start=0, stop=512, tier="hbm"),
        control.Span(start=512, stop=900, tier="nvme"),
        control.Span(start=900, stop=1000, tier="none"),
    ],
    estimated_ttft_warm_s=0.25,
    estimated_ttft_cold_s=2.5,
)


def prefetched(**changed: Any) -> dict[str, Any]:
    step = control.PrefetchProgress(
        prompt_tokens=1000,
        found={"dram": 200, "nvme": 700, "none": 100},
        moved_tokens=700,
        computed_tokens=0,
        moved_bytes=700 * 12288,
        seconds=0.05,
        done=True,
    )
    return step.model_copy(update=changed).model_dump()


def report(**changed: Any) -> control.VerifyReport:
    clean = control.VerifyReport(
        segments=2,
        records=10,
        bytes_read=2**25,
        ok=10,
        bad={},
        index_missing=0,
        index_dangling=0,
        repaired=0,
        seconds=0.5,
    )
    return clean.model_copy(update=changed)


def verified(found: control.VerifyReport) -> list[dict[str, Any]]:
    steps = [
        control.VerifyProgress(records_done=4, records_total=10),
        control.VerifyProgress(records_done=10, records_total=10, report=found),
    ]
    return [step.model_dump() for step in steps]


CHAT_CHUNKS: list[dict[str, Any]] = [
    {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
    {"choices": [{"index": 0, "delta": {"content": "Hel"}, "finish_reason": None}]},
    {"choices": [{"index": 0, "delta": {"content": "lo ö"}, "finish_reason": None}]},
    {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    {
        "choices": [],
        "usage": {
            "prompt_tokens": 1200,
            "completion_tokens": 2,
            "total_tokens": 1202,
            "prompt_tokens_details": {"cached_tokens": 1024},
        },
        "kvctl": {"tokens": {"nvme": 1024, "computed": 176}, "timings_ms": {"load": 12.5}},
    },
]
