"""Integers between two bounds as a rule of a grammar, digit by digit. Pure functions."""

from __future__ import annotations

MOST_DIGITS = 16


def between(low: int | None, high: int | None) -> str | None:
    """JSON integers in [low, high] as GBNF; None: no bound. None if there is none of at most MOST_DIGITS digits."""
    most = 10**MOST_DIGITS - 1
    low, high = max(-most, -most if low is None else low), min(most, most if high is None else high)
    ways = []
    if low < 0 and low <= min(high, -1):
        ways.append(f'"-" ({_positive(max(1, -high), -low)})')
    if low <= 0 <= high:
        ways.append('"0"')
    if high > 0 and max(low, 1) <= high:
        ways.append(_positive(max(low, 1), high))
    return " | ".join(ways) or None


def _positive(low: int, high: int) -> str:
    """1 <= low <= high."""
    ways = []
    first, last = len(str(low)), len(str(high))
    whole_from = first if low == 10 ** (first - 1) else first + 1
    whole_to = last if high == 10**last - 1 else last - 1
    if whole_from > first or first > whole_to:
        ways.append(_same_length(str(low), str(min(high, 10**first - 1))))
    if whole_from <= whole_to:
        ways.append(f"[1-9] {_any(whole_from - 1, whole_to - 1)}".strip())
    if last > max(first, whole_to):
        ways.append(_same_length(str(10 ** (last - 1)), str(high)))
    return " | ".join(ways)


def _same_length(low: str, high: str) -> str:
    """Strings of digits of one length, low <= high."""
    if low == high:
        return f'"{low}"' if low else ""
    shared = next(n for n, (a, b) in enumerate(zip(low, high, strict=True)) if a != b)
    rest = len(low) - shared - 1
    start, stop = int(low[shared]), int(high[shared])
    ways = []
    if low[shared + 1 :] != "0" * rest:
        ways.append(f'"{start}" ({_same_length(low[shared + 1 :], "9" * rest)})')
        start += 1
    tail = []
    if high[shared + 1 :] != "9" * rest:
        tail.append(f'"{stop}" ({_same_length("0" * rest, high[shared + 1 :])})')
        stop -= 1
    if start <= stop:
        ways.append(f"[{start}-{stop}] {_any(rest, rest)}".strip())
    found = " | ".join([*ways, *tail])
    return f'"{low[:shared]}" ({found})' if shared else found


def _any(least: int, most: int) -> str:
    if most == 0:
        return ""
    return f"[0-9]{{{least}}}" if least == most else f"[0-9]{{{least},{most}}}"
