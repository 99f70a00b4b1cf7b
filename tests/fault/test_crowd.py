"""Many requests and an engine that dies: who is to blame, what is lost, and who makes room for whom."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.appliance import BLOCK, COMPLETION_TOKENS, Appliance, appliance, kvctl, prompt, until
from tests.support.mortal_engine import MORTAL, POISON

SETTINGS = {"engine.max_sequences": 16, "engine.batch_tokens": 32, "server.max_running": 8}
LONG = prompt(1, BLOCK * 45)


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    with appliance(tmp_path_factory.mktemp("home"), SETTINGS, program=MORTAL) as running:
        yield running


def test_a_poison_request_among_good_ones_is_refused_and_no_other(mortal: Appliance) -> None:
    good = [prompt(10 + n, BLOCK + n) for n in range(6)]
    poison = {"prompt": [*prompt(20, BLOCK * 2), POISON], "max_tokens": 8}
    restarts = mortal.status().engine.restarts
    with ThreadPoolExecutor(7) as pool:
        bad = pool.submit(mortal.post, "/v1/completions", poison)
        answers = list(pool.map(mortal.complete, good))
        assert bad.result().status_code == 422
    assert mortal.post("/v1/completions", poison).status_code == 422
    assert mortal.status().engine.restarts == restarts + 2
    assert [answer.text for answer in answers] == [mortal.complete(tokens).text for tokens in good]


def test_a_crash_in_a_long_prompt_costs_its_last_blocks_only(mortal: Appliance) -> None:
    mortal.forget("hbm", "dram")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(mortal.complete, LONG)
        until(lambda: mortal.tier("dram").blocks - mortal.tier("dram").pending_blocks >= 32, "half of it is stored")
        assert not asked.done()
        mortal.kill_engine()
        answer = asked.result()
    assert answer.sources["dram"] >= BLOCK * 32
    assert answer.sources["computed"] == len(LONG) - answer.sources["dram"]
    assert mortal.complete(LONG).text == answer.text


def test_a_long_answer_makes_room_for_another_tenant_and_goes_on(tmp_path: Path) -> None:
    """One request at a time: who waits is not held up by who was served more."""
    tokens = prompt(3, BLOCK * 2)
    with appliance(tmp_path, {"server.max_running": 1}, program=MORTAL) as served:
        whole = served.complete(tokens, max_tokens=1500)
        key = kvctl(served.home, "tenant", "add", "other", "--json").json["api_key"]
        with served.client(key) as other, served.stream(tokens, max_tokens=1500) as lines:
            said = [next(lines)]
            assert served.complete(prompt(4, BLOCK), http=other).completion_tokens == COMPLETION_TOKENS
            status = served.status()
            said += lines
        assert status.totals.preemptions == 1
        assert status.running + status.waiting == 1, "the first is not done yet"
        events = [json.loads(line.removeprefix("data: ")) for line in said[:-1]]
        assert "".join(event["choices"][0]["text"] for event in events) == whole.text
        served.settle()
