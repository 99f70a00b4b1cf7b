"""Integers between bounds: exactly those, as a regular expression made from the rule says."""

from __future__ import annotations

import random
import re

import pytest

from appliance.chat.gbnf import check
from appliance.chat.integers import MOST_DIGITS, between


def pattern(rule: str) -> re.Pattern[str]:
    """Rules of literals, classes, groups, counts and alternatives are regular expressions but for quotes and spaces."""
    return re.compile(rule.replace('"', "").replace(" ", ""))


def grouped(rule: str) -> re.Pattern[str]:
    return re.compile(f"(?:{pattern(rule).pattern})")


@pytest.mark.parametrize("low", [*range(-12, 13), -205, -100, -99, 95, 100, 101, 199, 990])
@pytest.mark.parametrize("span", [0, 1, 2, 8, 9, 10, 11, 89, 90, 91, 99, 100, 450, 1100])
def test_every_integer_between_and_no_other(low: int, span: int) -> None:
    rule = between(low, low + span)
    assert rule
    check(f"root ::= {rule}")
    wanted = grouped(rule)
    for n in range(low - 130, low + span + 130):
        assert bool(wanted.fullmatch(str(n))) == (low <= n <= low + span), n
    assert not wanted.fullmatch("-0")
    assert not wanted.fullmatch(f"0{low}")


def test_large_bounds() -> None:
    draw = random.Random(3)
    for _ in range(300):
        low, high = sorted(draw.randint(-(10**15), 10 ** draw.randint(1, 15)) for _ in range(2))
        wanted = grouped(between(low, high) or "")
        near = [bound + step for bound in (low, high) for step in (-2, -1, 0, 1, 2)]
        for n in [*near, *(draw.randint(-(10**15), 10**15) for _ in range(50)), 0]:
            assert bool(wanted.fullmatch(str(n))) == (low <= n <= high)


def test_one_bound_or_none() -> None:
    assert grouped(between(18, None) or "").fullmatch("9" * MOST_DIGITS)
    assert not grouped(between(18, None) or "").fullmatch("17")
    assert grouped(between(None, -3) or "").fullmatch("-1000")
    assert not grouped(between(None, -3) or "").fullmatch("-2")
    assert all(grouped(between(None, None) or "").fullmatch(n) for n in ("0", "-5", "123"))
    assert between(3, 2) is None
    assert between(10**20, None) is None
