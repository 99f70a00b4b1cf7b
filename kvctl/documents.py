"""Documents in a folder: which files, and their text, or the reason why one is none. Main thread only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from appliance.errors import UsageError

MOST_BYTES = 32 * 2**20
"""No appliance accepts a longer one."""


class Unusable(UsageError):
    """This file is no document: the message is the reason."""


@dataclass(frozen=True)
class Document:
    path: Path
    nbytes: int
    unreadable: str | None = None
    """Known to be so without a look inside: a folder or file that may not be read."""

    def text(self) -> str:
        """Unusable if there is none."""
        if self.unreadable is not None:
            raise Unusable(self.unreadable)
        if self.nbytes > MOST_BYTES:
            raise Unusable("too long")
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise Unusable(error.strerror or "cannot be read") from None
        if b"\0" in data:
            raise Unusable("binary")
        try:
            text = data.decode()
        except UnicodeDecodeError:
            raise Unusable("not UTF-8 text") from None
        if not text.strip():
            raise Unusable("empty")
        return text


def documents(folder: Path, pattern: str) -> list[Document]:
    """Regular files below `folder` whose name or path in it matches, in order; hidden ones only if the pattern says so."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    found = sorted(_walk(folder, pattern), key=lambda document: document.path)
    if not found:
        raise UsageError(f'{folder}: no file here matches "{pattern}"; see --glob')
    return found


def _walk(folder: Path, pattern: str) -> Iterator[Document]:
    refused: list[OSError] = []
    for top, folders, files in os.walk(folder, onerror=refused.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(top, name)
            if _matches(path.relative_to(folder), pattern) and path.is_file():  # never a pipe, which would block
                yield Document(path, path.stat().st_size)
    for error in refused:
        yield Document(Path(os.fsdecode(error.filename)), 0, error.strerror or "cannot be read")


def _matches(path: Path, pattern: str) -> bool:
    if path.name.startswith(".") and not pattern.startswith("."):
        return False
    return fnmatchcase(path.name, pattern) or fnmatchcase(path.as_posix(), pattern)
