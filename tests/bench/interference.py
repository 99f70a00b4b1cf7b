"""What a running stream loses while another request's context is written behind, or restored beside it.

The stream's tokens are timed at the client. Written behind: from the other request's first token until all its blocks
are durable. Restored: from sending the other request, with engine cells and DRAM emptied, until its blocks are in cells.
What the other request computes itself, its prefill and its last prompt token, is outside of both windows. A gap between
two tokens counts if it begins in a window; mean over all gaps of all windows. Held against the gaps just after, when the
same cells are in use: llama.cpp's attention passes over the cells of all sequences, so a stream beside 8,192 resident
tokens is slower in any case; `before` shows by how much.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from kvctl.bench.ttft import prompt
from kvctl.child import Child, throwaway_home
from kvctl.client import AdminClient, Answer, PublicClient

CONTEXT_TOKENS = 8192
WRITES = 2
RESTORES = 8
QUIET_S = 3.0
STREAM_TOKENS = 12_000


Span = tuple[float, float]


@dataclass(frozen=True)
class Added:
    """Time per output token of the stream before, during and after the windows."""

    before_s: float
    during_s: float
    after_s: float
    tokens: int
    """During."""

    @property
    def share(self) -> float:
        return self.during_s / self.after_s - 1


@dataclass(frozen=True)
class Interference:
    written: Added
    restored: Added


class Stream:
    """A request that generates all the while; `at` holds the time of each token."""

    def __init__(self, home: Path) -> None:
        self.at: list[float] = []
        self._stop = False
        self._thread = threading.Thread(target=self._run, args=(home,))

    def _run(self, home: Path) -> None:
        with PublicClient(home) as client:
            ids = client.tokenize("Count the days of the year one by one, and name each of them.")
            with suppress(_Enough):
                client.complete(ids, max_tokens=STREAM_TOKENS, temperature=0.0, ignore_eos=True, on_text=self._heard)

    def _heard(self, text: str) -> None:
        self.at.append(time.perf_counter())
        if self._stop:
            raise _Enough

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop = True
        self._thread.join()

    def gaps(self, spans: Sequence[Span]) -> list[float]:
        pairs = list(pairwise(self.at))
        return [later - earlier for start, stop in spans for earlier, later in pairs if start <= earlier < stop]


class _Enough(Exception):
    """The stream has served its purpose."""


def measure(model: Path, folder: Path, say: Callable[[str], None]) -> Interference:
    cells = -(-(CONTEXT_TOKENS * (WRITES + 1) + STREAM_TOKENS) // 1024) * 1024
    settings = [f"engine.context_tokens={cells}", "server.port=0", "tiers.dram.capacity=1GiB"]
    arguments = ["--model", str(model), *(part for item in settings for part in ("--set", item))]
    with throwaway_home(folder, "bench-") as home:
        from appliance.ops.init import init

        init(home)
        with Child(home, arguments, lambda event: None) as child:
            child.start()
            with PublicClient(home) as client:
                ids = prompt(client.tokenize, CONTEXT_TOKENS)
            written = _windows(home, WRITES, lambda n: _write(child, [n, *ids[1:]]), "written behind", say)
            restored = _windows(home, RESTORES, lambda n: _restore(child, [0, *ids[1:]]), "restored", say)
    return Interference(written, restored)


@contextmanager
def _streaming(home: Path) -> Iterator[Stream]:
    stream = Stream(home)
    stream.start()
    try:
        time.sleep(QUIET_S)
        yield stream
    finally:
        stream.stop()


def _windows(home: Path, times: int, window: Callable[[int], Span], name: str, say: Callable[[str], None]) -> Added:
    spans: dict[str, list[Span]] = {"before": [], "during": [], "after": []}
    with _streaming(home) as stream:
        for n in range(times):
            say(f"a stream beside a context that is {name}, {n + 1} of {times}")
            spans["before"].append(_quiet())
            spans["during"].append(window(n))
            spans["after"].append(_quiet())
    gaps = {when: stream.gaps(found) for when, found in spans.items()}
    mean = {when: statistics.fmean(found) for when, found in gaps.items()}
    return Added(mean["before"], mean["during"], mean["after"], len(gaps["during"]))


def _write(child: Child, ids: list[int]) -> Span:
    started_s = time.perf_counter()
    answer = _ask(child.home, ids)
    child.settle()
    return started_s + answer.ttft_s, time.perf_counter()


def _restore(child: Child, ids: list[int]) -> Span:
    with AdminClient(child.home) as admin:
        admin.evict("hbm")
        admin.evict("dram")
    started_s = time.perf_counter()
    return started_s, started_s + _ask(child.home, ids).load_s


def _quiet() -> Span:
    started_s = time.perf_counter()
    time.sleep(QUIET_S)
    return started_s, time.perf_counter()


def _ask(home: Path, ids: list[int]) -> Answer:
    with PublicClient(home) as client:
        return client.complete(ids, max_tokens=1, temperature=0.0)
