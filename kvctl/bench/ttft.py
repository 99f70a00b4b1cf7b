"""Time to first token of one prompt: cold, then from each tier, the disk after a SIGKILL of the whole appliance.

Method. All measurements of a context come from one run on one home that did not exist before. The prompt is generated
text, cut to the exact number of tokens. TTFT is measured at the client, from sending the request to its first streamed
token. Warm requests repeat the same prompt: hbm as it is; dram after the engine was told to forget every resident
sequence; nvme after SIGKILL and a new start, so that neither process memory nor (O_DIRECT) the page cache has the blocks.
The device's own read rate is measured before each nvme request with as many reads in flight as the store uses. Medians.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from appliance.api.control import Status
from appliance.errors import KvctlError
from kvctl.child import Child, throwaway_home
from kvctl.client import AdminClient, Answer, PublicClient
from kvctl.output import Steps

COMPLETION_TOKENS = 32
GIB = 1 << 30


class Measured(BaseModel):
    """One context from one tier; times are medians over `runs`."""

    tier: str
    """cold | hbm | dram | nvme"""
    ttft_s: float
    runs: list[float]
    speedup: float
    """Cold TTFT over this one."""
    cached_tokens: int
    same_completion: bool
    """The greedy completion equals the cold one."""
    load_s: float
    restored_bytes: int
    restored_bytes_per_s: float
    floor_s: float
    """One decode step at this depth, plus bytes over the device's read rate where the disk is read."""
    over_floor: float


class Context(BaseModel):
    prompt_tokens: int
    decode_step_s: float
    """Time per output token at this depth, from the hbm runs."""
    device_read_bytes_per_s: float
    measured: list[Measured]


class TtftReport(BaseModel):
    model: str
    engine: str
    kv_bytes_per_token: int
    threads: int
    quiet_threads: int
    batch_threads: int
    rss_bytes: int
    """Resident memory of both processes beyond weights, KV cells and DRAM pool, after the last context."""
    contexts: list[Context]


@dataclass(frozen=True)
class Options:
    model: Path
    contexts: tuple[int, ...]
    repeat: int
    folder: Path
    """Where the throw-away home is made: the disk that is measured."""
    profile: str
    overrides: tuple[str, ...]
    say: Steps


def run(options: Options) -> TtftReport:
    """Every context in turn. KvctlError when the appliance cannot be started or answers an error."""
    from appliance.ops.disk import ReadProbe
    from appliance.ops.init import init

    with throwaway_home(options.folder, "bench-") as home:
        init(home, options.profile)
        probe = ReadProbe(home, 512 << 20)
        try:
            with _appliance(home, options) as child:
                contexts = [_context(child, tokens, options, probe.read_bytes_per_s) for tokens in options.contexts]
                status = _status(home)
        finally:
            probe.close()
    return TtftReport(
        model=status.engine.model,
        engine=status.engine.engine,
        kv_bytes_per_token=status.engine.kv_bytes_per_token,
        threads=status.engine.threads,
        quiet_threads=status.engine.quiet_threads,
        batch_threads=status.engine.batch_threads,
        rss_bytes=status.rss_bytes,
        contexts=contexts,
    )


@contextmanager
def _appliance(home: Path, options: Options) -> Iterator[Child]:
    """Started with room for the largest context in every tier."""
    largest = max(options.contexts)
    cells = -(-(largest + COMPLETION_TOKENS + 256) // 1024) * 1024
    sized = (f"engine.context_tokens={cells}", "server.port=0")

    def child(dram_bytes: int, nvme_bytes: int) -> Child:
        tiers = (f"tiers.dram.capacity={dram_bytes}", f"tiers.nvme.capacity={nvme_bytes}")
        settings = [part for item in (*sized, *tiers, *options.overrides) for part in ("--set", item)]
        arguments = ["--model", str(options.model), "--profile", options.profile, *settings]
        return Child(home, arguments, lambda event: options.say(event["text"], event["fraction"]))

    started = child(2 * GIB, 16 * GIB)
    with started:
        started.start()
        needed = _status(home).engine.kv_bytes_per_token * sum(options.contexts) * 5 // 4
        if needed <= 2 * GIB:
            yield started
            return
    with child(needed, 4 * needed) as larger:
        larger.start()
        yield larger


def _status(home: Path) -> Status:
    with AdminClient(home) as admin:
        return admin.status()


def _context(child: Child, tokens: int, options: Options, device: Callable[[], float]) -> Context:
    with PublicClient(child.home) as client:
        ids = prompt(client.tokenize, tokens)

    def ask(tier: str) -> Answer:
        options.say(f"{tokens:,} tokens: {tier}")
        with PublicClient(child.home) as client:
            return client.complete(ids, max_tokens=COMPLETION_TOKENS, temperature=0.0)

    def evict() -> None:
        with AdminClient(child.home) as admin:
            admin.evict("hbm")

    cold = ask("cold")
    if cold.cached_tokens:
        raise KvctlError(f"{cold.cached_tokens} tokens of the cold prompt were known: not a measurement")
    child.settle()
    answers: dict[str, list[Answer]] = {"hbm": [], "dram": [], "nvme": []}
    rates = []
    for _ in range(options.repeat):
        answers["hbm"].append(ask("hbm"))
    for _ in range(options.repeat):
        child.settle()
        evict()
        answers["dram"].append(ask("dram"))
    for _ in range(options.repeat):
        child.settle()
        child.kill()
        child.start()
        rates.append(device())
        answers["nvme"].append(ask("nvme, after SIGKILL"))
        rates.append(device())
    rate = statistics.median(rates)
    step_s = statistics.median(answer.step_s for answer in answers["hbm"])
    measured = [_measured("cold", [cold], cold, cold.ttft_s, 0, 0.0)]
    per_token = _status(child.home).engine.kv_bytes_per_token
    for tier, given in answers.items():
        floor_s = step_s + (given[0].cached_tokens * per_token / rate if tier == "nvme" else 0.0)
        restored = 0 if tier == "hbm" else given[0].cached_tokens * per_token
        load_s = statistics.median(answer.load_s for answer in given)
        measured.append(_measured(tier, given, cold, floor_s, restored, load_s))
    return Context(prompt_tokens=tokens, decode_step_s=step_s, device_read_bytes_per_s=rate, measured=measured)


def _measured(
    tier: str, given: Sequence[Answer], cold: Answer, floor_s: float, restored_bytes: int, load_s: float
) -> Measured:
    ttft_s = statistics.median(answer.ttft_s for answer in given)
    return Measured(
        tier=tier,
        ttft_s=ttft_s,
        runs=[answer.ttft_s for answer in given],
        speedup=cold.ttft_s / ttft_s,
        cached_tokens=min(answer.cached_tokens for answer in given),
        same_completion=all(answer.text == cold.text for answer in given),
        load_s=load_s,
        restored_bytes=restored_bytes,
        restored_bytes_per_s=restored_bytes / load_s if load_s > 0 else 0.0,
        floor_s=floor_s,
        over_floor=ttft_s / floor_s if floor_s > 0 else 1.0,
    )


def prompt(tokenize: Callable[[str], list[int]], tokens: int) -> list[int]:
    """Exactly `tokens` ids of plain text that repeats nothing longer than a sentence, and begins like no other length's."""
    text, number = [f"{tokens} tokens.\n"], 0
    ids: list[int] = []
    while len(ids) < tokens:
        for _ in range(tokens // 8 + 8):
            number += 1
            text.append(f"Line {number}: item {number * 7919 % 10007} was moved to shelf {number * 104729 % 9973}.\n")
        ids = tokenize("".join(text))
    return ids[:tokens]
