"""The history of requests as the admin API tells it.

Threading: event loop only.
"""

from __future__ import annotations

from dataclasses import asdict

from appliance.api.control import Accuracy, Estimates, RequestList, RequestRecord, RequestWay
from appliance.errors import RequestError
from appliance.history import KEPT, History, Record

LAST = 20
"""Requests shown when no id is given."""


def requests(history: History, call_id: str | None) -> RequestList:
    """The last ones, or those of one API call. RequestError for one that is not known (any more)."""
    records = history.last(LAST) if call_id is None else history.of_call(call_id)
    if call_id is not None and not records:
        raise RequestError(f"this id is not among the last {KEPT:,} requests that ended", status=404)
    return RequestList(requests=[_record(record) for record in records])


def estimates(history: History) -> Estimates:
    service, first_token = (Accuracy(**asdict(each)) for each in (history.service, history.first_token))
    return Estimates(service=service, first_token=first_token)


def accuracy_counters(history: History) -> dict[str, float]:
    """For /metrics, without the kvctl_ prefix."""
    kinds = {"service": history.service, "first_token": history.first_token}
    return {
        f'estimate_{name}_total{{of="{kind}"}}': float(getattr(accuracy, attribute))
        for name, attribute in (
            ("requests", "requests"),
            ("close", "close"),
            ("error_seconds", "error_s"),
            ("actual_seconds", "actual_s"),
        )
        for kind, accuracy in kinds.items()
    }


def _record(record: Record) -> RequestRecord:
    finished = record.finished
    decision, timings = finished.decision, finished.timings
    sources = ("hbm", "dram", "nvme", "remote", "computed")
    return RequestRecord(
        request=record.request_id,
        tenant=record.tenant,
        ended_s=record.ended_s,
        finish_reason=finished.reason.value,
        prompt_tokens=record.prompt_tokens,
        completion_tokens=finished.completion_tokens,
        tokens={name: getattr(finished.sources, name) for name in sources},
        loaded_bytes=finished.loaded_bytes,
        decision=decision.reason,
        alternatives={
            reason: RequestWay(
                load_to_tokens=way.load_to,
                compute_first_tokens=way.front_to,
                load_s=way.load_s,
                compute_s=way.compute_s,
                service_s=way.service_s,
                total_s=way.total_s,
            )
            for reason, way in decision.alternatives.items()
        },
        recompute_s=decision.recompute.total_s,
        queue_s=timings.queue_ms / 1e3,
        staged_ahead_s=timings.staged_ahead_ms / 1e3,
        load_s=timings.load_ms / 1e3,
        compute_s=timings.compute_ms / 1e3,
        service_s=timings.service_ms / 1e3,
        prompt_s=timings.prompt_ms / 1e3,
        ttft_s=timings.ttft_ms / 1e3,
        generate_s=timings.predicted_ms / 1e3,
        paused_s=timings.paused_ms / 1e3,
    )
