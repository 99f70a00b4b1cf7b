"""What reaches the disk, in which order: records the calls that write, sync and remove, and makes them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from appliance.kv.index import Changes, Index
from appliance.kv.tiers import nvme


class Recorder:
    """`events` are (what, name of the file or folder); "commit" is an index transaction that returned."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, str]] = []
        self._patch = patch
        for what in ("pwrite", "fdatasync", "fsync", "ftruncate"):
            self._record(os, what, lambda fd, *_: _name(fd))
        self._record(os, "replace", lambda _, target: Path(target).name)
        self._record(nvme, "punch_hole", lambda fd, *_: _name(fd))
        self._record(Path, "unlink", lambda path, *_: path.name)
        apply = Index.apply

        def commit(index: Index, changes: Changes) -> None:
            apply(index, changes)
            self.events.append(("commit", "index"))

        patch.setattr(Index, "apply", commit)

    def _record(self, owner: Any, what: str, name: Callable[..., str]) -> None:
        real = getattr(owner, what)

        def call(*args: Any, **kwargs: Any) -> Any:
            event = (what, name(*args))
            result = real(*args, **kwargs)
            self.events.append(event)
            return result

        self._patch.setattr(owner, what, call)

    def last(self, what: str, name: str) -> int:
        """Position of the last such event; an assertion fails if there is none."""
        found = [n for n, event in enumerate(self.events) if event == (what, name)]
        assert found, f"no {what} of {name} in {self.events}"
        return found[-1]

    def first(self, *kinds: str) -> int:
        """Position of the first event of one of these kinds."""
        return next(n for n, (what, _) in enumerate(self.events) if what in kinds)

    def names(self, *kinds: str) -> set[str]:
        return {name for what, name in self.events if what in kinds}


def _name(fd: int) -> str:
    return Path(os.readlink(f"/proc/self/fd/{fd}")).name
