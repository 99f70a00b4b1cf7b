"""From token bytes to text a client may see: whole characters, and nothing of a stop string.

Invariant: the text given out does not depend on how the bytes were cut into pieces. Threading: compute thread.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Bytes in, text out. Holds back an unfinished character, and text that may be the start of a stop string."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = tuple(s for s in stop if s)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False
        """A stop string was completed: everything before it has been given out."""
        self.stop: str | None = None
        """Which one."""

    def feed(self, data: bytes) -> str:
        return self._scan(self._decoder.decode(data))

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        text = self._scan(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _scan(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [(at + len(s), at) for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            end, start = min(found)  # the one completed first; of those, the longest
            self.stop = text[start:end]
            return text[:start]
        free = min((_tail_start(text, s) for s in self._stop), default=len(text))
        self._held = text[free:]
        return text[:free]


def _tail_start(text: str, stop: str) -> int:
    """Where the longest suffix of `text` that begins `stop` starts; len(text) if there is none."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return at if at >= 0 else len(text)
