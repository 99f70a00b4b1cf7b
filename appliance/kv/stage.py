"""One staging: consecutive hits brought into DRAM slots and handed over in order, several reads ahead.

Invariant: what is handed over is verified, readable and pinned; never more slots are pinned than the pool can spare, so
a context larger than the pool streams through it and exports always find a slot. Threading: event loop only.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Container, Sequence
from dataclasses import dataclass, field

from appliance.kv.base import Hit, Staged
from appliance.kv.below import Below
from appliance.kv.index import IndexEntry
from appliance.kv.keys import block_id
from appliance.kv.patience import Patience
from appliance.kv.tiers.base import Extent
from appliance.kv.tiers.dram import DramTable, Entry, SlotState
from appliance.kv.tiers.sealed import Loaded, Plain
from appliance.types import BlockId, Namespace, Tokens


@dataclass
class _Run:
    hits: list[Hit] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    load: asyncio.Task[Loaded] | None = None
    """None: in DRAM, or being brought there by somebody else."""


@dataclass(frozen=True)
class Limits:
    read_bytes: int
    """Of one coalesced read."""
    reads_ahead: int


class Stage:
    def __init__(
        self,
        dram: DramTable,
        below: Below | None,
        plain: Callable[[Entry], Plain],
        limits: Limits,
        *,
        ns: Namespace,
        hash_key: bytes,
        tokens: Tokens,
        hits: Sequence[Hit],
        sparing: Container[BlockId] | None,
        used_us: int,
    ) -> None:
        self._dram = dram
        self._below = below
        self._plain = plain
        self._limits = limits
        self._ns = ns
        self._hash_key = hash_key
        self._tokens = tokens
        self._sparing = sparing
        self._used_us = used_us
        self._plan = deque(hits)
        self._issued: deque[_Run] = deque()

    async def runs(self) -> AsyncGenerator[Staged, None]:
        try:
            while self._plan or self._issued:
                self._issue()
                if self._issued:
                    staged, complete = await self._arrived(self._issued[0])
                    if staged is not None:
                        self._issued.popleft()
                        yield staged
                    if not complete:
                        return
                elif self._plan and self._sparing is not None:
                    return  # no slot is to spare
                elif self._plan and not await Patience().wait(self._dram.change()):
                    return  # every slot is held by a read that does not end
        finally:
            for run in self._issued:
                self._release(run)

    def _issue(self) -> None:
        """Pin and read ahead as far as limits, slots and pins allow."""
        while self._plan and len(self._issued) < self._limits.reads_ahead:
            in_dram = self._dram.get(self._plan[0].block) is not None
            run = self._take_present() if in_dram else self._take_below()
            if not run.hits:
                return
            self._issued.append(run)

    def _take_present(self) -> _Run:
        """The longest run that is readable now, or one block that will be."""
        run = _Run()
        while self._plan and (entry := self._dram.get(self._plan[0].block)) is not None:
            if not self._dram.may_pin(entry, self._ns.tenant) or (run.hits and not entry.state.readable):
                break
            self._dram.pin(entry)
            run.hits.append(self._plan.popleft())
            run.entries.append(entry)
            if not entry.state.readable:
                break
        return run

    def _take_below(self) -> _Run:
        """Start the read of the next adjacent records. An empty run: no slot is free now, or the plan ends here."""
        run = _Run()
        window = [hit for hit, _ in zip(self._plan, range(32), strict=False)]
        found = (
            self._below.entries(hit.block for hit in window) if self._below and self._below.loads.breaker.allows else {}
        )
        extents: list[Extent] = []
        for hit in window:
            at = found.get(hit.block)
            if self._dram.get(hit.block) is not None or (run.hits and not self._continues(run, extents, hit, at)):
                break
            if at is None:
                break
            if not self._dram.has_room(self._ns.tenant, self._sparing) or not self._dram.may_pin(None, self._ns.tenant):
                return self._start(run, extents)
            tokens = self._tokens_of(hit)
            if tokens is None:
                break
            state = SlotState.LOADING
            entry = self._dram.put(
                self._ns, hit.block, hit.parent, hit.start, tokens, state, self._used_us, self._sparing
            )
            self._dram.pin(entry)
            run.hits.append(self._plan.popleft())
            run.entries.append(entry)
            extents.append(at.extent)
        if not run.hits:
            self._plan.clear()
        return self._start(run, extents)

    def _continues(self, run: _Run, extents: Sequence[Extent], hit: Hit, at: IndexEntry | None) -> bool:
        """Whether one read may go on from what the run has to this record."""
        assert self._below is not None
        if at is None or at.extent.segment != extents[-1].segment or at.extent.offset != extents[-1].end:
            return False
        suspect = not self._below.loads.suspects.isdisjoint((run.hits[0].block, hit.block))
        return not suspect and at.extent.end - extents[0].offset <= self._limits.read_bytes

    def _start(self, run: _Run, extents: list[Extent]) -> _Run:
        if run.hits:
            assert self._below is not None
            loading = self._below.loads.load([self._plain(entry) for entry in run.entries], extents)
            run.load = self._below.tasks.spawn(self._finish(run, loading))
        return run

    async def _finish(self, run: _Run, loading: Awaitable[Loaded]) -> Loaded:
        """Lives on when the staging ends early: others may wait for the same blocks."""
        opened = 0
        try:
            loaded = await loading
            opened = loaded.opened
        finally:
            for n, entry in enumerate(run.entries):
                if n < opened:
                    self._dram.set_state(entry, SlotState.CLEAN)
                else:
                    self._dram.drop(entry)
            if opened:
                self._dram.policy.touch([run.entries[opened - 1].block], counts=False)
        return loaded

    async def _arrived(self, run: _Run) -> tuple[Staged | None, bool]:
        """What of the run is there, and whether that is all of it."""
        if run.entries[0].state is SlotState.LOADING:
            assert self._below is not None
            if not await self._below.loads.answered(run.load or run.entries[0].ready):
                return None, False
        if run.load is not None:
            loaded = await asyncio.shield(run.load)
            good, seconds = loaded.opened, loaded.seconds
        else:
            ready = [entry.state.readable or await asyncio.shield(entry.ready) for entry in run.entries]
            good, seconds = ready.count(True), 0.0
        if not good:
            return None, False
        hits = tuple(run.hits[:good])
        slots = tuple(entry.slot for entry in run.entries[:good])
        nbytes = sum(hit.payload_bytes for hit in hits)
        return Staged(hits, slots, nbytes, seconds), good == len(run.hits)

    def _tokens_of(self, hit: Hit) -> Tokens | None:
        """What the record must hold; None if the hit was not found for this sequence."""
        tokens: Tokens | None = self._tokens[hit.start : hit.start + hit.n_tokens]
        if hit.use_tokens < hit.n_tokens:
            assert self._below is not None
            tokens = self._below.child_tokens(hit.parent, hit.block)
        if tokens is None or block_id(self._hash_key, hit.parent, tokens) != hit.block:
            return None
        return tokens

    def _release(self, run: _Run) -> None:
        for entry in run.entries:
            if self._dram.get(entry.block) is entry:
                self._dram.unpin(entry)
