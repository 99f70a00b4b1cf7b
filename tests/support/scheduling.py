"""A scheduler over the null engine, stepped by hand: what each decode held, what each request was told, slots as bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

from appliance.engine.base import EngineConfig, KVMode, Row
from appliance.engine.client import Done, Event, NewTokens
from appliance.engine.null import NullEngine
from appliance.engine.pace import Pace
from appliance.engine.request import Failed
from appliance.engine.roster import GROWTH_TOKENS, Roster
from appliance.engine.scheduler import Scheduler
from appliance.engine.transfer import SLICE_BLOCKS
from appliance.errors import EngineError
from appliance.types import SamplingParams, Tokens
from tests.support.engines import complete, greedy, null_config, null_engine, prefill

T = TypeVar("T")
SHARED_SLICE_BLOCKS = 2
"""Fixed here, where a step takes no time that says anything."""
NS = b"a namespace"
OWNER = b"an owner"


class SpiedEngine(NullEngine):
    """Keeps the rows of every decode that it did not refuse."""

    def __init__(self, config: EngineConfig, *, checkpoints: bool) -> None:
        super().__init__(config, checkpoints=checkpoints)
        self.batches: list[list[Row]] = []
        self.refuses: Callable[[Row], bool] = lambda row: False

    def decode(self, rows: Sequence[Row]) -> None:
        if any(map(self.refuses, rows)):
            raise EngineError("refused")
        super().decode(rows)
        self.batches.append(list(rows))


class Bench:
    def __init__(self, *, kv_mode: KVMode = KVMode.ROWS, growth_tokens: int = GROWTH_TOKENS, **config: Any) -> None:
        settings = null_config(**config)
        self.engine = SpiedEngine(settings, checkpoints=kv_mode is KVMode.CHECKPOINT)
        self.engine.info = replace(self.engine.info, kv_mode=kv_mode)
        self.slots: dict[int, bytearray] = {}
        self.events: dict[str, list[Event | Failed]] = defaultdict(list)
        self.roster = Roster(
            self.engine,
            slot=self.slot,
            emit=lambda request, event: self.events[request].append(event),
            growth_tokens=growth_tokens,
        )
        self.roster.transfers.slice_blocks = lambda step_s: SHARED_SLICE_BLOCKS if step_s else SLICE_BLOCKS  # type: ignore[method-assign]
        self.roster.transfers.resting = lambda: False  # type: ignore[method-assign]
        self.pace = Pace(settings.batch_tokens, settings.shared_batch_tokens, settings.prefill_share)
        self.scheduler = Scheduler(self.engine, self.roster, self.pace)

    def slot(self, index: int, nbytes: int) -> memoryview:
        if index < 0:
            raise EngineError("no such slot")
        slot = self.slots.setdefault(index, bytearray(self.engine.info.layout.slot_bytes))
        return memoryview(slot)[:nbytes]

    def step(self) -> bool:
        more = self.scheduler.step()
        self.check()
        return more

    def settle(self) -> None:
        """Step until there is nothing left to do."""
        for _ in range(10_000):
            if not self.step():
                return
        raise AssertionError("the scheduler does not come to rest")

    def check(self) -> None:
        books = self.roster.cells.residency
        books.check_integrity()
        assert self.engine.info.context_tokens - self.engine.free_cells == books.used
        claimed = sum(request.outstanding for request in self.roster._requests.values())
        assert self.engine.free_cells >= claimed, "admitted requests have their cells"

    def done(self, reply: Future[T]) -> T:
        """The answer to a command, after as many steps as it needs."""
        self.settle()
        return reply.result(timeout=0)

    # --- what tests do most -------------------------------------------------------------------------------------

    def begin(self, request: str, tokens: Tokens, reserve_tokens: int = 8, ns: bytes = NS, owner: bytes = OWNER) -> int:
        return self.roster.begin(request, ns, tokens, reserve_tokens, owner)

    def run(self, request: str, max_tokens: int = 8, **sampling: Any) -> None:
        reply = self.scheduler.run_request(request, greedy(max_tokens, **sampling))
        reply.add_done_callback(lambda done: done.result())

    def start(self, request: str, tokens: Tokens, max_tokens: int = 8, **sampling: Any) -> None:
        self.begin(request, tokens, max(max_tokens, 1))
        self.run(request, max_tokens, **sampling)

    def release(self, *requests: str) -> None:
        for request in requests:
            self.scheduler.release(request)

    def stored(self, tokens: Tokens, first_slot: int = 1000) -> list[tuple[int, int, int]]:
        """Compute and export elsewhere: what a restore of all of `tokens` is told. Slots from first_slot on."""
        layout = self.engine.info.layout
        engine = NullEngine(
            null_config(block_tokens=layout.block_tokens, context_tokens=len(tokens)), checkpoints=not layout.divisible
        )
        blocks = []
        for i, start in enumerate(range(0, len(tokens), layout.block_tokens)):
            part = tokens[start : start + layout.block_tokens]
            prefill(engine, 0, part, start)
            engine.export(0, start, [(len(part), self.slot(first_slot + i, layout.payload_bytes(len(part))))])
            blocks.append((first_slot + i, len(part), len(part)))
        return blocks

    # --- what came of it ----------------------------------------------------------------------------------------

    def tokens(self, request: str) -> list[int]:
        return [token for event in self.events[request] if isinstance(event, NewTokens) for token in event.tokens]

    def text(self, request: str) -> str:
        return "".join(event.text for event in self.events[request] if isinstance(event, NewTokens))

    def end(self, request: str) -> Done | Failed | None:
        """The one end of the request; None if it has not ended."""
        ends = [event for event in self.events[request] if isinstance(event, (Done, Failed))]
        assert len(ends) <= 1, "a request ends once"
        assert not ends or self.events[request][-1] is ends[0], "nothing follows the end"
        return ends[0] if ends else None

    def rows_of(self, prompt: Tokens) -> list[Row]:
        """Prefill rows of this prompt, told from others by its tokens."""
        return [row for row in self.rows() if prompt[row.start : row.start + len(row.tokens)] == row.tokens]

    def rows(self) -> Iterable[Row]:
        return (row for batch in self.engine.batches for row in batch)


@cache
def reference(tokens: Tokens, n_tokens: int, params: SamplingParams | None = None) -> list[int]:
    """The greedy completion of a prompt that has an engine to itself."""
    engine = null_engine(context_tokens=len(tokens) + n_tokens)
    prefill(engine, 0, tokens)
    return complete(engine, 0, len(tokens), n_tokens, params)
