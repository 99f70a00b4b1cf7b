"""How long to wait for a medium that may have stopped answering.

Invariant: it is counted from the start of a wait or from the last time anything moved, whichever is later: idleness
before the wait and a queue that gets shorter cost nothing. Threading: event loop only.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

PATIENCE_S = 10.0
"""A medium that moves nothing for so long hangs."""


class Patience:
    def __init__(self) -> None:
        self._moved_s = 0.0

    def moved(self) -> None:
        """Something that others wait behind has ended."""
        self._moved_s = time.monotonic()

    async def wait(self, future: asyncio.Future[Any], since_s: float | None = None) -> bool:
        """Whether it was done before nothing moved for too long. `since_s`: when the wait began, if not now; time.monotonic()."""
        if since_s is None:
            since_s = time.monotonic()
        while not future.done():
            left_s = max(since_s, self._moved_s) + PATIENCE_S - time.monotonic()
            if left_s <= 0:
                return False
            await asyncio.wait({future}, timeout=left_s)
        return True
