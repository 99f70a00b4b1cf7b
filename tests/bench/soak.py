"""Hours of mixed load on one appliance: `make soak`, or `python -m tests.bench.soak --minutes 60`.

Clients of two tenants hold conversations, repeat prompts whose greedy answers are known from the start, hang up before,
during and after their answers, prefetch, inspect, evict and verify, all at once, on tiers far smaller than what they ask
for; the engine process is killed every half minute or so. What may come back: an answer, 429, 503 while there is no
engine, 422 for a request that was there at two kills. Then everything is quiet, and held against the start of the run:
resident memory and descriptors of the control process, cells and slots that nothing holds any more (both tiers can be
emptied), the known answers, and `kvctl verify` on the stopped store.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import psutil

from kvctl import output
from kvctl.client import AdminClient, read_client_file
from kvctl.diagnostics import ExitCode
from tests.support.appliance import Appliance, appliance, kvctl, prompt

SETTINGS: dict[str, object] = {
    "engine.context_tokens": 6144,
    "tiers.dram.capacity": "2MiB",
    "tiers.nvme.capacity": "16MiB",
    "server.max_running": 4,
    "server.max_queue": 8,
}
KNOWN_PROMPTS = 12
ANSWER_TOKENS = 16
KILL_EVERY_S = (15.0, 45.0)
SAMPLE_EVERY_S = 5.0
MEMORY_GROWTH_BYTES = 24 * 2**20
"""Of the control process, between the second and the last tenth of the run: caches fill up to their bounds meanwhile."""
DESCRIPTORS_GROWTH = 2
ALLOWED = {200, 422, 429, 503}
TOLD = {ExitCode.OK, ExitCode.FAILURE, ExitCode.API}
"""How a command may end when the engine dies beside it, or the queue is full."""


@dataclass
class Seen:
    statuses: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    """Answers that differ from what was known."""
    faults: list[str] = field(default_factory=list)
    """What should not have happened."""
    memory: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    kills: int = 0


class Load:
    def __init__(self, running: Appliance, seen: Seen, seed: int) -> None:
        self._running = running
        self._seen = seen
        self._seed = seed
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._known: list[tuple[list[int], str]] = []
        first = read_client_file(running.home)[1]
        second = kvctl(running.home, "tenant", "add", "second", "--json").json["api_key"]
        self._keys = (first, second)

    def learn(self) -> None:
        """Ask the known prompts once, alone."""
        for number in range(KNOWN_PROMPTS):
            ids = prompt(number, 200 + 150 * number)
            self._known.append((ids, self._running.complete(ids, max_tokens=ANSWER_TOKENS).text))
            (self._running.home / f"known-{number}.txt").write_bytes(bytes(ids))

    def run(self, seconds: float) -> None:
        works: list[Callable[[random.Random, httpx.Client], None]] = [
            *[self._converse] * 3,
            *[self._repeat] * 2,
            *[self._hang_up] * 2,
            self._operate,
        ]
        threads = [
            threading.Thread(target=self._forever, args=(work, number), name=work.__name__)
            for number, work in enumerate(works)
        ]
        threads.append(threading.Thread(target=self._kill, name="kill"))
        for thread in threads:
            thread.start()
        ends_s = time.monotonic() + seconds
        process = psutil.Process(self._running.child.pid)
        while time.monotonic() < ends_s and process.is_running():
            time.sleep(SAMPLE_EVERY_S)
            self._seen.memory.append(process.memory_full_info().uss)
            self._seen.descriptors.append(process.num_fds())
        self._stop.set()
        for thread in threads:
            thread.join(120)
            if thread.is_alive():
                self._fault(f"{thread.name} got no answer within two minutes")

    def _forever(self, work: Callable[[random.Random, httpx.Client], None], number: int) -> None:
        draw = random.Random(self._seed * 100 + number)
        with self._running.client(self._keys[number % 2]) as http:
            while not self._stop.is_set():
                try:
                    work(draw, http)
                except httpx.HTTPError as error:
                    self._fault(f"{work.__name__}: {type(error).__name__}")
                except AssertionError as error:
                    self._fault(f"{work.__name__}: {error}")

    def _post(self, http: httpx.Client, path: str, body: dict[str, object]) -> httpx.Response:
        response = http.post(path, json=body)
        with self._lock:
            self._seen.statuses[str(response.status_code)] += 1
        if response.status_code not in ALLOWED:
            self._fault(f"{path} answered {response.status_code}")
        if response.status_code in (429, 503):
            self._stop.wait(0.05)
        return response

    def _converse(self, draw: random.Random, http: httpx.Client) -> None:
        """A conversation that grows until it is long enough."""
        name = f"talk-{draw.randrange(10**9)}"
        messages: list[dict[str, object]] = [{"role": "user", "content": "x" * draw.randrange(50, 1500)}]
        for turn in range(draw.randrange(2, 6)):
            body = {"messages": messages, "max_tokens": draw.randrange(1, 48), "prompt_cache_key": name}
            response = self._post(http, "/v1/chat/completions", body)
            if response.status_code != 200 or self._stop.is_set():
                return
            said = response.json()["choices"][0]["message"]["content"]
            messages += [{"role": "assistant", "content": said}, {"role": "user", "content": f"and {turn}?"}]

    def _repeat(self, draw: random.Random, http: httpx.Client) -> None:
        """A known prompt must have its known answer, wherever its blocks are by now."""
        ids, expected = draw.choice(self._known)
        body = {"prompt": ids, "temperature": 0, "max_tokens": ANSWER_TOKENS}
        response = self._post(http, "/v1/completions", body)
        if response.status_code == 200 and response.json()["choices"][0]["text"] != expected:
            with self._lock:
                self._seen.wrong += 1

    def _hang_up(self, draw: random.Random, http: httpx.Client) -> None:
        """Ask for a stream and leave after some lines, at once, or before the headers are there."""
        body = {"prompt": prompt(draw.randrange(10**6), draw.randrange(100, 4000)), "max_tokens": 200, "stream": True}
        if draw.random() < 0.3:
            with suppress(httpx.TimeoutException):
                http.post("/v1/completions", json=body, timeout=draw.uniform(0.001, 0.2))
            return
        with http.stream("POST", "/v1/completions", json=body) as response:
            with self._lock:
                self._seen.statuses[f"{response.status_code} left"] += 1
            if response.status_code not in ALLOWED:
                self._fault(f"a stream answered {response.status_code}")
            for _, _ in zip(response.iter_lines(), range(draw.randrange(20)), strict=False):
                pass

    def _operate(self, draw: random.Random, http: httpx.Client) -> None:
        """What an operator does meanwhile."""
        known = ("--prompt-file", str(self._running.home / f"known-{draw.randrange(KNOWN_PROMPTS)}.txt"))
        asks = (
            ("status", "--json"),
            ("inspect", *known, "--json"),
            ("prefetch", *known, "--to", draw.choice(("dram", "hbm")), "--json"),
            ("verify", "--json"),
            None,
        )
        chosen = draw.choice(asks)
        if chosen is None:
            with AdminClient(self._running.home) as admin:
                admin.evict(draw.choice(("hbm", "dram")))
            return
        ran = kvctl(self._running.home, *chosen)
        if "Traceback" in ran.err or ran.code not in TOLD:
            self._fault(f"kvctl {chosen[0]} ended with {ran.code}: {ran.err.strip()[-200:]}")

    def _kill(self) -> None:
        draw = random.Random(self._seed)
        while not self._stop.wait(draw.uniform(*KILL_EVERY_S)):
            with suppress(AssertionError):  # there is none at the moment
                self._running.kill_engine()
                self._seen.kills += 1

    def _fault(self, what: str) -> None:
        with self._lock:
            self._seen.faults.append(what)


def _tenths(values: list[int]) -> tuple[float, float]:
    """Medians of the second and of the last tenth."""
    n = max(1, len(values) // 10)
    return statistics.median(values[n : 2 * n] or values), statistics.median(values[-n:])


def judge(seen: Seen, running: Appliance) -> list[str]:
    """What is wrong after the run; the appliance is quiet now."""
    found = [f"{times} x {what}" for what, times in Counter(seen.faults).items()]
    if seen.wrong:
        found.append(f"{seen.wrong} known prompts had another answer")
    before, after = _tenths(seen.memory)
    if after - before > MEMORY_GROWTH_BYTES:
        found.append(f"the control process grew from {before / 2**20:.0f} to {after / 2**20:.0f} MiB")
    before, after = _tenths(seen.descriptors)
    if after - before > DESCRIPTORS_GROWTH:
        found.append(f"open descriptors grew from {before:.0f} to {after:.0f}")
    try:
        running.forget("hbm", "dram")
    except AssertionError as error:
        found.append(f"cells or slots are held by nothing: {error}")
    if running.stop():
        found.append("the appliance did not stop in order")
    verified = kvctl(running.home, "verify", "--json")
    if verified.code:
        found.append(f"kvctl verify ended with {verified.code}: {verified.out[-300:]}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    seen = Seen()
    with TemporaryDirectory(prefix="soak-") as folder, appliance(Path(folder) / "home", SETTINGS) as running:
        load = Load(running, seen, options.seed)
        load.learn()
        load.run(60 * options.minutes)
        found = judge(seen, running)
    memory, descriptors = _tenths(seen.memory), _tenths(seen.descriptors)
    say = output.stdout().print
    say(f"{options.minutes:g} minutes, {seen.kills} kills of the engine process")
    say("answers: " + ", ".join(f"{n} x {status}" for status, n in sorted(seen.statuses.items())))
    say(
        f"control process, second tenth -> last tenth: {memory[0] / 2**20:.1f} -> {memory[1] / 2**20:.1f} MiB,"
        f" {descriptors[0]:.0f} -> {descriptors[1]:.0f} descriptors"
    )
    for what in found or ["nothing is wrong"]:
        say(output.plain(what))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
