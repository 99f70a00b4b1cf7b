"""Signals and the work they cut off."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest

from appliance.stop import Signals, Stopped, unless


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Whatever was ignored when the tests began, as SIGINT is in what a shell started with `&`."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
async def test_the_first_signal_asks_and_the_next_presses(first: signal.Signals, second: signal.Signals) -> None:
    signals = Signals()
    os.kill(os.getpid(), first)
    await signals.stop.wait()
    assert (signals.first, signals.again.is_set()) == (first, False)
    os.kill(os.getpid(), second)
    await signals.again.wait()


async def test_a_terminal_that_goes_away_does_not_press() -> None:
    signals = Signals()
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGHUP)
    await signals.stop.wait()
    await asyncio.sleep(0)  # both were heard in the same turn of the loop
    assert not signals.again.is_set()


async def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        Signals()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


async def test_work_that_is_cut_off_has_ended() -> None:
    event, begun, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.set()

    waiting = asyncio.ensure_future(unless(event, work()))
    await begun.wait()
    event.set()
    with pytest.raises(Stopped):
        await waiting
    assert ended.is_set()


async def test_work_that_is_done_first_gives_its_result() -> None:
    async def work() -> int:
        return 7

    async def failing() -> None:
        raise ZeroDivisionError

    assert await unless(asyncio.Event(), work()) == 7
    with pytest.raises(ZeroDivisionError):
        await unless(asyncio.Event(), failing())
