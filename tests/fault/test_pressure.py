"""Everything too small at once, and too many callers: answers stay right, bounds hold, nothing waits for ever."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvctl.diagnostics import ExitCode
from tests.support.appliance import BLOCK, Appliance, appliance, kvctl, prompt

CALLERS = 8
CALLS = 5
PROMPTS = [prompt(number, BLOCK * (2 + number % 5) + 5 * number) for number in range(10)]
SMALL = {
    "engine.context_tokens": 1024,
    "tiers.dram.capacity": "256KiB",
    "kv.write_behind": "128KiB",
    "tiers.nvme.capacity": "1MiB",
    "tiers.nvme.segment": "256KiB",
    "server.max_running": 4,
}


def test_many_callers_and_hardly_any_room(tmp_path: Path) -> None:
    with appliance(tmp_path / "roomy", {"kv.enabled": "false"}) as served:
        cold = [served.complete(tokens).text for tokens in PROMPTS]
    with appliance(tmp_path / "small", SMALL) as served:

        def call(caller: int) -> None:
            chance = random.Random(caller)
            for _ in range(CALLS):
                number = chance.randrange(len(PROMPTS))
                if chance.random() < 0.2:
                    leave_early(served, PROMPTS[number])
                    continue
                answer = served.complete(PROMPTS[number])
                assert answer.text == cold[number]
                assert answer.prompt_tokens == len(PROMPTS[number]) == sum(answer.sources.values())

        with ThreadPoolExecutor(CALLERS) as pool:
            for _ in pool.map(call, range(CALLERS)):
                pass
        served.settle()
        status = served.status()
        assert all(tier.used_bytes <= tier.capacity_bytes for tier in status.tiers)
        assert (status.running, status.waiting, status.engine.restarts) == (0, 0, 0)
        assert served.metrics()["kvctl_evicted_blocks_total"] > 0
        assert sum(path.stat().st_blocks * 512 for path in (tmp_path / "small" / "store").rglob("*.seg")) <= 2**20
        assert kvctl(served.home, "verify").code == ExitCode.OK
        assert served.stop() == ExitCode.OK


def leave_early(served: Appliance, tokens: list[int]) -> None:
    with served.stream(tokens, max_tokens=100) as lines:
        next(lines)
