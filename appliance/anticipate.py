"""Prefetch that nobody asks for: what the next turns of the likeliest sessions need is brought into DRAM, and stays there.

The sessions are ranked by how likely their next turn comes soon. In that order their blocks, but those the engine holds,
are staged and pinned until the budget is used up.

Invariant: pinned for all sessions together is the budget at most, and nothing while a request waits. Blocks of requests
that run are not evicted for it, nor those of a session ranked higher. It moves blocks only while every running request
has its own, a few at a time; a tier that fails or is slow is left alone for longer and longer. Threading: event loop only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from appliance.errors import EngineError, frames_of
from appliance.kv.base import Hit, Staged
from appliance.look import where
from appliance.prefetch import in_use
from appliance.runtime import Runtime
from appliance.sessions import Session
from appliance.types import BlockId, Tokens

log = logging.getLogger(__name__)

PERIOD_S = 0.5
SETTLED_S = (1.0, 8.0)
"""First and longest time until all is looked at again after nothing was missing: only chances change meanwhile."""
IN_VIEW = 16
"""Sessions looked at: the likeliest ones."""
SLICE_BYTES = 16 * 2**20
"""Moved before it looks again whether a request came."""
SLOW_S = 2.0
"""A slice that takes longer is of a tier that has enough to do."""
REST_S = (2.0, 60.0)
"""First and longest rest after a tier failed or was slow."""


@dataclass(eq=False)
class _Hold:
    """What is pinned for a session: the leading ones of the blocks it will need."""

    runs: list[Staged] = field(default_factory=list)

    @property
    def blocks(self) -> list[BlockId]:
        return [hit.block for run in self.runs for hit in run.hits]


@dataclass(frozen=True)
class _Share:
    """What a session gets of the budget."""

    session: Session
    tokens: Tokens
    hits: Sequence[Hit]


class Anticipation:
    def __init__(self, runtime: Runtime, budget: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`budget`: slots of the pool; 0 turns it off."""
        self._runtime = runtime
        self._budget = budget
        self._clock = clock
        self._holds: dict[Session, _Hold] = {}
        self._rest_s = REST_S[0]
        self._rests_until_s = 0.0
        self._staged = 0
        """Runs, since start."""
        self._changes = -1
        """Of the sessions, when nothing was missing."""
        self._settled_s = SETTLED_S[0]
        self._settled_until_s = 0.0

    async def run(self) -> None:
        """Until it is cancelled."""
        if not self._budget:
            return
        try:
            while True:
                await asyncio.sleep(PERIOD_S)
                try:
                    await self.step()
                except EngineError:
                    pass  # it is started again; what is in its cells is not known now
                except Exception as error:  # noqa: BLE001 - a bug of ours must not end it
                    log.error("automatic prefetch: %s", frames_of(error))
                    self._rest()
        finally:
            self._let_go(list(self._holds))

    async def step(self) -> None:
        """Look once: let go of what is not needed or in the way, and bring up what is missing."""
        if self._runtime.turns.crowded or self._runtime.draining:
            self._let_go(list(self._holds))
            self._changes = -1
            return
        ranked = self._runtime.sessions.ranked()
        self._expire(set(ranked))
        if not self._works() or self._is_settled():
            return
        changes, staged = self._runtime.sessions.changes, self._staged
        shares = await self._shares(ranked[:IN_VIEW])
        kept = {share.session: {hit.block for hit in share.hits} for share in shares}
        self._let_go(
            [session for session, hold in self._holds.items() if not kept.get(session, set()).issuperset(hold.blocks)]
        )
        for share in shares:
            if not await self._bring(share):
                return
        self._settle(changes, moved=self._staged > staged)

    def _is_settled(self) -> bool:
        return self._runtime.sessions.changes == self._changes and self._clock() < self._settled_until_s

    def _settle(self, changes: int, *, moved: bool) -> None:
        """Nothing was missing, or is any more."""
        again = changes == self._changes and not moved
        self._settled_s = min(2 * self._settled_s, SETTLED_S[1]) if again else SETTLED_S[0]
        self._settled_until_s = self._clock() + self._settled_s
        self._changes = changes

    def forget(self) -> None:
        """Nothing is held, nor expected of the sessions known now before their next turn."""
        self._runtime.sessions.expect_none()
        self._let_go(list(self._holds))

    def _works(self) -> bool:
        return self._runtime.turns.settled and self._clock() >= self._rests_until_s

    async def _shares(self, ranked: Sequence[Session]) -> list[_Share]:
        """The budget, dealt out in the order of rank. A block that several sessions need is paid for once."""
        paid: set[BlockId] = set()
        shares: list[_Share] = []
        for session in ranked:
            tokens = session.tokens
            resident, lookup = await where(self._runtime, session.ns, tokens)
            needed = [hit for hit in lookup.hits if hit.start + hit.use_tokens > resident]
            affordable = 0
            for hit in needed:
                if len(paid) == self._budget:
                    break
                paid.add(hit.block)
                affordable += 1
            shares.append(_Share(session, tokens, needed[:affordable]))
            if len(paid) == self._budget:
                break
        return shares

    async def _bring(self, share: _Share) -> bool:
        """False if it is not the time to go on."""
        hold = self._holds.get(share.session, _Hold())
        missing = list(share.hits)
        if [hit.block for hit in missing[: len(hold.blocks)]] == hold.blocks:
            missing = missing[len(hold.blocks) :]
        else:
            self._let_go([share.session])
            hold = _Hold()
        while missing:
            if not self._works() or share.session.running:
                return False
            several = max(1, SLICE_BYTES // max(missing[0].payload_bytes, 1))
            self._holds[share.session] = hold
            if not await self._stage(share, hold, missing[:several]):
                return False
            del missing[:several]
        return True

    async def _stage(self, share: _Share, hold: _Hold, hits: Sequence[Hit]) -> bool:
        began_s, came = self._clock(), 0
        staging = self._runtime.prefetched.stage(share.session.ns, share.tokens, hits, in_use(self._runtime))
        async with aclosing(staging) as runs:
            async for staged in runs:
                if self._holds.get(share.session) is not hold:  # let go meanwhile
                    self._runtime.store.unpin(staged)
                    return False
                hold.runs.append(staged)
                self._staged += 1
                came += len(staged.hits)
        if came < len(hits) or self._clock() - began_s > SLOW_S:
            self._rest()
            return False
        self._rest_s = REST_S[0]
        return True

    def _rest(self) -> None:
        self._rests_until_s = self._clock() + self._rest_s
        self._rest_s = min(2 * self._rest_s, REST_S[1])

    def _expire(self, ranked: set[Session]) -> None:
        """Let go of sessions that run, or are not expected any more."""
        gone = [session for session in self._holds if session not in ranked]
        for session in gone:
            if not session.running:
                self._runtime.prefetched.expired(self._holds[session].blocks)
        self._let_go(gone)

    def _let_go(self, sessions: Sequence[Session]) -> None:
        for session in sessions:
            for run in self._holds.pop(session, _Hold()).runs:
                self._runtime.store.unpin(run)
