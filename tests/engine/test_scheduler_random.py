"""The scheduler under any order of commands: never a wrong token, one end for each request, nothing held at the end."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, rule

from appliance.engine.base import KVMode
from appliance.engine.client import Done, Preempted, Prefilled
from appliance.engine.null import NullEngine
from appliance.engine.request import Failed, Request
from appliance.engine.roster import GROWTH_TOKENS
from appliance.errors import EngineError
from appliance.types import FinishReason, Tokens
from tests.support.engines import export, null_config, prefill, prompt
from tests.support.scheduling import Bench, reference

CELLS = 72
BLOCK = 4
DOCUMENTS = [prompt(40, seed) for seed in range(2)]
TAILS = [Tokens(), prompt(5, 7), prompt(13, 8)]


def asked(request: Request) -> Tokens:
    return request.prompt[: len(request.prompt) - request.resumed_tokens]


class SchedulerMachine(RuleBasedStateMachine):
    known = Bundle("known")
    kv_mode = KVMode.ROWS
    growth_tokens = GROWTH_TOKENS

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(
            kv_mode=self.kv_mode,
            growth_tokens=self.growth_tokens,
            context_tokens=CELLS,
            max_sequences=6,
            batch_tokens=16,
            shared_batch_tokens=4,
            block_tokens=BLOCK,
        )
        self.begun: dict[str, Request] = {}
        self.ran: set[str] = set()
        self.embedded: set[str] = set()
        self.failed: set[str] = set()
        self.replies: list[Future[Any]] = []
        self.exports: list[tuple[Future[None], str, list[tuple[int, int, int]]]] = []

    @rule(
        target=known,
        document=st.sampled_from(DOCUMENTS),
        length=st.integers(1, 40),
        tail=st.sampled_from(TAILS),
        reserve_tokens=st.integers(1, 12),
        ns=st.sampled_from([b"one", b"two"]),
        then=st.sampled_from(["", "run", "restore and run"]),
    )
    def begin(self, document: Tokens, length: int, tail: Tokens, reserve_tokens: int, ns: bytes, then: str) -> str:
        name = f"r{len(self.begun)}"
        self.bench.begin(name, document[:length] + tail, reserve_tokens, ns)
        self.begun[name] = self.bench.roster.known(name)
        if "restore" in then:
            self.restore(name, 60, True)
        if "run" in then:
            self.run(name, reserve_tokens)
        return name

    @rule(name=known, n_tokens=st.integers(0, 60), whole=st.booleans())
    def restore(self, name: str, n_tokens: int, whole: bool) -> None:
        """Any run of blocks from any block on; some continue what is there, and some do not."""
        tokens = self.begun[name].prompt
        if self.kv_mode is KVMode.CHECKPOINT:
            tokens = tokens[:-1]
        blocks = self.bench.stored(tokens, first_slot=1000 * (1 + int(name[1:])))
        first = 0 if whole or not blocks else n_tokens % len(blocks)
        self.replies.append(self.bench.scheduler.restore(name, first * BLOCK, blocks[first : first + n_tokens]))

    @rule(name=known, stop=st.integers(0, 40), n_steps=st.integers(0, 3))
    def both_ends(self, name: str, stop: int, n_steps: int) -> None:
        """The prompt up to `stop`, while what is behind it comes."""
        self.replies.append(self.bench.scheduler.prefill(name, stop))
        self.step(n_steps)
        self.restore(name, -(-stop // BLOCK), False)

    @rule(name=known)
    def embed(self, name: str) -> None:
        if name not in self.ran and not self.begun[name].sampling:
            self.embedded.add(name)
            self.replies.append(self.bench.scheduler.embed(name))

    @rule(name=known, max_tokens=st.integers(0, 12))
    def run(self, name: str, max_tokens: int) -> None:
        if name not in self.ran | self.embedded:
            self.ran.add(name)
            self.bench.run(name, max_tokens)

    @rule(name=known, n_steps=st.integers(0, 4), evicted=st.booleans())
    def preempt(self, name: str, n_steps: int, evicted: bool) -> None:
        """It makes room for a while, at any stage."""
        self.bench.scheduler.preempt(name)
        self.bench.step()
        self.go_on(n_steps, evicted=evicted)

    def go_on(self, n_steps: int = 0, *, evicted: bool = False) -> bool:
        """Whoever had to make room comes back after so many steps, twice. False if nobody had."""
        paused = [name for name, r in self.begun.items() if r.preempted and not r.ended and self.bench.roster.get(name)]
        for name in paused:
            self.bench.scheduler.park(name)
            if evicted:
                self.evict()
            for _ in range(n_steps):
                self.bench.step()
            self.restore(name, 60, True)
            for _ in range(n_steps):
                self.bench.step()
            self.bench.run(name, 12)
        return bool(paused)

    @rule(name=known)
    def cancel(self, name: str) -> None:
        self.bench.scheduler.cancel(name)

    @rule(name=consumes(known))
    def release(self, name: str) -> None:
        self.bench.release(name)

    @rule(name=known, start=st.integers(0, 40), n_blocks=st.integers(1, 5))
    def export(self, name: str, start: int, n_blocks: int) -> None:
        slot = 10**6 + 10 * len(self.replies)
        blocks = [(start + i * BLOCK, BLOCK, slot + i) for i in range(n_blocks)]
        reply = self.bench.scheduler.export(name, blocks)
        self.replies.append(reply)
        self.exports.append((reply, name, blocks))

    @rule(n_steps=st.integers(1, 8))
    def step(self, n_steps: int) -> None:
        for _ in range(n_steps):
            self.bench.step()
            self.go_on()

    @rule(name=known)
    def fail(self, name: str) -> None:
        """The engine refuses every row of this request for one step."""
        sequence = self.begun[name].sequence
        if sequence and not self.begun[name].ended:
            self.failed.update([name] if self.kv_mode is KVMode.ROWS else self.begun)
            self.bench.engine.refuses = lambda row: row.seq == sequence.id
            self.bench.step()
            self.bench.engine.refuses = lambda row: False

    @rule()
    def evict(self) -> None:
        self.replies.append(self.bench.scheduler.evict())

    def teardown(self) -> None:
        """Let everything finish, oldest first, then look at all that was said."""
        bench = self.bench
        for name in self.begun:
            bench.settle()
            while self.go_on():
                bench.settle()
            bench.release(name)
        bench.settle()
        for reply in self.replies:
            assert isinstance(reply.exception(timeout=0), (EngineError, type(None)))
        for exported, name, blocks in self.exports:
            if not exported.exception(timeout=0):
                self.check_export(asked(self.begun[name]) + Tokens.of(bench.tokens(name)), blocks)
        for name, request in self.begun.items():
            end = bench.end(name)
            given_up = bool(bench.events[name]) and isinstance(bench.events[name][-1], Preempted)
            assert (end is not None or given_up) is (name in self.ran)
            if isinstance(end, Failed):
                assert name in self.failed, end.message
            elif end:
                self.check_tokens(name, request, end)
        stats = bench.roster.stats()
        assert (stats.requests_running, stats.requests_waiting, stats.cells_pinned) == (0, 0, 0)
        bench.done(bench.scheduler.evict())
        assert bench.engine.free_cells == CELLS

    def check_export(self, tokens: Tokens, blocks: list[tuple[int, int, int]]) -> None:
        engine = NullEngine(null_config(block_tokens=BLOCK), checkpoints=self.kv_mode is KVMode.CHECKPOINT)
        at = 0
        for start, n, slot in blocks:
            prefill(engine, 0, tokens[at : start + n], at)
            at = start + n
            (right,) = export(engine, 0, start, [n])
            assert self.bench.slot(slot, len(right)) == right, "never a wrong byte"

    def check_tokens(self, name: str, request: Request, end: Done) -> None:
        tokens = self.bench.tokens(name)
        assert tokens == reference(asked(request), 12)[: len(tokens)], "never a wrong token"
        if end.reason is FinishReason.LENGTH:
            assert request.sampling
            assert len(tokens) == request.limit_tokens
            assert sum(isinstance(event, Prefilled) for event in self.bench.events[name]) == 1


class CrowdedMachine(SchedulerMachine):
    """Requests claim cells as they go on, so that they have to make room for each other."""

    growth_tokens = 2


class CheckpointMachine(CrowdedMachine):
    kv_mode = KVMode.CHECKPOINT


for machine in (SchedulerMachine, CrowdedMachine, CheckpointMachine):
    machine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestScheduler = SchedulerMachine.TestCase
TestCrowded = CrowdedMachine.TestCase
TestCheckpoints = CheckpointMachine.TestCase
