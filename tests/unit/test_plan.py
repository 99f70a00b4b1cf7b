import math
import random

import pytest

from appliance.plan.cost import CostModel
from appliance.plan.planner import Piece, decide
from appliance.types import Tier

MIB = 1 << 20


def model(prefill_tokens_per_s: float = 200.0, step_s: float = 0.05) -> CostModel:
    return CostModel.calibrated(prefill_tokens_per_s, step_s)


def pieces(n_blocks: int, tier: Tier = Tier.NVME, block: int = 256, nbytes: int = 3 * MIB) -> list[Piece]:
    return [Piece(i * block, (i + 1) * block, tier, nbytes) for i in range(n_blocks)]


def test_prefill_line_is_recovered_from_what_was_seen() -> None:
    cost = model()
    rng = random.Random(1)
    for _ in range(40):
        start = rng.randrange(0, 30_000)
        stop = start + rng.randrange(64, 4096)
        true_s = 0.004 * (stop - start) + 2e-7 * (stop**2 - start**2) / 2
        cost.saw_prefill(start, stop, true_s * rng.uniform(0.97, 1.03))
    estimate = cost.prefill_s(0, 8192)
    true_s = 0.004 * 8192 + 2e-7 * 8192**2 / 2
    assert estimate == pytest.approx(true_s, rel=0.05)


def test_one_depth_alone_moves_the_constant_and_keeps_estimates_finite() -> None:
    cost = model(prefill_tokens_per_s=100)
    for _ in range(20):
        cost.saw_prefill(0, 1024, 2.048)
    assert cost.prefill_s(0, 1024) == pytest.approx(2.048, rel=0.01)
    cost.saw_prefill(0, 10, math.nan)
    assert math.isfinite(cost.prefill_s(0, 1024))


def test_slopes_never_turn_negative() -> None:
    cost = model()
    cost.saw_prefill(0, 4096, 30.0)
    cost.saw_prefill(8192, 8448, 0.1)  # deeper and cheaper: noise
    assert cost.prefill_s(0, 1) >= 0
    assert cost.prefill_s(60_000, 60_001) >= 0


def test_calibration_survives_json_and_damage_is_refused() -> None:
    cost = model()
    cost.saw_prefill(0, 2048, 11.0)
    cost.saw_load({Tier.NVME: 100 * MIB}, 0.1)
    again = CostModel.from_json(cost.to_json())
    assert again.prefill_s(0, 5000) == cost.prefill_s(0, 5000)
    assert again.load_s(Tier.NVME, MIB) == cost.load_s(Tier.NVME, MIB)
    broken = cost.to_json()
    broken["loads"]["nvme"]["slope0"] = -1.0
    with pytest.raises(ValueError, match="finite"):
        CostModel.from_json(broken)


def test_everything_stored_is_loaded_when_loading_is_cheaper() -> None:
    cost = model()
    cost.saw_load({Tier.NVME: 1000 * MIB}, 1.0)
    decision = decide(8193, 0, pieces(32), cost)
    assert (decision.load_to, decision.reason) == (8192, "load")
    assert decision.chosen.total_s < decision.recompute.total_s


def test_a_tier_slower_than_compute_is_not_loaded_from() -> None:
    cost = model()
    cost.saw_load({Tier.NVME: 10 * MIB}, 1000.0)
    decision = decide(8193, 0, pieces(32), cost)
    assert (decision.load_to, decision.reason) == (0, "recompute-is-faster")


def test_a_tier_that_was_slow_once_is_tried_again() -> None:
    cost = model()
    cost.saw_load({Tier.NVME: 10 * MIB}, 1000.0)
    passed_over = 0
    while decide(8193, 0, pieces(32), cost).reason == "recompute-is-faster":
        cost.passed_over(Tier.NVME)
        passed_over += 1
    assert 0 < passed_over < 100


def test_a_short_prefill_says_nothing_about_long_ones() -> None:
    cost = model()
    before = cost.prefill_s(0, 8192)
    cost.saw_prefill(4096, 4124, 10.0)
    assert cost.prefill_s(0, 8192) == before
    cost.saw_prefill(0, 64, 10.0)
    assert cost.prefill_s(0, 8192) > before


def test_the_fast_front_is_loaded_and_the_slow_back_computed() -> None:
    cost = model()
    cost.saw_load({Tier.DRAM: 1000 * MIB}, 0.1)
    cost.saw_load({Tier.NVME: 10 * MIB}, 1000.0)
    stored = pieces(8, Tier.DRAM) + [Piece(p.start + 2048, p.stop + 2048, Tier.NVME, p.nbytes) for p in pieces(8)]
    decision = decide(4097, 0, stored, cost)
    assert (decision.load_to, decision.reason) == (2048, "load-part")


def test_an_unmeasured_tier_is_tried() -> None:
    assert decide(1025, 0, pieces(4), model()).reason == "load"


def test_resident_and_unknown_prompts_load_nothing() -> None:
    assert decide(1000, 1000, pieces(4), model()).reason == "resident"
    assert decide(1000, 0, (), model()).reason == "nothing-stored"
    assert decide(2000, 1024, pieces(4), model()).reason == "nothing-stored"


def test_equal_arguments_give_equal_decisions() -> None:
    cost = model()
    assert decide(8193, 100, pieces(32), cost) == decide(8193, 100, pieces(32), cost)
