"""What the cost-aware policy keeps: what is dear to compute and asked for again; a prefix before what hangs on it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from appliance.api.trace import TraceEvent, TraceHeader
from appliance.kv.costs import CostAware
from appliance.kv.policy import EvictionPolicy, Standing
from appliance.kv.record import record_bytes
from appliance.ops.simulate import Simulation
from tests.support.kv import LAYOUT, NS, fill, opened, prompt

BLOCK = 256
ROOT = -1
HEADER = TraceHeader(
    started="2026-01-01T00:00:00Z",
    block_tokens=BLOCK,
    block_bytes=1,
    prefill_token_s=1.0,
    prefill_depth_s=1e-4,
    bytes_per_s={},
)


def token_s(position: int) -> float:
    return 1.0 + position / 10_000


def add_path(policy: EvictionPolicy[int], first: int, length: int) -> list[int]:
    path = list(range(first, first + length))
    for n, block in enumerate(path):
        policy.add(block, path[n - 1] if n else ROOT, n * BLOCK)
    policy.touch(path, counts=False)
    return path


def forget(policy: EvictionPolicy[int], n: int) -> list[int]:
    victims = policy.evict(n)
    for victim in victims:
        policy.remove(victim)
    return victims


def test_a_deep_block_outlives_a_shallow_one() -> None:
    policy = CostAware(token_s)
    deep = add_path(policy, 0, 200)
    shallow = add_path(policy, 1000, 4)
    policy.touch(deep, counts=False)
    policy.touch(shallow, counts=False)
    assert forget(policy, 4) == shallow[::-1], "although it was used last"


def test_what_is_asked_for_again_outlives_what_is_read_once() -> None:
    policy = CostAware(token_s)
    hot = add_path(policy, 0, 4)
    for _ in range(15):
        policy.touch(hot)
    for n in range(3):
        once = add_path(policy, 1000 + 10 * n, 4)
        assert forget(policy, 4) == once[::-1]


def test_what_was_hot_goes_when_the_clock_has_passed_it() -> None:
    policy = CostAware(token_s)
    hot = add_path(policy, 0, 4)
    for _ in range(15):
        policy.touch(hot)
    for n in range(100):
        add_path(policy, 1000 + 10 * n, 4)
        if hot[0] not in policy:
            break
        forget(policy, 4)
    assert n < 50
    assert hot[0] not in policy


def test_a_prefix_never_goes_before_what_continues_it() -> None:
    draw = random.Random(1)
    policy = CostAware(token_s)
    paths: list[list[int]] = []
    parents: dict[int, int] = {}
    for number in range(300):
        shared = draw.choice(paths)[: draw.randint(1, 20)] if paths and draw.random() < 0.7 else []
        path = shared + list(range(1000 * number, 1000 * number + draw.randint(1, 60)))
        for n, block in enumerate(path):
            parents[block] = path[n - 1] if n else ROOT
            if block not in policy:
                policy.add(block, parents[block], n * BLOCK)
        policy.touch(path)
        paths.append(path)
        for _ in range(draw.randint(0, 3)):
            policy.touch(draw.choice(paths))
        if number % 20 == 0:
            order = {block: n for n, block in enumerate(policy.oldest_first())}
            assert len(order) == len(policy)
            assert all(order[b] < order[parents[b]] for b in order if parents[b] in order)
        while len(policy) > 2000:
            forget(policy, 100)


def test_the_order_survives_in_standings() -> None:
    draw = random.Random(2)
    policy = CostAware(token_s)
    names = list(range(500))
    for block in names:
        policy.add(block, ROOT, draw.randint(0, 300) * BLOCK)
    starts = {block: draw.randint(0, 300) * BLOCK for block in names}
    policy = CostAware(token_s)
    for block in names:
        policy.add(block, ROOT, starts[block])
    used = list(names)
    for _ in range(2000):
        block = draw.choice(names[100:])
        if block in policy:
            policy.touch([block])
            used.remove(block)
            used.append(block)
        if draw.random() < 0.05:
            forget(policy, 1)
    again = CostAware(token_s)
    for block in used:
        if block in policy:
            again.add(block, ROOT, starts[block], Standing(*policy.standing(block)[:2]))
    assert list(again.oldest_first()) == list(policy.oldest_first())


def test_nothing_protected_goes_and_never_too_few() -> None:
    policy = CostAware(token_s)
    path = add_path(policy, 0, 10)
    assert policy.evict(11) == []
    assert policy.evict(10, {path[-1]}) == []
    assert policy.evict(3, {path[-1], path[-3]}) == [path[-2], path[-4], path[-5]]
    assert len(policy) == 10


async def test_use_survives_a_restart(tmp_path: Path) -> None:
    hot, cold = prompt(1, 32), prompt(2, 32)
    room = 5 * record_bytes(LAYOUT, 16) + 8192
    async with opened(tmp_path, capacity=room, segment=2**20) as store:
        await fill(store, hot)
        await store.flush(5)
        for _ in range(15):
            store.touch(store.lookup(NS, hot).hits)
        await fill(store, cold)
        await store.flush(5)
    for seed in (3, 4):  # two restarts
        async with opened(tmp_path, capacity=room, segment=2**20) as store:
            await fill(store, prompt(seed, 32))
            await store.flush(5)
            store.evict_dram()
            assert store.lookup(NS, hot).tokens == 32, "asked for more often, used longer ago"


def talks(seed: int) -> Iterator[list[tuple[int, int]]]:
    """Sessions that grow, and end, behind a shared system prompt."""
    draw, unused, live = random.Random(seed), 8, []
    for _ in range(600):
        if len(live) < 12:
            size = draw.randint(8, 24)
            live.append([(0, 7), (unused, unused + size)])
            unused += size + 1
        talk = draw.choice(live)
        yield list(talk)
        talk.append((unused, unused + 1))
        unused += 2
        if len(talk) == 7:
            live.remove(talk)


def documents(seed: int) -> Iterator[list[tuple[int, int]]]:
    """A few documents that all ask about, among many that are read once."""
    draw, unused = random.Random(seed), 1000
    for _ in range(1000):
        if draw.random() < 0.4:
            first = 20 * draw.randrange(10)
            yield [(first, first + 19)]
        else:
            size = draw.randint(5, 30)
            yield [(unused, unused + size)]
            unused += size + 1


def served(workload: Callable[[int], Iterator[list[tuple[int, int]]]], policy: str, blocks: int) -> float:
    """Share of the seconds of prefill that the tier saves."""
    simulation = Simulation(HEADER, policy, dram_bytes=blocks, nvme_bytes=0)
    for path in workload(1):
        count = sum(last - first + 1 for first, last in path)
        simulation.replay(TraceEvent(t=0, tenant=0, path=path, prompt_blocks=count, prompt_tokens=count * BLOCK))
    result = simulation.result()
    return result.saved_s / (result.saved_s + result.compute_s)


@pytest.mark.parametrize("blocks", [100, 200, 400])
def test_the_default_gains_much_with_documents_and_loses_little_with_talks(blocks: int) -> None:
    for workload in (talks, documents):
        assert served(workload, "cost", blocks) > served(workload, "lru", blocks) - 0.04
    if blocks == 400:
        assert served(documents, "cost", blocks) > 1.05 * served(documents, "lru", blocks)
