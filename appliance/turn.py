"""One request's place in the queue, and who of a tenant's requests goes next.

Who has least to compute goes first: a question about a context that is known does not wait for the reading of another
one. And one long prompt is read at a time, unless the other is much longer: read side by side none is ready sooner, and the
cells of those that wait inside the engine are missing to everybody else. Invariant: nobody is overtaken more than OVERTAKEN
times by those who came later. Event loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

OVERTAKEN = 4
LONG_TOKENS = 512
"""To compute: more than a batch or two."""
MUCH_SHORTER = 0.5


@dataclass(eq=False)
class Turn:
    """One request's place: it waits, holds its turn, may be put back, and leaves."""

    number: int
    """In the order in which requests came."""
    request_id: str
    tenant: str
    expected: int
    """Tokens it will be charged for, as far as is known and not charged yet."""
    alone: bool = False
    """It may only run when nothing else does."""
    since_s: float = 0.0
    """When it began to wait, or was given the turn."""
    granted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    cancelled: bool = False
    overtaken: int = 0
    """Times that somebody of its tenant who came later went before it."""
    reading: int = 0
    """Of a long prompt whose turn it is: tokens to compute, until its first token."""
    computing: bool = False
    """It can be preempted: the engine is computing it, and was not asked yet."""

    def reads(self, tokens: int) -> None:
        """Its turn has come, and so many are left to compute."""
        self.reading = tokens if tokens > LONG_TOKENS else 0

    def waits_for(self, held: Iterable[Turn]) -> bool:
        """Whether a long prompt is being read that this one should not be read beside."""
        if self.expected <= LONG_TOKENS:
            return False
        return any(other.reading and self.expected > MUCH_SHORTER * other.reading for other in held)


def in_order(queue: Sequence[Turn]) -> Iterator[Turn]:
    """One tenant's waiting requests in the order of their turns, if nobody comes or goes."""
    left = sorted(queue, key=lambda turn: turn.number)
    overtaken = {turn: turn.overtaken for turn in left}
    while left:
        owed = next((turn for turn in left if overtaken[turn] >= OVERTAKEN), None)
        chosen = owed or min(left, key=lambda turn: (turn.expected, turn.number))
        yield chosen
        left.remove(chosen)
        for turn in left:
            overtaken[turn] += turn.number < chosen.number
