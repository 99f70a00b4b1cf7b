"""How many threads to compute with, measured on this box with this model at start.

A step on all cores can be many times slower than on one as soon as anything else runs, because the compute threads
wait for each other by spinning. So there are two numbers for decode: one chosen by the worst of an idle box and one busy
core, one by the idle box alone; `others_running` says before each step which of them holds. Prefill, which nobody waits
for token by token, goes by the best idle time. Threading: compute thread, nothing else running.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median

STEPS = 5
SLICE_S = 0.25
"""A measurement ends after STEPS steps or this long, whichever is first, but has at least one step."""

BATCHES = 2
"""Prefill batches of which the quicker counts: a disturbance can only slow one down."""

GOOD_ENOUGH = 1.1
"""Beside others as many threads as on an idle box, unless that is slower by more than this than the best."""


@dataclass(frozen=True)
class Speed:
    threads: int
    """For a step while something else runs."""
    quiet_threads: int
    """For a step while nothing else does."""
    batch_threads: int
    decode_step_s: float
    """With quiet_threads."""
    prefill_tokens_per_s: float


def calibrate(
    decode: Callable[[int], None], prefill: Callable[[int], None], prefill_tokens: int, threads: int, batch_threads: int
) -> Speed:
    """`decode` computes one token and `prefill` a batch, each with so many threads. 0 threads = choose."""
    cores = len(os.sched_getaffinity(0))
    candidates = sorted({1, max(1, cores // 2), max(1, cores - 1), cores})
    idle = {n: _step_s(partial(decode, n)) for n in ([threads] if threads else candidates)}
    quiet_threads = min(idle, key=lambda n: idle[n])
    if not threads:
        worst = dict(idle)
        if cores > 1:
            with _busy_core():
                for n in candidates:
                    worst[n] = max(idle[n], _step_s(partial(decode, n)))
        good = [n for n in candidates if n <= quiet_threads and worst[n] <= GOOD_ENOUGH * min(worst.values())]
        threads = max(good, default=quiet_threads)
    choices = [batch_threads] if batch_threads else [n for n in candidates if 2 * n >= cores]
    rates = {n: prefill_tokens / min(_timed(partial(prefill, n)) for _ in range(BATCHES)) for n in choices}
    batch_threads = max(rates, key=lambda n: rates[n])
    return Speed(threads, quiet_threads, batch_threads, idle[quiet_threads], rates[batch_threads])


def others_running() -> bool:
    """Whether anything but the calling thread wants a core right now (proc(5), loadavg: runnable entities)."""
    try:
        with open("/proc/loadavg", encoding="ascii") as file:
            return int(file.read().split()[3].partition("/")[0]) > 1
    except (OSError, ValueError, IndexError):
        return True


def _step_s(step: Callable[[], None]) -> float:
    """Median seconds of a step."""
    times: list[float] = []
    while len(times) < STEPS and sum(times) < SLICE_S:
        times.append(_timed(step))
    return median(times)


def _timed(step: Callable[[], None]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


@contextmanager
def _busy_core() -> Iterator[None]:
    """One thread that computes without the GIL, as sealing a block does."""
    stop = threading.Event()
    data = bytes(1 << 20)

    def work() -> None:
        while not stop.is_set():
            hashlib.sha256(data)

    thread = threading.Thread(target=work, name="calibrate-busy")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
