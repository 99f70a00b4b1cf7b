"""The sessions that are going on: what the next turn of each begins with, and how likely it comes soon.

A session is what a client calls by a name (`prompt_cache_key`), inside one namespace. Requests without a name belong
together when one begins with the whole prompt of the other: found by the id of that prompt's last full block, so a prompt
shorter than a block is remembered by name only.

Invariant: what is remembered stays within max_bytes; the session that was used least recently is forgotten first, never
one with a request that runs or waits. Threading: event loop only.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from appliance.request import GenerateRequest
from appliance.think_time import ThinkTime
from appliance.types import TOKEN_BYTES, BlockId, Namespace, Tokens

MAX_BYTES = 64 * 2**20
SESSION_BYTES = 1024
"""Of a session besides its tokens."""
SOON_S = 30.0
"""A turn within so many seconds is what a session is ranked by."""
RECENT = 256
"""Sessions that are ranked: the last used ones."""
UNLIKELY = 0.01
"""A lower chance is none."""


@dataclass(eq=False)
class Session:
    ns: Namespace
    name: str | None
    """What the client calls it."""
    tokens: Tokens = field(default_factory=Tokens)
    """What its next prompt will begin with."""
    prompt_tokens: int = 0
    """Of these, the latest prompt."""
    turns: int = 0
    running: int = 0
    """Requests that run or wait."""
    expected: bool = True
    """False: its next turn is a surprise."""
    used_s: float = 0.0
    """When a request came or ended."""
    think_time: ThinkTime = field(default_factory=ThinkTime)
    last_block: BlockId | None = None
    """The last full one of the latest prompt."""

    @property
    def nbytes(self) -> int:
        return len(self.tokens.data) + SESSION_BYTES

    def continued_by(self, prompt: Tokens) -> bool:
        size = self.prompt_tokens * TOKEN_BYTES
        return prompt.data[:size] == self.tokens.data[:size]


class Sessions:
    def __init__(
        self,
        names: Callable[[Namespace, Tokens], list[BlockId]],
        clock: Callable[[], float] = time.monotonic,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """`names`: ids of the full blocks of a sequence."""
        self._names = names
        self._clock = clock
        self._max_bytes = max_bytes
        self._used: OrderedDict[Session, None] = OrderedDict()  # least recently used first
        self._named: dict[tuple[Namespace, str], Session] = {}
        self._unnamed: dict[BlockId, dict[Session, None]] = {}
        """By the last full block of the latest prompt."""
        self._requests: dict[str, Session] = {}
        self.changes = 0
        """Grows whenever a session came, went on or was given up."""
        self._nbytes = 0

    # --- what happens to requests -----------------------------------------------------------------------------------

    def arrived(self, request: GenerateRequest) -> None:
        blocks = self._names(request.ns, request.prompt)
        session = self._of(request, blocks)
        if session is None:
            return
        now_s = self._clock()
        if not session.running:
            if session.turns:
                session.think_time.saw(now_s - session.used_s)
            session.turns += 1
            session.expected = True
        session.running += 1
        self._requests[request.request_id] = session
        self._remember(session, request.prompt, now_s)
        session.prompt_tokens = len(request.prompt)
        if session.name is None:
            self._forget_block(session)
            session.last_block = blocks[-1]
            self._unnamed.setdefault(blocks[-1], {})[session] = None

    def finished(self, request_id: str, sequence: Tokens) -> None:
        """Its answer is complete: `sequence` is the prompt with it."""
        session = self._requests.get(request_id)
        if session is not None:
            if session.continued_by(sequence):  # else a later turn has come already
                self._remember(session, sequence, self._clock())
            self.left(request_id)

    def left(self, request_id: str) -> None:
        """The request is over, however it ended; finished() may have said so."""
        session = self._requests.pop(request_id, None)
        if session is not None:
            session.running -= 1
            self._remember(session, session.tokens, self._clock())

    # --- what is known ----------------------------------------------------------------------------------------------

    def find(self, ns: Namespace, name: str) -> Tokens | None:
        """What the next prompt of this session will begin with. None: there is no such session in this namespace."""
        session = self._named.get((ns, name))
        return None if session is None else session.tokens

    def ranked(self) -> list[Session]:
        """Sessions whose next turn may come soon, the likeliest first; of equals the last used."""
        chances = {session: self.chance(session) for session in self.recent()}
        likely = [session for session, chance in chances.items() if chance >= UNLIKELY]
        return sorted(likely, key=lambda session: -chances[session])

    def recent(self) -> Iterator[Session]:
        """The last used first."""
        return islice(reversed(self._used), RECENT)

    def chance(self, session: Session) -> float:
        """That its next turn comes soon."""
        if session.running or not session.expected:
            return 0.0
        return session.think_time.chance(self.idle_s(session), SOON_S, session.turns)

    def idle_s(self, session: Session) -> float:
        return self._clock() - session.used_s

    def expect_none(self) -> None:
        """Of all that is known now, no next turn is expected."""
        self.changes += 1
        for session in self._used:
            session.expected = False

    def __len__(self) -> int:
        return len(self._used)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _of(self, request: GenerateRequest, blocks: list[BlockId]) -> Session | None:
        if request.session:
            session = self._named.get((request.ns, request.session))
            if session is None:
                session = self._named[request.ns, request.session] = Session(request.ns, request.session)
            return session
        for block in reversed(blocks):
            for session in reversed(self._unnamed.get(block, {})):
                if session.continued_by(request.prompt):
                    return session
        return Session(request.ns, None) if blocks else None

    def _remember(self, session: Session, tokens: Tokens, now_s: float) -> None:
        if session in self._used:
            self._nbytes -= session.nbytes
        self.changes += 1
        session.tokens, session.used_s = tokens, now_s
        self._nbytes += session.nbytes
        self._used[session] = None
        self._used.move_to_end(session)
        while self._nbytes > self._max_bytes:
            oldest = next((each for each in self._used if not each.running), None)
            if oldest is None:
                break
            self._forget(oldest)

    def _forget(self, session: Session) -> None:
        del self._used[session]
        self._nbytes -= session.nbytes
        if session.name is not None:
            del self._named[session.ns, session.name]
        self._forget_block(session)

    def _forget_block(self, session: Session) -> None:
        if session.last_block is not None:
            same = self._unnamed[session.last_block]
            del same[session]
            if not same:
                del self._unnamed[session.last_block]
            session.last_block = None
