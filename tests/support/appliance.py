"""The real appliance for tests: `kvctl serve` in a child process, with the tiny model, in a home of its own.

Everything is asked greedily: completions of the tiny model depend on every token before them and on nothing else, so equal
completions prove an equal KV cache. Invariant: leaving the `with` block leaves no process behind.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from appliance.api.control import Status, TierStatus
from appliance.ops.init import init
from kvctl.child import KVCTL, Child
from kvctl.client import AdminClient, read_client_file
from tests.support.models import tiny_model

ROOT = Path(__file__).resolve().parents[2]
BLOCK = 64
"""Tokens of a block."""
TOKEN_BYTES = 512
"""KV bytes of a token of the tiny model."""

SETTINGS: Mapping[str, object] = MappingProxyType(
    {
        "server.port": 0,
        "engine.context_tokens": 4096,
        "engine.threads": 1,
        "engine.batch_threads": 1,
        "kv.block_tokens": BLOCK,
        "tiers.dram.capacity": "4MiB",
        "tiers.nvme.capacity": "64MiB",
    }
)

COMPLETION_TOKENS = 32
PATIENCE_S = 60.0


def prompt(seed: int, n_tokens: int) -> list[int]:
    """Token ids of printable characters: the tiny model has one token a byte. 95 seeds in a row differ from the first on."""
    return [32 + seed % 95, *random.Random(seed).choices(range(32, 127), k=n_tokens - 1)]


def text(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode()


def until(happened: Callable[[], bool], what: str) -> None:
    """Ask again and again; an AssertionError says what did not happen."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline_s, f"still not: {what}"
        time.sleep(0.01)


@dataclass(frozen=True)
class Answer:
    text: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    sources: dict[str, int]
    """Prompt tokens by tier, and `computed`."""
    timings: dict[str, Any]


@dataclass(frozen=True)
class Ran:
    """A `kvctl` command that ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def kvctl(home: Path, *arguments: str) -> Ran:
    """Run a `kvctl` command on this home, as a person would."""
    ended = subprocess.run(
        [*KVCTL, "--home", str(home), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        timeout=PATIENCE_S,
    )
    return Ran(ended.returncode, ended.stdout, ended.stderr)


class Appliance:
    """Made by `appliance()`, which starts it."""

    def __init__(self, home: Path, child: Child) -> None:
        self.home = home
        self.child = child
        self._http = httpx.Client()

    # --- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self.child.start()
        self._http.close()
        self._http = self.client(read_client_file(self.home)[1])

    def client(self, api_key: str | None) -> httpx.Client:
        """A client of the public API with this key; its caller closes it."""
        headers = {"x-kvctl-explain": "1"} | ({"authorization": f"Bearer {api_key}"} if api_key else {})
        return httpx.Client(base_url=self.base_url, headers=headers, timeout=PATIENCE_S, trust_env=False)

    def stop(self) -> int:
        return self.child.stop()

    def kill(self) -> None:
        self.child.kill()

    def signal(self, number: signal.Signals) -> None:
        assert self.child.pid is not None
        os.kill(self.child.pid, number)

    def kill_engine(self) -> None:
        """Returns at once; `engine_is_back` waits for the next one."""
        pid = self.status().engine.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    def engine_is_back(self, restarts: int) -> None:
        """Wait for the engine process that was started after so many restarts."""
        until(
            lambda: (engine := self.status().engine).restarts == restarts and engine.pid is not None,
            f"restart {restarts} of the engine",
        )

    def close(self) -> None:
        self._http.close()

    # --- what it says --------------------------------------------------------------------------------------------

    @property
    def base_url(self) -> str:
        url: str = self.child.ready["base_url"]
        return url.removesuffix("/v1")

    @property
    def model(self) -> str:
        name: str = self.child.ready["model"]
        return name

    def status(self) -> Status:
        with AdminClient(self.home) as admin:
            return admin.status()

    def tier(self, name: str) -> TierStatus:
        return next(tier for tier in self.status().tiers if tier.tier == name)

    def metrics(self) -> dict[str, float]:
        """Totals by metric name, labels summed up."""
        totals: dict[str, float] = {}
        for family in text_string_to_metric_families(self.get("/metrics").text):
            for sample in family.samples:
                totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
        return totals

    # --- asking --------------------------------------------------------------------------------------------------

    def get(self, path: str) -> httpx.Response:
        return self._http.get(path)

    def post(self, path: str, body: Mapping[str, Any] | bytes) -> httpx.Response:
        return self._http.post(path, content=body if isinstance(body, bytes) else json.dumps(body).encode())

    def complete(self, prompt: str | Sequence[int], *, http: httpx.Client | None = None, **fields: Any) -> Answer:
        """A greedy completion; `http` speaks for another tenant."""
        body = {"prompt": prompt, "temperature": 0, "max_tokens": COMPLETION_TOKENS, **fields}
        return _answer((http or self._http).post("/v1/completions", json=body))

    def chat(self, messages: Sequence[Mapping[str, str]], **fields: Any) -> Answer:
        body = {"messages": messages, "temperature": 0, "max_tokens": COMPLETION_TOKENS, **fields}
        return _answer(self._http.post("/v1/chat/completions", json=body))

    @contextmanager
    def stream(self, prompt: str | Sequence[int], **fields: Any) -> Iterator[Iterator[str]]:
        """Lines of a greedy completion's event stream, empty ones left out."""
        body = {"prompt": prompt, "temperature": 0, "stream": True, **fields}
        with self._http.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            yield (line for line in response.iter_lines() if line)

    # --- the cache -----------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Wait until no request runs and every block is durable."""
        until(self._is_settled, "every block durable")

    def _is_settled(self) -> bool:
        status = self.status()
        return not status.running and not any(tier.pending_blocks for tier in status.tiers)

    def forget(self, *tiers: Literal["hbm", "dram"]) -> None:
        """Make these tiers forget everything, once all is durable below them."""
        self.settle()
        with AdminClient(self.home) as admin:
            for tier in tiers:
                until(lambda tier=tier: self._forgot(admin, tier), f"{tier} empty")  # type: ignore[misc]

    def _forgot(self, admin: AdminClient, tier: Literal["hbm", "dram"]) -> bool:
        admin.evict(tier)
        return self.tier(tier).used_bytes == 0


def _answer(response: httpx.Response) -> Answer:
    assert response.status_code == 200, response.text
    body = response.json()
    choice, usage = body["choices"][0], body["usage"]
    return Answer(
        text=choice["text"] if "text" in choice else choice["message"]["content"],
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
        completion_tokens=usage["completion_tokens"],
        sources=body["kvctl"]["tokens"],
        timings=body["timings"],
    )


def arguments(settings: Mapping[str, object], model: Path) -> list[str]:
    """Of `kvctl serve`."""
    overrides = [part for key, value in {**SETTINGS, **settings}.items() for part in ("--set", f"{key}={value}")]
    return ["--model", str(model), *overrides]


@contextmanager
def appliance(
    home: Path,
    settings: Mapping[str, object] = MappingProxyType({}),
    *,
    model: Path | None = None,
    program: Sequence[str] = KVCTL,
) -> Iterator[Appliance]:
    """A running appliance on `home`, initialised if it is not; `settings` by their dotted names."""
    init(home)
    with Child(home, arguments(settings, model or tiny_model()), lambda event: None, program) as child:
        running = Appliance(home, child)
        try:
            running.start()
            yield running
        finally:
            running.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    """One appliance for all tests of a module: each uses prompts of its own."""
    with appliance(tmp_path_factory.mktemp("home")) as running:
        yield running
