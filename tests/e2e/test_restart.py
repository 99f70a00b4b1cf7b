"""A context that was read once is never computed again: not after eviction, not after a restart, not after a crash."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.appliance import BLOCK, COMPLETION_TOKENS, TOKEN_BYTES, Answer, Appliance, appliance, prompt, until
from tests.support.dear import DEAR

POOL_BLOCKS = 16


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    """With a DRAM pool that is smaller than some prompts, and holds what was used last; it always loads what it can."""
    pool = {"tiers.dram.capacity": POOL_BLOCKS * BLOCK * TOKEN_BYTES}
    with appliance(tmp_path_factory.mktemp("home"), pool, program=DEAR) as running:
        yield running


def forget_hbm(served: Appliance) -> None:
    served.forget("hbm")


def forget_dram(served: Appliance) -> None:
    served.forget("hbm", "dram")


def restart(served: Appliance) -> None:
    assert served.stop() == 0
    served.start()


def crash(served: Appliance) -> None:
    served.settle()
    served.kill()
    served.start()


def check(again: Answer, cold: Answer, tier: str) -> None:
    """The same answer, and all of the prompt from `tier` but its last token, which is computed for its logits."""
    cached = cold.prompt_tokens - 1
    assert again.text == cold.text
    assert again.cached_tokens == cached
    assert {source: n for source, n in again.sources.items() if n} == {tier: cached, "computed": 1}
    assert (again.timings["cache_n"], again.timings["prompt_n"]) == (cached, 1)
    assert again.timings["predicted_n"] == again.completion_tokens == COMPLETION_TOKENS


def test_the_same_prompt_from_every_tier(served: Appliance) -> None:
    tokens = prompt(1, BLOCK * 10 + 37)
    cold = served.complete(tokens)
    assert cold.cached_tokens == 0
    assert cold.completion_tokens == COMPLETION_TOKENS
    for lose, tier in (
        (lambda _: None, "hbm"),
        (forget_hbm, "dram"),
        (forget_dram, "nvme"),
        (restart, "nvme"),
        (crash, "nvme"),
    ):
        lose(served)
        check(served.complete(tokens), cold, tier)


@pytest.mark.parametrize(("lose", "tier"), [(forget_hbm, "dram"), (forget_dram, "nvme"), (restart, "nvme")])
def test_every_token_counts_at_block_boundaries(
    served: Appliance, lose: Callable[[Appliance], None], tier: str
) -> None:
    lengths = (2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK)
    prompts = [prompt(5 * len(lose.__name__) + i, n) for i, n in enumerate(lengths)]
    cold = [served.complete(tokens) for tokens in prompts]
    lose(served)
    for tokens, answer in zip(prompts, cold, strict=True):
        check(served.complete(tokens), answer, tier)


def test_a_prompt_larger_than_the_dram_pool_streams_through_it(served: Appliance) -> None:
    tokens = prompt(2, (POOL_BLOCKS + 13) * BLOCK + 5)
    cold = served.complete(tokens)
    crash(served)
    check(served.complete(tokens), cold, "nvme")
    assert served.tier("dram").blocks <= POOL_BLOCKS


@pytest.mark.parametrize("lose", [forget_hbm, forget_dram, restart])
def test_prompts_that_part_inside_a_block_share_it_up_to_there(
    served: Appliance, lose: Callable[[Appliance], None]
) -> None:
    first = prompt(len(lose.__name__), BLOCK * 4 + 9)
    shared = BLOCK * 2 + 23
    second = [*first[:shared], first[shared] ^ 1, *prompt(3, BLOCK)]
    served.complete(first)
    lose(served)
    warm = served.complete(second)
    assert warm.cached_tokens == shared
    again = served.complete(second, cache_salt="0" * 32)
    assert again.cached_tokens == 0
    assert warm.text == again.text


def test_turns_of_a_chat_reuse_prompt_and_completion(served: Appliance) -> None:
    messages = [{"role": "system", "content": "s" * 100}]
    reach = 0
    for turn in range(4):
        messages.append({"role": "user", "content": f"{turn}: " + "why " * 20})
        if turn % 2:
            restart(served)
        answer = served.chat(messages)
        assert answer.cached_tokens == reach, "all of the turn before but the last token it sampled"
        messages.append({"role": "assistant", "content": answer.text})
        reach = answer.prompt_tokens + answer.completion_tokens - 1
    cold = served.chat(messages[:-1], cache_salt="0" * 32)
    assert cold.cached_tokens == 0
    assert cold.text == answer.text


def test_the_capacity_holds_while_writing_and_at_a_smaller_start(tmp_path: Path) -> None:
    folder = tmp_path / "store"

    def on_disk() -> int:
        return sum(path.stat().st_blocks * 512 for path in folder.rglob("*.seg"))

    small = {"tiers.nvme.capacity": "2MiB", "tiers.nvme.segment": "256KiB"}
    with appliance(tmp_path, small) as served:
        answers = {}
        for seed in range(12):
            answers[seed] = served.complete(prompt(seed, BLOCK * 9 + 1))
            served.settle()
            assert 0 < on_disk() <= 2 * 2**20
        assert served.metrics()["kvctl_evicted_blocks_total"] > 0
        restart(served)
        assert served.complete(prompt(11, BLOCK * 9 + 1)).cached_tokens == BLOCK * 9, "the newest is still there"
    with appliance(tmp_path, {**small, "tiers.nvme.capacity": "1MiB"}) as served:
        nvme = served.tier("nvme")
        assert 0 < on_disk() <= nvme.capacity_bytes == 2**20
        assert 0 < nvme.used_bytes <= 2**20
        for seed in reversed(range(12)):
            again = served.complete(prompt(seed, BLOCK * 9 + 1))
            assert again.text == answers[seed].text
            assert on_disk() <= 2**20
        served.settle()
        assert on_disk() <= 2**20


def test_a_client_that_leaves_ends_the_decoding_but_not_the_cache(served: Appliance) -> None:
    tokens = prompt(4, BLOCK * 2 + 5)
    before = served.status().totals.completion_tokens
    with served.stream(tokens, max_tokens=3000) as lines:
        next(lines)
    until(lambda: not served.status().running, "the request ended")
    assert served.status().totals.completion_tokens - before < 3000
    served.forget("hbm")
    warm = served.complete(tokens)
    assert (warm.cached_tokens, warm.sources["dram"]) == (len(tokens) - 1, len(tokens) - 1)
    assert warm.text == served.complete(tokens, cache_salt="0" * 32).text
