"""The scheduler under any order of commands: never a wrong token, one end for each request, nothing held at the end."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, rule

from appliance.engine.client import Done, Prefilled
from appliance.engine.request import Failed, Request
from appliance.errors import EngineError
from appliance.types import FinishReason, Tokens
from tests.support.engines import export, null_engine, prefill, prompt
from tests.support.scheduling import Bench, reference

CELLS = 72
BLOCK = 4
DOCUMENTS = [prompt(40, seed) for seed in range(2)]
TAILS = [Tokens(), prompt(5, 7), prompt(13, 8)]


def asked(request: Request) -> Tokens:
    return request.prompt[: len(request.prompt) - request.resumed_tokens]


class SchedulerMachine(RuleBasedStateMachine):
    known = Bundle("known")

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(
            context_tokens=CELLS, max_sequences=6, batch_tokens=16, shared_batch_tokens=4, block_tokens=BLOCK
        )
        self.begun: dict[str, Request] = {}
        self.ran: set[str] = set()
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
        blocks = self.bench.stored(tokens, first_slot=1000 * (1 + int(name[1:])))
        first = 0 if whole else n_tokens % len(blocks)
        self.replies.append(self.bench.scheduler.restore(name, first * BLOCK, blocks[first : first + n_tokens]))

    @rule(name=known, max_tokens=st.integers(0, 12))
    def run(self, name: str, max_tokens: int) -> None:
        if name not in self.ran:
            self.ran.add(name)
            self.bench.run(name, max_tokens)

    @rule(name=known, n_steps=st.integers(0, 4), evicted=st.booleans())
    def preempt(self, name: str, n_steps: int, evicted: bool) -> None:
        """It makes room for a while, at any stage."""
        bench, request = self.bench, self.begun[name]
        bench.scheduler.preempt(name)
        bench.step()
        if not request.preempted or request.ended:
            return
        bench.scheduler.park(name)
        if evicted:
            self.evict()
        self.step(n_steps)
        self.restore(name, 60, True)
        self.step(n_steps)
        bench.run(name, 12)

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

    @rule(name=known)
    def fail(self, name: str) -> None:
        """The engine refuses every row of this request for one step."""
        sequence = self.begun[name].sequence
        if sequence and not self.begun[name].ended:
            self.failed.add(name)
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
            bench.release(name)
        bench.settle()
        for reply in self.replies:
            assert isinstance(reply.exception(timeout=0), (EngineError, type(None)))
        for exported, name, blocks in self.exports:
            if not exported.exception(timeout=0):
                self.check_export(asked(self.begun[name]) + Tokens.of(bench.tokens(name)), blocks)
        for name, request in self.begun.items():
            end = bench.end(name)
            assert (end is not None) is (name in self.ran)
            if isinstance(end, Failed):
                assert name in self.failed
            elif end:
                self.check_tokens(name, request, end)
        stats = bench.roster.stats()
        assert (stats.requests_running, stats.requests_waiting, stats.cells_pinned) == (0, 0, 0)
        bench.done(bench.scheduler.evict())
        assert bench.engine.free_cells == CELLS

    def check_export(self, tokens: Tokens, blocks: list[tuple[int, int, int]]) -> None:
        stop = blocks[-1][0] + BLOCK
        engine = null_engine(block_tokens=BLOCK)
        prefill(engine, 0, tokens[:stop])
        for start, n, slot in blocks:
            (right,) = export(engine, 0, start, [n])
            assert self.bench.slot(slot, len(right)) == right, "never a wrong byte"

    def check_tokens(self, name: str, request: Request, end: Done) -> None:
        tokens = self.bench.tokens(name)
        assert tokens == reference(asked(request), 12)[: len(tokens)], "never a wrong token"
        if end.reason is FinishReason.LENGTH:
            assert request.sampling
            assert len(tokens) == request.limit_tokens
            assert sum(isinstance(event, Prefilled) for event in self.bench.events[name]) == 1


SchedulerMachine.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestScheduler = SchedulerMachine.TestCase
