"""What is remembered of requests, and how estimates are held against what happened."""

from __future__ import annotations

import pytest

from appliance.errors import RequestError
from appliance.explain import LAST, accuracy_counters, requests
from appliance.history import KEPT, History
from appliance.plan.planner import Alternative, Decision
from appliance.request import Finished, Timings
from appliance.types import FinishReason, TokensBySource


def finished(estimated_s: float, actual_s: float, paused_ms: float = 0.0) -> Finished:
    way = Alternative(0, 0.0, estimated_s)
    timings = Timings(
        queue_ms=0, load_ms=0, prompt_ms=actual_s * 1e3, predicted_ms=1, ttft_ms=actual_s * 1e3, paused_ms=paused_ms,
        compute_ms=actual_s * 1e3, service_ms=actual_s * 1e3,
    )  # fmt: skip
    decision = Decision(0, "nothing-stored", way, way, {"nothing-stored": way})
    return Finished(FinishReason.STOP, 1, TokensBySource(computed=10), timings, decision, loaded_bytes=0)


def test_an_estimate_is_close_within_a_quarter_or_when_nobody_notices() -> None:
    history = History()
    for estimated_s, actual_s in ((1.24, 1.0), (0.76, 1.0), (1.3, 1.0), (0.001, 0.015)):
        history.add("r", "t", 10, finished(estimated_s, actual_s))
    assert (history.service.requests, history.service.close) == (4, 3)
    assert accuracy_counters(history)['estimate_close_total{of="first_token"}'] == 3


def test_a_request_that_was_paused_says_nothing_of_estimates() -> None:
    history = History()
    history.add("r", "t", 10, finished(1, 9, paused_ms=1))
    assert history.service.requests == 0
    assert len(history.last(5)) == 1


def test_history_is_bounded_and_shows_the_newest_first() -> None:
    history = History()
    for n in range(KEPT + 5):
        history.add(f"chatcmpl-{n}-0", "t", 10, finished(1, 1))
    assert not history.of_call("chatcmpl-4")
    assert [record.request for record in requests(history, None).requests][:2] == [
        f"chatcmpl-{KEPT + 4}-0",
        f"chatcmpl-{KEPT + 3}-0",
    ]
    assert len(requests(history, None).requests) == LAST


def test_a_call_is_found_by_the_id_its_client_sees_with_all_its_choices() -> None:
    history = History()
    for name in ("chatcmpl-a-0", "chatcmpl-a-1", "chatcmpl-ab-0"):
        history.add(name, "t", 10, finished(1, 1))
    assert [each.request for each in requests(history, "chatcmpl-a").requests] == ["chatcmpl-a-0", "chatcmpl-a-1"]
    assert [each.request for each in requests(history, "chatcmpl-a-1").requests] == ["chatcmpl-a-1"]
    with pytest.raises(RequestError, match="not among the last"):
        requests(history, "chatcmpl")
