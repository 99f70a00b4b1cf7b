"""Eviction by what a block would cost to compute again: greedy dual, with queues of equal worth.

A block is worth the cost of a token at its depth, against that of a first token, times the root of its uses (a session
that ended was used often, too); every byte of KV holds as much of a token, so this is the worth per byte. It goes when the clock, the priority of what went last, would
reach its own: the clock at its last use plus its worth. Worth is rounded to steps of sqrt(2), one queue each; in a queue
the order of use is the order of priority, so a touch is O(1) and eviction looks at the heads only.

Invariant: a block's priority never falls, and after a touch is not below that of any deeper block of the prefix.
Threading: as its owner's.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Sequence
from heapq import heapify, heappop, heappushpop

from appliance.kv.policy import NEW, EvictionPolicy, Name, Standing

TokenSeconds = Callable[[int], float]
"""Seconds that the token at this position takes to compute."""

MOST_USES = 1024
"""More make no difference."""
_STEPS = 2
"""Queues for a doubling of worth."""
_QUEUES = 64
_WORTH = [2 ** (n / _STEPS) for n in range(_QUEUES)]
_STEPS_OF_USES = [round(_STEPS * math.log2(1 + uses) / 2) for uses in range(MOST_USES + 1)]
_MOST_STEPS_OF_DEPTH = _QUEUES - 1 - _STEPS_OF_USES[-1]


class _Block:
    __slots__ = ("clock", "depth_steps", "parent", "queue", "uses")

    def __init__(self, parent: object, depth_steps: int, queue: int, uses: int, clock: float) -> None:
        self.parent = parent
        self.depth_steps = depth_steps
        self.queue = queue
        self.uses = uses
        self.clock = clock


class CostAware(EvictionPolicy[Name]):
    def __init__(self, token_s: TokenSeconds) -> None:
        self._token_s = token_s
        self._depth_steps: dict[int, int] = {}
        self._blocks: dict[Name, _Block] = {}
        self._queues: list[OrderedDict[Name, _Block]] = [OrderedDict() for _ in range(_QUEUES)]
        self._clock = 0.0

    def add(self, block: Name, parent: Name, start: int, standing: Standing = NEW) -> None:
        self.remove(block)
        depth_steps = self._depth_steps.get(start)
        if depth_steps is None:
            depth_steps = self._depth_steps[start] = self._steps_of(start)
        uses = min(standing.uses, MOST_USES)
        if standing is not NEW:  # blocks come back in the order of their last use
            self._clock = max(self._clock, standing.clock)
        queue = max(depth_steps + _STEPS_OF_USES[uses], standing.floor)
        self._blocks[block] = self._queues[queue][block] = _Block(parent, depth_steps, queue, uses, self._clock)

    def touch(self, blocks: Sequence[Name], *, counts: bool = True) -> list[Name]:
        known, queues, clock = self._blocks, self._queues, self._clock
        block = next((block for block in reversed(blocks) if block in known), None)
        touched: list[Name] = []
        floor = 0
        while block is not None and (held := known.get(block)) is not None:
            if counts and held.uses < MOST_USES:
                held.uses += 1
            queue, now = held.depth_steps + _STEPS_OF_USES[held.uses], held.queue
            floor = queue = max(queue, now, floor)
            if queue == now:
                queues[queue].move_to_end(block)
            else:
                del queues[now][block]
                queues[queue][block] = held
                held.queue = queue
            held.clock = clock
            touched.append(block)
            block = held.parent  # type: ignore[assignment]
        return touched

    @property
    def clock(self) -> float:
        return self._clock

    def standing(self, block: Name) -> Standing:
        held = self._blocks[block]
        return Standing(held.uses, held.clock, held.queue)

    def remove(self, block: Name) -> None:
        held = self._blocks.pop(block, None)
        if held is not None:
            del self._queues[held.queue][block]

    def evict(self, n: int, protected: Container[Name] = ()) -> list[Name]:
        chosen: list[Name] = []
        priority = self._clock
        for first, block in self._by_priority(protected):
            if len(chosen) == n:
                break
            chosen.append(block)
            priority = first
        if len(chosen) < n:
            return []
        self._clock = max(self._clock, priority)
        return chosen

    def _by_priority(self, protected: Container[Name]) -> Iterator[tuple[float, Name]]:
        """Evictable blocks, the next to go first: the heads of the queues compete, and the first one's queue goes on."""
        heads = []
        for number, queue in enumerate(self._queues):
            rest = iter(queue.items())
            for block, held in rest:
                if block not in protected:
                    heads.append((held.clock + _WORTH[number], number, block, rest))
                    break
        heapify(heads)
        while heads:
            head = heappop(heads)
            while True:
                priority, number, block, rest = head
                yield priority, block
                for block, held in rest:
                    if block not in protected:
                        head = heappushpop(heads, (held.clock + _WORTH[number], number, block, rest))
                        break
                else:
                    break

    def oldest_first(self, protected: Container[Name] = ()) -> Iterator[Name]:
        return (block for _, block in self._by_priority(protected))

    def heads(self) -> Iterator[Name]:
        return (next(iter(queue)) for queue in self._queues if queue)

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block: object) -> bool:
        return block in self._blocks

    def _steps_of(self, start: int) -> int:
        first_s, token_s = self._token_s(0), self._token_s(start)
        dearer = token_s / first_s if first_s > 0 else 1.0
        return min(max(0, round(_STEPS * math.log2(dearer))) if dearer > 0 else 0, _MOST_STEPS_OF_DEPTH)
