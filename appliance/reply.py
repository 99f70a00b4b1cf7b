"""What the client of a request gets: chunks, then one end.

Invariant: exactly one Finished or error is sent, as the last thing; a request may begin anew as long as nothing was sent.
Threading: event loop only.
"""

from __future__ import annotations

from collections.abc import Callable

from appliance.errors import KvctlError
from appliance.request import Chunk, Finished


class Reply:
    def __init__(self, send: Callable[[Chunk | Finished | KvctlError], None], *, in_pieces: bool) -> None:
        """`in_pieces`: chunks are sent as they come; else they are held back until all are there."""
        self.begun = False
        self.ended = False
        self._send = send
        self._in_pieces = in_pieces
        self._held: list[Chunk] = []

    def put(self, event: Chunk | Finished | KvctlError) -> None:
        if isinstance(event, Chunk) and not self._in_pieces:
            self._held.append(event)
            return
        if isinstance(event, Finished):
            for chunk in self._held:
                self._send(chunk)
        self.begun = True
        self.ended = not isinstance(event, Chunk)
        self._send(event)

    def begin_anew(self) -> None:
        assert not self.begun, "what was sent cannot be taken back"
        self._held.clear()
