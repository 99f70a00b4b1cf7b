from __future__ import annotations

import pytest

from appliance.think_time import TYPICAL_S, ThinkTime


def of(*gaps_s: float) -> ThinkTime:
    think_time = ThinkTime()
    for gap_s in gaps_s:
        think_time.saw(gap_s)
    return think_time


def test_it_settles_at_what_it_sees_and_forgets_what_was_long_ago() -> None:
    assert of().typical_s == pytest.approx(TYPICAL_S)
    assert of(*[5] * 20).typical_s == pytest.approx(5, rel=0.05)
    assert of(*[5] * 20, *[300] * 12).typical_s == pytest.approx(300, rel=0.1)


def test_a_regular_user_is_expected_when_due_and_not_before_or_long_after() -> None:
    due = of(*[100] * 10)
    before, near, after = (due.chance(idle_s, 30, 10) for idle_s in (5, 90, 5000))
    assert near > 0.4
    assert before < 0.01
    assert after < 0.01


def test_an_irregular_user_is_expected_less_sharply() -> None:
    assert of(10, 1000, 10, 1000, 10, 1000).chance(95, 10, 6) < of(*[100] * 6).chance(95, 10, 6)


def test_more_turns_make_another_one_likelier() -> None:
    think_time = of(10, 10)
    chances = [think_time.chance(5, 10, turns) for turns in range(1, 9)]
    assert chances == sorted(chances)


@pytest.mark.parametrize("gaps_s", [(), (0.0,), (1e-9, 1e9), (3.0,) * 50])
@pytest.mark.parametrize("idle_s", [-1.0, 0.0, 1e-6, 10.0, 1e6, 1e12])
def test_a_chance_is_one(gaps_s: tuple[float, ...], idle_s: float) -> None:
    assert 0 <= of(*gaps_s).chance(idle_s, 30, 3) <= 1


def test_waiting_longer_for_it_never_makes_it_less_likely() -> None:
    think_time = of(20, 40, 30)
    chances = [think_time.chance(10, within_s, 3) for within_s in range(0, 200, 10)]
    assert chances[0] == 0
    assert chances == sorted(chances)
