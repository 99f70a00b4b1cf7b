"""What the planner may choose among: never dearer than another way, the same for the same arguments, finite."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.plan.cost import CostModel
from appliance.plan.line import SURPRISE, Line
from appliance.plan.planner import UNNOTICED_S, Decision, Piece, Traffic, decide
from appliance.types import Tier

MIB = 1 << 20
BLOCK = 256
LOWER = (Tier.DRAM, Tier.NVME, Tier.REMOTE)


def measured(token_s: float, rates: dict[Tier, float], latency_s: float = 0.0) -> CostModel:
    loads = {tier: Line(1 / rate, latency_s) for tier, rate in rates.items()}
    return CostModel(Line(token_s, 1e-8), Line(0.02, 1e-7), loads)


def stored(tiers: list[Tier], nbytes: int = 3 * MIB) -> list[Piece]:
    return [Piece(n * BLOCK, (n + 1) * BLOCK, tier, nbytes) for n, tier in enumerate(tiers)]


rates = st.floats(1e4, 1e10)
costs = st.builds(
    lambda token_s, each, latency_s: measured(token_s, dict(zip(LOWER, each, strict=True)), latency_s),
    st.floats(1e-5, 0.1),
    st.lists(rates, min_size=3, max_size=3),
    st.floats(0, 1),
)
traffics = st.builds(
    Traffic, st.integers(0, 4), st.floats(0.05, 1.0), st.lists(st.integers(1, 9000), max_size=3).map(tuple)
)


@given(costs, traffics, st.lists(st.sampled_from(LOWER), max_size=30), st.integers(0, 9000), st.integers(1, 500))
def test_the_chosen_way_is_never_noticeably_dearer_than_another(
    cost: CostModel, traffic: Traffic, tiers: list[Tier], resident: int, rest: int
) -> None:
    prompt_tokens = max(len(tiers) * BLOCK, resident) + rest
    decision = decide(prompt_tokens, resident, stored(tiers), cost, traffic)
    assert decision.alternatives[decision.reason] == decision.chosen
    for way in (*decision.alternatives.values(), decision.recompute):
        assert decision.chosen.total_s <= way.total_s + UNNOTICED_S * 1.001
        assert math.isfinite(way.total_s)
        assert min(way.load_s, way.compute_s, way.others_s) >= 0
        assert resident <= way.load_to <= prompt_tokens
        assert way.front_to == 0 or resident < way.front_to < way.load_to


@given(costs, st.lists(st.sampled_from(LOWER), min_size=1, max_size=20), st.floats(1.0, 100.0))
def test_a_slower_medium_is_never_loaded_from_more(cost: CostModel, tiers: list[Tier], slower: float) -> None:
    prompt_tokens = len(tiers) * BLOCK + 1
    before = decide(prompt_tokens, 0, stored(tiers), cost, both_ends=False)
    for line in cost.loads.values():
        line.slope0 *= slower
        line.slope1 *= slower
    after = decide(prompt_tokens, 0, stored(tiers), cost, both_ends=False)
    assert after.load_to <= before.load_to
    assert after.chosen.total_s >= before.chosen.total_s - UNNOTICED_S * 1.001


def balanced() -> Decision:
    """Computing the whole takes as long as loading it."""
    cost = measured(0.001, {Tier.NVME: 3 * MIB / (BLOCK * 0.001)})
    return decide(32 * BLOCK + 1, 0, stored([Tier.NVME] * 32), cost)


def test_where_both_take_the_same_time_the_work_is_split_in_the_middle() -> None:
    decision = balanced()
    assert decision.reason == "both"
    assert decision.front_to == pytest.approx(16 * BLOCK, abs=2 * BLOCK)
    assert decision.chosen.total_s < 0.7 * decision.alternatives["load"].total_s


def test_an_engine_that_cannot_is_not_asked_for_both_ends() -> None:
    cost = measured(0.001, {Tier.NVME: 3 * MIB / (BLOCK * 0.001)})
    assert decide(32 * BLOCK + 1, 0, stored([Tier.NVME] * 32), cost, both_ends=False).front_to == 0


def test_a_fast_medium_is_loaded_from_alone() -> None:
    cost = measured(0.001, {Tier.NVME: 1e9})
    assert decide(32 * BLOCK + 1, 0, stored([Tier.NVME] * 32), cost).reason == "load"


def test_a_prompt_waits_for_shorter_ones_and_for_its_share_beside_streams() -> None:
    cost = measured(0.001, {})
    alone = decide(4096, 0, (), cost).chosen
    beside = decide(4096, 0, (), cost, Traffic(2, 0.5, (1000, 9000))).chosen
    assert beside.service_s == alone.service_s
    assert beside.total_s == pytest.approx(2 * (alone.total_s + cost.prefill_s(0, 1000)))


def test_latency_and_rate_are_told_apart() -> None:
    cost = measured(0.001, {Tier.NVME: 1e9})
    for n in range(60):
        nbytes = (1 + n % 7) * MIB
        cost.saw_load({Tier.NVME: nbytes}, 0.05 + nbytes / 100e6)
    assert cost.load_s(Tier.NVME, 64 * MIB) == pytest.approx(0.05 + 64 * MIB / 100e6, rel=0.02)
    assert cost.load_s(Tier.NVME, 4096) == pytest.approx(0.05, rel=0.05)


def test_one_hiccup_changes_nothing_and_two_are_believed() -> None:
    cost = measured(0.001, {Tier.NVME: 100e6})
    for _ in range(5):
        cost.saw_load({Tier.NVME: 10 * MIB}, 0.1)
    before = cost.load_s(Tier.NVME, 10 * MIB)
    cost.saw_load({Tier.NVME: 10 * MIB}, 0.1 * SURPRISE * 10)
    assert cost.load_s(Tier.NVME, 10 * MIB) == before
    cost.saw_load({Tier.NVME: 10 * MIB}, 0.1 * SURPRISE * 10)
    assert cost.load_s(Tier.NVME, 10 * MIB) == pytest.approx(0.1 * SURPRISE * 10, rel=0.01)


def test_a_load_beside_others_has_a_line_of_its_own() -> None:
    cost = measured(0.001, {Tier.NVME: 100e6})
    for _ in range(20):
        cost.saw_load({Tier.NVME: 10 * MIB}, 0.3, shared=True)
    assert cost.load_s(Tier.NVME, 10 * MIB) == pytest.approx(0.105, rel=0.01)
    assert cost.load_s(Tier.NVME, 10 * MIB, shared=True) == pytest.approx(0.3, rel=0.05)


def test_a_throttled_medium_is_left_and_found_again_when_it_recovers() -> None:
    cost = measured(0.001, {Tier.NVME: 500e6})
    pieces, ways, throttled = stored([Tier.NVME] * 16), [], True
    for n in range(200):
        throttled = n < 60
        decision = decide(16 * BLOCK + 1, 0, pieces, cost, both_ends=False)
        ways.append(decision.reason)
        if decision.load_to:
            seconds = 48 * MIB / (1e6 if throttled else 500e6)
            cost.saw_load({Tier.NVME: 48 * MIB}, seconds)
        else:
            cost.passed_over(Tier.NVME)
    assert ways[:60].count("recompute-is-faster") > 50
    assert set(ways[150:]) == {"load"}
