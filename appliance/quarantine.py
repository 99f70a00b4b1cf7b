"""Which contents were in the engine when it died, so that the same one does not crash it for ever.

Whoever was in the engine at a crash is a suspect. A suspect is tried again alone, so that a second crash condemns it and
nobody else; an answer clears it. Invariants: a crash counts once; it counts against the suspects in the engine if there
are any, else against all who are there. Contents are remembered by a digest under a key of this process, the latest few
of them, and are not even digested before anything crashed. Threading: event loop only.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from appliance.engine.client import EngineClient
from appliance.errors import RequestError

CRASHES = 2
"""So many, and the content is refused."""
ENTRIES = 1024

Content = Callable[[], bytes]
"""What would be sent to the engine, made when it is looked at."""


@dataclass(eq=False)
class Stay:
    """Something that is in the engine now."""

    content: Content
    generation: int
    """Of the engine process it is in, or will be when there is one."""


class Quarantine:
    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._key = os.urandom(32)
        self._crashes: dict[bytes, int] = {}
        self._inside: set[Stay] = set()
        self._counted = 0
        """The last generation whose crash was counted."""
        self._alone = asyncio.Lock()

    def check(self, content: Content) -> None:
        """RequestError if it is refused."""
        if self._crashes_of(content) >= CRASHES:
            raise RequestError("this request crashed the engine twice and is refused", code="quarantined", status=422)

    def suspects(self, content: Content) -> bool:
        return self._crashes_of(content) > 0

    def clear(self, content: Content) -> None:
        """It was answered."""
        if self._crashes:
            self._crashes.pop(self._digest(content), None)

    @asynccontextmanager
    async def inside(self, content: Content, generation: int | None = None) -> AsyncGenerator[Stay, None]:
        """While this content is in the engine: a suspect without any other suspect.

        `generation`: of the engine process that knows it already; None if it is new.
        """
        if self.suspects(content):
            async with self._alone:
                with self._staying(content, generation) as stay:
                    yield stay
        else:
            with self._staying(content, generation) as stay:
                yield stay

    def crashed(self, stay: Stay) -> bool:
        """Its engine died. False if that never came to life: it says nothing of who waited for it."""
        if stay.generation > self._engine.generation:
            return False
        if stay.generation > self._counted:
            self._counted = stay.generation
            there = {self._digest(each.content) for each in self._inside if each.generation == stay.generation}
            for digest in there & self._crashes.keys() or there:
                self._count(digest)
        return True

    @contextmanager
    def _staying(self, content: Content, generation: int | None) -> Generator[Stay, None, None]:
        if generation is None:
            generation = self._engine.generation + (self._engine.pid is None)
        stay = Stay(content, generation)
        self._inside.add(stay)
        try:
            yield stay
        finally:
            self._inside.discard(stay)

    def _crashes_of(self, content: Content) -> int:
        return self._crashes.get(self._digest(content), 0) if self._crashes else 0

    def _count(self, digest: bytes) -> None:
        if len(self._crashes) >= ENTRIES:
            self._crashes.pop(next(iter(self._crashes)))
        self._crashes[digest] = self._crashes.get(digest, 0) + 1

    def _digest(self, content: Content) -> bytes:
        return hashlib.blake2b(content(), key=self._key, digest_size=16).digest()
