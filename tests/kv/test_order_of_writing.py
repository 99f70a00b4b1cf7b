"""Data before index (FORMAT.md section 6), as the calls that make it so: what a crash test on a machine that stays up cannot see."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.kv import fill, opened, prompt

SEGMENT_BYTES = 2**16
"""Seven records."""


def _recorded(log: list[tuple[str, str]], name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(fd: int, *args: Any) -> Any:
        path = os.readlink(f"/proc/self/fd/{fd}")
        result = real(fd, *args)
        log.append((name, path))
        return result

    return call


async def test_records_and_their_folder_are_synced_before_the_index_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[tuple[str, str]] = []
    async with opened(tmp_path, slots=32, segment=SEGMENT_BYTES) as store:
        index = store._below.index
        assert index._env.flags()["sync"], "a transaction is durable when it returns"
        apply = index.apply

        def applied(changes: Any) -> None:
            log.append(("index", "begins"))
            apply(changes)

        monkeypatch.setattr(index, "apply", applied)
        for name in ("pwrite", "fdatasync", "fsync"):
            monkeypatch.setattr(os, name, _recorded(log, name, getattr(os, name)))
        await fill(store, prompt(1, 16 * 10))
        assert await store.flush(5)
        monkeypatch.undo()
    folder = str(tmp_path / "store")
    log = log[: log.index(("index", "begins"))]
    written = {path for name, path in log if name == "pwrite"}
    assert len(written) == 2, "of two segments"
    for path in written:
        last_write = max(n for n, event in enumerate(log) if event == ("pwrite", path))
        assert ("fdatasync", path) in log[last_write:]
    assert ("fsync", folder) in log, "new files are found again"
