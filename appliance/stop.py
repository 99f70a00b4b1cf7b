"""Being asked to stop: by the first signal in order, by the next at once.

Invariant: work that a signal cuts off has ended when its caller goes on. Event loop only.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Signals:
    """SIGTERM, SIGINT, SIGHUP: the first asks for an orderly stop, the next for a quick one."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.again = asyncio.Event()
        self.first: signal.Signals | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup means it
                asyncio.get_running_loop().add_signal_handler(number, self._hear, number)

    def _hear(self, number: signal.Signals) -> None:
        if self.first is None:
            self.first = number
            self.stop.set()
        elif number is not signal.SIGHUP:  # a terminal that goes away may tell it twice
            self.again.set()


class Stopped(Exception):
    """A signal came first."""


async def unless(event: asyncio.Event, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; Stopped, with `work` cancelled and ended, if the event comes first."""
    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if working.done():
        return working.result()
    working.cancel()
    await asyncio.wait({working})
    raise Stopped
