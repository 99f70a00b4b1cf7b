"""SIGKILL of either process in the middle of a write load: the next start needs nobody, and no answer is ever another one."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from kvctl.diagnostics import ExitCode
from tests.support.appliance import BLOCK, COMPLETION_TOKENS, Appliance, appliance, kvctl, prompt, until

ROUNDS = 10
CALLERS = 4
PROMPT_TOKENS = BLOCK * 8 + 11
PROMPTS = [prompt(number, PROMPT_TOKENS) for number in range(ROUNDS * CALLERS)]
KEPT = prompt(94, PROMPT_TOKENS)
"""Durable before the first kill."""


@dataclass(frozen=True)
class Cold:
    """Of an appliance that nothing happens to."""

    answers: list[str]
    round_s: float
    """What the prompts of a round take: the moments of the kills are drawn from it."""


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Cold:
    with appliance(tmp_path_factory.mktemp("undisturbed")) as served:
        began_s = time.monotonic()
        answers = [served.complete(tokens).text for tokens in PROMPTS]
        return Cold(answers, (time.monotonic() - began_s) / ROUNDS)


def ask(served: Appliance, tokens: list[int]) -> httpx.Response | None:
    """None if the connection broke."""
    body = {"prompt": tokens, "temperature": 0, "max_tokens": COMPLETION_TOKENS}
    try:
        return served.post("/v1/completions", body)
    except httpx.TransportError:
        return None


@contextmanager
def load(served: Appliance, round_: int, cold: Cold) -> Iterator[list[Future[httpx.Response | None]]]:
    """The prompts of this round, all at once, and a moment in the middle of it. Ends when all callers have an answer."""
    with ThreadPoolExecutor(CALLERS) as pool:
        asked = [pool.submit(ask, served, tokens) for tokens in of_round(PROMPTS, round_)]
        time.sleep(random.Random(round_).uniform(0, cold.round_s))
        yield asked


def of_round(things: list, round_: int) -> list:  # type: ignore[type-arg]
    return things[round_ * CALLERS : (round_ + 1) * CALLERS]


def check_answers(served: Appliance, cold: Cold, round_: int) -> None:
    for tokens, expected in zip(of_round(PROMPTS, round_), of_round(cold.answers, round_), strict=True):
        assert served.complete(tokens).text == expected
    if round_:
        assert served.complete(PROMPTS[round_ * CALLERS - 1]).text == cold.answers[round_ * CALLERS - 1], (
            "of the round before"
        )


def test_the_control_process_at_any_moment(tmp_path: Path, cold: Cold) -> None:
    broken = 0
    with appliance(tmp_path) as served:
        served.complete(KEPT)
        for round_ in range(ROUNDS):
            served.settle()
            with load(served, round_, cold) as asked:
                served.kill()
            broken += sum(caller.result() is None for caller in asked)
            if round_ % 2:
                assert kvctl(tmp_path, "verify").code == ExitCode.OK
            served.start()
            if not round_ % 2:
                assert kvctl(tmp_path, "verify").code == ExitCode.OK
            assert served.complete(KEPT).sources["nvme"] == PROMPT_TOKENS - 1
            check_answers(served, cold, round_)
        assert served.metrics().get("kvctl_integrity_failures_total", 0) == 0
    assert broken >= ROUNDS, "the kills met the load"


def test_the_engine_process_at_any_moment(tmp_path: Path, cold: Cold) -> None:
    with appliance(tmp_path, {"tiers.dram.capacity": "32MiB"}) as served:
        served.complete(KEPT)
        served.settle()
        pid = served.child.pid
        for round_ in range(ROUNDS):
            with load(served, round_, cold) as asked:
                served.kill_engine()
            served.engine_is_back(restarts=round_ + 1)
            for caller, expected in zip(asked, of_round(cold.answers, round_), strict=True):
                response = caller.result()
                assert response is not None, "the connection stays"
                assert response.status_code == 200, "who got nothing yet is asked again"
                assert response.json()["choices"][0]["text"] == expected
            kept = served.complete(KEPT)
            assert (kept.sources["dram"], kept.cached_tokens) == (PROMPT_TOKENS - 1, PROMPT_TOKENS - 1)
            check_answers(served, cold, round_)
        assert kvctl(tmp_path, "verify").code == ExitCode.OK
        assert served.child.pid == pid
        metrics = served.metrics()
        assert metrics["kvctl_engine_restarts_total"] == ROUNDS
        assert metrics["kvctl_requeued_requests_total"] >= ROUNDS, "the kills met the load"
        served.stop()
        served.start()
        check_answers(served, cold, ROUNDS - 1)


def test_a_stream_whose_engine_dies_ends_with_an_error_and_the_next_is_warm(served: Appliance) -> None:
    tokens = prompt(1, PROMPT_TOKENS)
    cold = served.complete(tokens)
    served.settle()
    restarts = served.status().engine.restarts
    with served.stream(tokens, max_tokens=3000) as lines:
        assert "error" not in json.loads(next(lines).removeprefix("data: "))
        served.kill_engine()
        *_, name, last = lines
    assert name == "event: error"
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("server_error", "engine_restarting")
    served.engine_is_back(restarts + 1)
    again = served.complete(tokens)
    assert again.text == cold.text
    assert again.cached_tokens == again.sources["dram"] == PROMPT_TOKENS - 1


def test_a_request_that_met_two_crashes_is_refused_and_no_other(served: Appliance) -> None:
    tokens = prompt(2, PROMPT_TOKENS)
    body = {"prompt": tokens, "temperature": 0, "max_tokens": 3000}
    restarts = served.status().engine.restarts
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(served.post, "/v1/completions", body)
        for crash in range(2):
            until(lambda: served.status().running == 1, "the request runs")
            served.kill_engine()
            served.engine_is_back(restarts + crash + 1)
        for response in (asked.result(), served.post("/v1/completions", body)):
            assert response.status_code == 422
            assert response.json()["error"]["code"] == "quarantined"
    assert served.complete([*tokens, 65]).completion_tokens == COMPLETION_TOKENS
