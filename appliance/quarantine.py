"""Which contents crashed the engine, so that the same content does not crash it for ever.

Invariant: contents are remembered by a digest under a key of this process, the latest few of them. Event loop only.
"""

from __future__ import annotations

import hashlib
import os

from appliance.errors import RequestError

CRASHES = 2
"""So many, and the content is refused."""
ENTRIES = 1024


class Quarantine:
    def __init__(self) -> None:
        self._key = os.urandom(32)
        self._crashes: dict[bytes, int] = {}

    def __bool__(self) -> bool:
        """Whether anything has crashed."""
        return bool(self._crashes)

    def check(self, content: bytes) -> bytes:
        """The content's digest. RequestError if it is quarantined."""
        digest = self.digest(content)
        if self._crashes.get(digest, 0) >= CRASHES:
            raise RequestError("this request crashed the engine twice and is refused", code="quarantined", status=422)
        return digest

    def crashed(self, digest: bytes) -> None:
        if len(self._crashes) >= ENTRIES:
            self._crashes.pop(next(iter(self._crashes)))
        self._crashes[digest] = self._crashes.get(digest, 0) + 1

    def digest(self, content: bytes) -> bytes:
        return hashlib.blake2b(content, key=self._key, digest_size=16).digest()
