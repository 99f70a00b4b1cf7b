"""Many users, long contexts, one box: the same conversations on the same appliance with and without its tiers.

Method. Three appliances answer the same workload (workload.py), one after the other, each on a home that did not exist
before: `tiers` as the profile has them; `hbm only`, with everything below the engine's cells off; `no reuse`, the same
and each request in a cache of its own. Cells and DRAM pool are sized so that the conversations together are several times
larger. A session is a client of its own that asks, reads the whole answer, thinks for a while drawn from the seed, and
asks again; sessions start one think time apart at most. TTFT and time per output token are measured at the client and
hold all waiting. The answers of the first appliance are what the conversations go on with in all three, so that each
request has the same prompt everywhere. Requests per hour are requests over the time from the first question to the last
answer. What an infinite cache would serve is counted from the prompts in the order in which they were sent. Answers are
greedy; where one differs from that of an appliance without reuse, its prompt is asked again on a quiet appliance with as
much of it known as then, once resident and once restored: the split into batches is the same, so equal answers mean that
rounding of another batch made the difference, and not what was stored.
"""

from __future__ import annotations

import math
import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from appliance.api.control import Status
from kvctl.bench.workload import Session, Workload, reusable, sessions
from kvctl.child import Child, throwaway_home
from kvctl.client import AdminClient, Answer, PublicClient
from kvctl.output import Steps

TIERS, HBM_ONLY, NO_REUSE = "tiers", "hbm only", "no reuse"
CELLS_SHARE, POOL_SHARE = 4, 2
"""The conversations together are so many times the cells, and the pool."""


class Asked(BaseModel):
    """One request as its client saw it."""

    session: int
    turn: int
    sent_s: float
    """Since the first question."""
    ttft_s: float
    tpot_s: float
    """Time per output token after the first."""
    prompt_tokens: int
    cached_tokens: int
    reusable_tokens: int
    """What an infinite cache would have served."""
    same_answer: bool
    """As without reuse."""
    explained: dict[str, object]
    """What the appliance said of it: X-Kvctl-Explain."""


class Run(BaseModel):
    """One appliance's answers to the workload."""

    name: str
    seconds: float
    """From the first question to the last answer."""
    requests_per_hour: float
    later_ttft_p50_s: float
    later_ttft_p95_s: float
    """Of turns 2 and later."""
    first_ttft_p50_s: float
    tpot_p50_s: float
    tpot_p95_s: float
    cached_share: float
    """Of the tokens an infinite cache would have served."""
    requests: list[Asked]


class SessionsReport(BaseModel):
    model: str
    engine: str
    sessions: int
    turns: int
    total_tokens: int
    """Of all conversations at their end, what they share counted once."""
    cells: int
    pool_tokens: int
    runs: list[Run]
    differing: int
    """Answers of the appliance with tiers that differ from those without reuse."""
    differing_beyond_rounding: int
    """Of those, by the same-split check."""


@dataclass(frozen=True)
class Options:
    model: Path
    workload: Workload
    folder: Path
    """Where the throw-away homes are made."""
    profile: str
    overrides: tuple[str, ...]
    say: Steps


@dataclass
class _Talk:
    """One session as it goes on."""

    number: int
    session: Session
    answers: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    asked: list[tuple[float, list[int], Answer]] = field(default_factory=list)
    """(sent, prompt, answer) of each turn."""


def run(options: Options) -> SessionsReport:
    """KvctlError when an appliance cannot be started or answers an error."""
    workload = options.workload
    planned, settings = _sized(options)
    off = [*settings, "kv.enabled=false"]
    first, status = _talk(options, TIERS, settings, planned, said=None)
    said = [talk.answers for talk in first]
    hbm_only, _ = _talk(options, HBM_ONLY, off, planned, said)
    no_reuse, _ = _talk(options, NO_REUSE, off, planned, said)
    expected = {(talk.number, turn): text for talk in no_reuse for turn, text in enumerate(talk.texts)}
    named = ((TIERS, first), (HBM_ONLY, hbm_only), (NO_REUSE, no_reuse))
    runs = [_summary(name, talks, expected) for name, talks in named]
    differing = [(asked.session, asked.turn) for asked in runs[0].requests if not asked.same_answer]
    return SessionsReport(
        model=status.engine.model,
        engine=status.engine.engine,
        sessions=workload.sessions,
        turns=workload.turns,
        total_tokens=_total_tokens(workload, planned),
        cells=status.engine.context_tokens,
        pool_tokens=status.tiers[1].capacity_bytes // max(1, status.engine.kv_bytes_per_token),
        runs=runs,
        differing=len(differing),
        differing_beyond_rounding=_beyond_rounding(options, settings, runs[0], first, differing) if differing else 0,
    )


def _sized(options: Options) -> tuple[list[Session], list[str]]:
    """The conversations in this model's tokens, and settings that make cells and pool too small for them together."""
    workload = options.workload
    room = ["server.port=0", f"engine.context_tokens={_rounded(workload.longest_tokens)}", "tiers.nvme.enabled=false"]
    with _appliance(options, room) as child:
        with PublicClient(child.home) as client:
            planned = sessions(workload, client.tokenize)
        token_bytes = _status(child.home).engine.kv_bytes_per_token
    total = _total_tokens(workload, planned)
    cells = _rounded(max(workload.longest_tokens, total // CELLS_SHARE))
    settings = [
        "server.port=0",
        f"server.max_queue={2 * workload.sessions}",
        f"engine.context_tokens={cells}",
        f"tiers.dram.capacity={total // POOL_SHARE * token_bytes}",
        f"tiers.nvme.capacity={4 * total * token_bytes + (1 << 30)}",
        *options.overrides,
    ]
    return planned, settings


def _rounded(tokens: int) -> int:
    return -(-tokens // 256) * 256


def _total_tokens(workload: Workload, planned: Sequence[Session]) -> int:
    """The system prompt once, and what each session adds to it."""
    asked = sum(len(turn.ask) for session in planned for turn in session.turns)
    return asked - (len(planned) - 1) * workload.system_tokens + len(planned) * workload.turns * workload.answer_tokens


@contextmanager
def _appliance(options: Options, settings: Sequence[str]) -> Iterator[Child]:
    """A new home and an appliance that serves it."""
    from appliance.ops.init import init

    sets = [part for item in settings for part in ("--set", item)]
    arguments = ["--model", str(options.model), "--profile", options.profile, *sets]
    with throwaway_home(options.folder, "bench-") as home:
        init(home, options.profile)
        with Child(home, arguments, lambda event: options.say(event["text"], event["fraction"])) as child:
            child.start()
            yield child


def _status(home: Path) -> Status:
    with AdminClient(home) as admin:
        return admin.status()


def _talk(
    options: Options, name: str, settings: Sequence[str], planned: Sequence[Session], said: list[list[list[int]]] | None
) -> tuple[list[_Talk], Status]:
    """All sessions at once. `said`: the answers to go on with; None: this appliance's own."""
    talks = [_Talk(number, session) for number, session in enumerate(planned)]
    count = threading.Semaphore(0)
    done = 0

    def ask(talk: _Talk) -> None:
        with PublicClient(child.home) as client:
            for turn in talk.session.turns:
                time.sleep(turn.pause_s)
                prompt = talk.session.prompt(talk.answers)
                salt: dict[str, Any] = {"cache_salt": os.urandom(16).hex()} if name == NO_REUSE else {}
                sent_s = time.perf_counter()
                answer = client.complete(
                    prompt,
                    max_tokens=options.workload.answer_tokens,
                    temperature=0.0,
                    ignore_eos=True,
                    prompt_cache_key=f"session-{talk.number}",
                    **salt,
                )
                talk.asked.append((sent_s, prompt, answer))
                talk.texts.append(answer.text)
                spoken = said[talk.number][len(talk.answers)] if said else client.tokenize(answer.text)
                talk.answers.append(spoken)
                count.release()

    with _appliance(options, settings) as child:
        with ThreadPoolExecutor(len(talks)) as pool:
            asking = [pool.submit(ask, talk) for talk in talks]
            while not all(future.done() for future in asking):
                done += count.acquire(timeout=0.5)
                options.say(f"{name}: {done} of {len(talks) * options.workload.turns} requests")
        for future in asking:
            future.result()
        return talks, _status(child.home)


def _summary(name: str, talks: Sequence[_Talk], expected: dict[tuple[int, int], str]) -> Run:
    every = sorted(
        ((*asked, talk.number, turn) for talk in talks for turn, asked in enumerate(talk.asked)), key=lambda a: a[0]
    )
    answers = [talks[number].answers[turn] for _, _, _, number, turn in every]
    could = reusable([prompt for _, prompt, _, _, _ in every], answers)
    began_s = every[0][0]
    requests = [
        Asked(
            session=number,
            turn=turn,
            sent_s=sent_s - began_s,
            ttft_s=answer.ttft_s,
            tpot_s=answer.step_s,
            prompt_tokens=answer.prompt_tokens,
            cached_tokens=answer.cached_tokens,
            reusable_tokens=tokens,
            same_answer=answer.text == expected[number, turn],
            explained=answer.explained,
        )
        for (sent_s, _, answer, number, turn), tokens in zip(every, could, strict=True)
    ]
    seconds = max(sent_s + answer.seconds for sent_s, _, answer, _, _ in every) - began_s
    later = [asked.ttft_s for asked in requests if asked.turn] or [asked.ttft_s for asked in requests]
    steps = [asked.tpot_s for asked in requests]
    return Run(
        name=name,
        seconds=seconds,
        requests_per_hour=3600 * len(requests) / seconds,
        later_ttft_p50_s=statistics.median(later),
        later_ttft_p95_s=percentile(later, 0.95),
        first_ttft_p50_s=statistics.median(asked.ttft_s for asked in requests if not asked.turn),
        tpot_p50_s=statistics.median(steps),
        tpot_p95_s=percentile(steps, 0.95),
        cached_share=sum(a.cached_tokens for a in requests) / max(1, sum(a.reusable_tokens for a in requests)),
        requests=requests,
    )


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank: the smallest value that at least this share of all does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _beyond_rounding(
    options: Options, settings: Sequence[str], run: Run, talks: Sequence[_Talk], differing: Sequence[tuple[int, int]]
) -> int:
    """How many of these answers change when the context they had is restored instead of never having left the cells."""
    known = {(asked.session, asked.turn): asked.cached_tokens for asked in run.requests}
    wrong = 0
    with _appliance(options, settings) as child:
        for number, turn in differing:
            options.say(f"asking again: session {number}, turn {turn + 1}")
            prompt = talks[number].asked[turn][1]
            answers = [
                _split_at(child, prompt, known[number, turn], options.workload.answer_tokens, restored=restored)
                for restored in (False, True)
            ]
            wrong += answers[0] != answers[1]
    return wrong


def _split_at(child: Child, prompt: list[int], known: int, answer_tokens: int, *, restored: bool) -> str:
    """The answer when the first `known` tokens are there already, in cells or to be restored, and the rest is computed."""
    alone: dict[str, Any] = {"cache_salt": os.urandom(16).hex(), "temperature": 0.0, "ignore_eos": True}
    with PublicClient(child.home) as client:
        if known:
            client.complete(prompt[:known], max_tokens=1, **alone)
        if restored:
            child.settle()
            with AdminClient(child.home) as admin:
                admin.evict("hbm")
        return client.complete(prompt, max_tokens=answer_tokens, **alone).text
