"""Queue look-ahead: the blocks of who is next are in DRAM, and stay there, before the request's own load begins.

Invariant: what is held for all waiting requests together is within the budget, so that running ones always find slots;
what is held for a request is given back when its load begins or it leaves. One request is staged at a time, the nearest
first; more than the budget means the front part. Threading: event loop only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import islice

from appliance.engine.client import EngineClient
from appliance.errors import EngineError, frames_of
from appliance.kv.base import Hit, KVStore, Staged
from appliance.plan.cost import CostModel
from appliance.plan.planner import decide
from appliance.types import BlockId, Namespace, Tier, Tokens
from appliance.wanted import pieces_of, wanted

log = logging.getLogger(__name__)

IN_LINE = 4
"""Requests looked ahead for."""
BUDGET = 0.25
"""Of the pool's slots."""
LINGER_S = 0.02
"""Who waits no longer than this is not looked ahead for: its own load is as soon."""


@dataclass(frozen=True)
class StagedAhead:
    """What was done for a request while it waited."""

    tiers: Mapping[BlockId, Tier] = field(default_factory=dict)
    """Where its blocks were when it came."""
    tokens: int = 0
    """Brought into DRAM."""
    seconds: float = 0.0

    def __add__(self, later: StagedAhead) -> StagedAhead:
        tiers = {**later.tiers, **self.tiers}
        return StagedAhead(tiers, self.tokens + later.tokens, self.seconds + later.seconds)


@dataclass(eq=False)
class _Place:
    request_id: str
    ns: Namespace
    tokens: Tokens
    tiers: dict[BlockId, Tier] = field(default_factory=dict)
    wanted: list[Hit] | None = None
    """Not staged yet; None: nobody has looked."""
    runs: list[Staged] = field(default_factory=list)
    moved_tokens: int = 0
    seconds: float = 0.0

    @property
    def slots(self) -> int:
        return sum(len(run.slots) for run in self.runs)


class Ahead:
    def __init__(
        self, engine: EngineClient, store: KVStore, cost: CostModel, line: Callable[[], Iterable[str]]
    ) -> None:
        """`line`: the waiting requests, the next one first."""
        self._engine = engine
        self._store = store
        self._cost = cost
        self._line = line
        self._budget = int(BUDGET * store.pool.slots) if store.pool is not None else 0
        self._places: dict[str, _Place] = {}
        self._staging: tuple[_Place, asyncio.Task[None]] | None = None

    def join(self, request_id: str, ns: Namespace, tokens: Tokens) -> None:
        """It waits from now on, maybe again."""
        self.leave(request_id)
        if self._budget:
            self._places[request_id] = _Place(request_id, ns, tokens)
            asyncio.get_running_loop().call_later(LINGER_S, self._go_on)

    def leave(self, request_id: str) -> StagedAhead:
        """Its own load begins in this turn of the loop, or it is gone. Gives back what was held for it."""
        place = self._places.pop(request_id, None)
        if place is None:
            return StagedAhead()
        if self._staging is not None and self._staging[0] is place:
            self._staging[1].cancel()
        for run in place.runs:
            self._store.unpin(run)
        self._go_on()
        return StagedAhead(place.tiers, place.moved_tokens, place.seconds)

    def _go_on(self) -> None:
        """Stage for the nearest that wants more and has room."""
        if self._staging is not None:
            return
        room = self._budget
        for place in self._nearest():
            if room > place.slots and (place.wanted is None or place.wanted):
                task = asyncio.create_task(self._stage(place, room - place.slots))
                self._staging = place, task
                task.add_done_callback(self._staged)
                return
            room -= place.slots

    def _nearest(self) -> list[_Place]:
        in_line = islice(self._line(), IN_LINE)
        return [self._places[request_id] for request_id in in_line if request_id in self._places]

    def _staged(self, task: asyncio.Task[None]) -> None:
        assert self._staging is not None
        place, self._staging = self._staging[0], None
        if not task.cancelled() and (error := task.exception()):
            log.error("look-ahead failed: %s", frames_of(error))
            place.wanted = []
        self._go_on()

    async def _stage(self, place: _Place, room: int) -> None:
        if place.wanted is None:
            place.wanted = await self._look(place)
        asked = place.wanted[:room]
        self._make_room(place, len(asked))
        began_s = time.perf_counter()
        staged = 0
        try:
            async with aclosing(self._store.stage(place.ns, place.tokens, asked)) as runs:
                async for run in runs:
                    place.runs.append(run)
                    staged += len(run.hits)
                    if run.seconds:  # it was not in DRAM yet
                        place.moved_tokens += sum(hit.use_tokens for hit in run.hits)
        finally:
            place.seconds += time.perf_counter() - began_s
            place.wanted = place.wanted[staged:] if staged == len(asked) else []  # the rest cannot be had now

    async def _look(self, place: _Place) -> list[Hit]:
        """What its load would bring, as far as can be told before it has cells."""
        root = self._store.root(place.ns)
        resident = 0
        if self._engine.pid is not None:
            try:
                resident = await self._engine.resident(root, place.tokens)
            except EngineError:
                resident = 0  # it died: nothing is
        hits = self._store.lookup(place.ns, place.tokens).hits
        place.tiers = {hit.block: hit.tier for hit in hits}
        decision = decide(
            len(place.tokens), resident, pieces_of(hits), self._cost, both_ends=self._engine.info.layout.divisible
        )
        return wanted(hits, resident, decision)

    def _make_room(self, nearer: _Place, slots: int) -> None:
        """Those further back give up what does not fit any more, from their ends."""
        line = self._nearest()
        further = [place for place in self._places.values() if place not in line]
        if nearer in line:
            further += reversed(line[line.index(nearer) + 1 :])
        excess = sum(place.slots for place in self._places.values()) + slots - self._budget
        for place in further:
            while excess > 0 and place is not nearer and place.runs:
                run = place.runs.pop()
                excess -= len(run.slots)
                self._store.unpin(run)
                assert place.wanted is not None, "who has runs was looked at"
                place.wanted = [*run.hits, *place.wanted]
