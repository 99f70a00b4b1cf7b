"""Who computes next: a queue that is fair between tenants.

A tenant is charged, in tokens, for what its requests take: a computed token counts once, a generated one GENERATED times,
a loaded one nothing. The next turn is of the tenant that was charged least; turn.py says whose inside a tenant. A tenant
that had nothing waiting starts at the level of those who have: it can neither save up nor be punished.

Invariant: at most max_running turns are held, one of them at most waits for cells; no more requests wait than max_queue,
besides those that were put back. While a request waits, no other tenant is charged more than the two levels differ,
plus one request. Threading: event loop only.
"""

from __future__ import annotations

import asyncio
import time
from bisect import insort
from collections.abc import Callable, Iterator

from appliance.errors import Overloaded
from appliance.turn import Turn, in_order

GENERATED = 4
"""What a generated token is charged: it takes a step of its own, a computed one a part of a batch."""
RETRY_AFTER_S = (1.0, 120.0)
"""Least and most that a refused client is told to wait."""
FIRST_SERVICE_S = 2.0
"""How long a turn is thought to last before any ended."""
SMOOTHING = 0.2


class Turns:
    def __init__(self, max_running: int, max_queue: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_running = max_running
        self._max_queue = max_queue
        self._clock = clock
        self._queues: dict[str, list[Turn]] = {}
        """Of tenants with waiting requests only, as they came, also when they were put back."""
        self._entered = 0
        self._held: dict[Turn, None] = {}
        """In the order of the grants."""
        self._admitting: Turn | None = None
        """Holds a turn and waits for cells."""
        self._levels: dict[str, int] = {}
        """What each tenant was charged. Every tenant seen since start."""
        self._service_s = FIRST_SERVICE_S

    @property
    def running(self) -> int:
        return len(self._held)

    @property
    def waiting(self) -> int:
        return sum(map(len, self._queues.values()))

    @property
    def waiting_tenants(self) -> int:
        return len(self._queues)

    @property
    def crowded(self) -> bool:
        """Somebody waits, for a turn or for cells."""
        return bool(self._queues) or self._admitting is not None

    @property
    def settled(self) -> bool:
        """Nobody waits, and who holds a turn has its blocks."""
        return not self.crowded and all(turn.computing for turn in self._held)

    def is_waiting(self, turn: Turn) -> bool:
        return turn in self._queues.get(turn.tenant, ())

    def retry_after_s(self) -> float:
        """When a client that comes now may find a place: turns end as fast as they did lately."""
        least, most = RETRY_AFTER_S
        return min(max(self._service_s * (self.waiting + 1) / max(self.running, 1), least), most)

    # --- a request's way -------------------------------------------------------------------------------------------

    def enter(self, request_id: str, tenant: str, expected: int, *, alone: bool) -> Turn:
        """A place at the end of its tenant's queue. Overloaded if there is none."""
        free_turns = self._max_running - len(self._held)
        free = self._max_queue - max(0, self.waiting - free_turns)
        if self.waiting >= free_turns and free <= 0:
            raise self._refused(f"{self.waiting} requests are waiting already")
        own = max(0, len(self._queues.get(tenant, ())) - free_turns)
        if own >= free > 0 and self._levels.keys() - {tenant}:
            raise self._refused(f"{own} of your requests are waiting already")  # what is left is for the others
        if tenant not in self._queues:
            self._levels[tenant] = max(self._levels.get(tenant, 0), self._level())
        self._entered += 1
        turn = Turn(self._entered, request_id, tenant, expected, alone)
        self._wait(turn)
        return turn

    async def wait(self, turn: Turn) -> None:
        """Until it is this one's turn. Overloaded if it was cancelled."""
        await asyncio.shield(turn.granted)

    def has_cells(self, turn: Turn) -> None:
        """The engine admitted it: the next one may wait for cells."""
        if self._admitting is turn:
            self._admitting = None
            self._grant()

    def expect(self, turn: Turn, tokens: int) -> None:
        """What is left to compute is known now, and charged."""
        turn.expected = 0
        turn.reads(tokens)
        self.charge(turn, tokens)
        self._grant()

    def computes(self, turn: Turn) -> None:
        """From now on it may have to make room."""
        turn.computing = True

    def has_read(self, turn: Turn) -> None:
        """Its first token is there: another long prompt may be read."""
        if turn.reading:
            turn.reading = 0
            self._grant()

    def charge(self, turn: Turn, tokens: int) -> None:
        self._levels[turn.tenant] += tokens

    def put_back(self, turn: Turn, expected: int, *, alone: bool = False) -> None:
        """It gives up its turn and waits again, in the place that it had by its number."""
        self._let_go(turn)
        turn.expected, turn.alone = expected, turn.alone or alone
        turn.granted = asyncio.get_running_loop().create_future()
        self._wait(turn)

    def cancel(self, turn: Turn) -> None:
        """It gets no turn any more. What a turn it holds is used for is not touched."""
        turn.cancelled = True
        if self.is_waiting(turn):
            self._leave_queue(turn)
            turn.granted.set_exception(self._gone())
            self._grant()

    def leave(self, turn: Turn) -> None:
        """The request is over, wherever it is."""
        if turn in self._held:
            self._service_s += SMOOTHING * (self._clock() - turn.since_s - self._service_s)
            self._let_go(turn)
        elif self.is_waiting(turn):
            self._leave_queue(turn)
        self._grant()

    # --- who is next -----------------------------------------------------------------------------------------------

    def line(self) -> Iterator[Turn]:
        """Who will be next, as far as can be told now: first the one that waits for cells."""
        if self._admitting is not None:
            yield self._admitting
        levels = {tenant: self._key(tenant) for tenant in self._queues}
        orders = {tenant: in_order(queue) for tenant, queue in self._queues.items()}
        heads = {tenant: next(order) for tenant, order in orders.items()}
        while heads:
            tenant = min(heads, key=lambda name: (levels[name], heads[name].number))
            turn = heads.pop(tenant)
            yield turn
            levels[tenant] += turn.expected
            if (following := next(orders[tenant], None)) is not None:
                heads[tenant] = following

    def overdue(self, patience_s: float) -> Turn | None:
        """Who must make room: another tenant's request waited longer, and this one's tenant was served more.

        The latest turn of the tenant that was charged most, if that stays ahead of the one that waits. It is marked.
        """
        first = next(self.line(), None)
        if first is None or first.alone or self._clock() - first.since_s < patience_s:
            return None
        bar = self._levels[first.tenant] + first.expected
        ahead = [
            turn
            for turn in self._held
            if turn.computing and turn.tenant != first.tenant and self._levels[turn.tenant] > bar
        ]
        if not ahead:
            return None
        most = max(self._levels[turn.tenant] for turn in ahead)
        victim = [turn for turn in ahead if self._levels[turn.tenant] == most][-1]
        victim.computing = False
        return victim

    def _level(self) -> int:
        """Where a tenant begins that had nothing waiting. While nobody waits, nobody is owed anything."""
        if self._queues:
            return min(self._levels[tenant] for tenant in self._queues)
        return max((self._levels[turn.tenant] for turn in self._held), default=max(self._levels.values(), default=0))

    def _key(self, tenant: str) -> int:
        """What the tenant was charged, and what its turns will be charged yet."""
        return self._levels[tenant] + sum(turn.expected for turn in self._held if turn.tenant == tenant)

    def _wait(self, turn: Turn) -> None:
        if turn.cancelled:
            turn.granted.set_exception(self._gone())
            return
        turn.since_s = self._clock()
        insort(self._queues.setdefault(turn.tenant, []), turn, key=lambda each: each.number)
        self._grant()

    def _grant(self) -> None:
        while self._queues and self._admitting is None and len(self._held) < self._max_running:
            turn = self._next()
            if turn is None:
                return
            self._leave_queue(turn)
            for other in self._queues.get(turn.tenant, ()):
                other.overtaken += other.number < turn.number
            self._held[turn] = None
            turn.reads(turn.expected)
            self._admitting = turn
            turn.since_s = self._clock()
            turn.granted.set_result(None)

    def _next(self) -> Turn | None:
        """The first in line that may begin beside those who hold a turn."""
        for turn in self.line():
            if self._held and (turn.alone or any(held.alone for held in self._held)):
                return None
            if not turn.waits_for(self._held):
                return turn
        return None

    def _leave_queue(self, turn: Turn) -> None:
        queue = self._queues[turn.tenant]
        queue.remove(turn)
        if not queue:
            del self._queues[turn.tenant]

    def _let_go(self, turn: Turn) -> None:
        self._held.pop(turn, None)
        turn.computing, turn.reading = False, 0
        if self._admitting is turn:
            self._admitting = None

    def _refused(self, why: str) -> Overloaded:
        return Overloaded(f"{why}; try again later", retry_after_s=self.retry_after_s())

    def _gone(self) -> Overloaded:
        return Overloaded("cancelled while it waited", retry_after_s=self.retry_after_s(), status=503)
