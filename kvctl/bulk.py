"""Prefetch of many prompts in a row: each on its own, so that it can be stopped anywhere and started again.

Invariant: a file that is no prompt is named, skipped and counted; any other failure ends it, and says what was done.
Main thread only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from appliance.api.control import PrefetchProgress, PrefetchRequest
from appliance.api.folder import FilePrefetched, FilesPrefetched
from appliance.errors import KvctlError, Overloaded, RequestError
from kvctl import output
from kvctl.client import AdminClient
from kvctl.diagnostics import ApiError, say
from kvctl.documents import Unusable

TRIES = 30
"""Before an appliance that has no room is given up."""
SKIPPED_CODES = {
    "context_length_exceeded": "too long for the model's context",
    "request_too_large": "too long for the appliance",
    "empty_prompt": "empty",
}
WIDTH = 76


@dataclass(frozen=True)
class Item:
    path: Path
    nbytes: int
    request: Callable[[], PrefetchRequest]
    """Unusable if the file is none."""


class Bulk:
    def __init__(self, items: Sequence[Item], report: Callable[[FilePrefetched], None]) -> None:
        self._items = items
        self._report = report
        self._ended: list[FilePrefetched] = []
        self._started_s = time.monotonic()
        self._all_bytes = max(sum(item.nbytes for item in items), 1)
        self._ended_bytes = 0

    def run(self, admin: AdminClient) -> None:
        with output.changing_line() as line:
            try:
                for item in self._items:
                    self._end(item, self._one(admin, item, line), line)
            except (KeyboardInterrupt, KvctlError):
                line.clear()
                say(f"{len(self._ended)} of {len(self._items)} files are done; the same command goes on from there")
                raise

    def summary(self) -> FilesPrefetched:
        states = [file.state for file in self._ended]
        return FilesPrefetched(
            files=len(self._items),
            done=states.count("done"),
            there=states.count("there"),
            absent=states.count("absent"),
            skipped=states.count("skipped"),
            prompt_tokens=sum(file.prompt_tokens for file in self._ended),
            moved_tokens=sum(file.moved_tokens for file in self._ended),
            computed_tokens=sum(file.computed_tokens for file in self._ended),
            seconds=time.monotonic() - self._started_s,
            complete=len(self._ended) == len(self._items),
        )

    def _end(self, item: Item, file: FilePrefetched, line: output.ChangingLine) -> None:
        self._ended.append(file)
        self._ended_bytes += item.nbytes
        if file.state == "skipped":
            line.keep(f"skipped {file.file}: {file.reason}")
        self._report(file)

    def _one(self, admin: AdminClient, item: Item, line: output.ChangingLine) -> FilePrefetched:
        try:
            request = item.request()
            last = self._prefetch(admin, item, request, line)
        except Unusable as error:
            return FilePrefetched(file=str(item.path), state="skipped", reason=str(error))
        except RequestError as error:
            if error.code not in SKIPPED_CODES:
                raise
            return FilePrefetched(file=str(item.path), state="skipped", reason=SKIPPED_CODES[error.code])
        return FilePrefetched(
            file=str(item.path),
            state=_state(last),
            prompt_tokens=last.prompt_tokens,
            moved_tokens=last.moved_tokens,
            computed_tokens=last.computed_tokens,
            seconds=last.seconds,
        )

    def _prefetch(
        self, admin: AdminClient, item: Item, request: PrefetchRequest, line: output.ChangingLine
    ) -> PrefetchProgress:
        for _ in range(TRIES):
            last: PrefetchProgress | None = None
            try:
                for last in admin.prefetch(request):
                    line(self._progress(item, last))
            except Overloaded as error:
                line(f"waiting for room: {error}"[:WIDTH])
                time.sleep(error.retry_after_s)
                continue
            if last is None or not last.done:
                raise ApiError("prefetch did not finish: the appliance stopped it")
            return last
        raise Overloaded("the appliance has had no room for long; see kvctl status", retry_after_s=60)

    def _progress(self, item: Item, step: PrefetchProgress) -> str:
        worked = step.moved_tokens + step.computed_tokens
        ended = self._ended_bytes + item.nbytes * min(1.0, worked / max(step.prompt_tokens, 1))
        tokens = sum(file.prompt_tokens for file in self._ended)
        busy_tokens = worked + sum(file.moved_tokens + file.computed_tokens for file in self._ended)
        seconds = max(time.monotonic() - self._started_s, 1e-9)
        left_s = seconds * (self._all_bytes - ended) / ended if busy_tokens else None
        return progress_line(
            len(self._ended), len(self._items), tokens + worked, busy_tokens / seconds, left_s, item.path.name
        )


def _state(last: PrefetchProgress) -> Literal["done", "there", "absent"]:
    if last.moved_tokens or last.computed_tokens:
        return "done"
    return "absent" if last.found.get("none") else "there"


def progress_line(done: int, files: int, tokens: int, tokens_per_s: float, left_s: float | None, name: str) -> str:
    """At most WIDTH characters, however long the name."""
    eta = "-" if left_s is None else output.duration(left_s)
    told = f"{done:,}/{files:,} files, {tokens:,} tokens, {tokens_per_s:,.0f} tok/s, ETA {eta}"
    room = WIDTH - len(told) - 2
    return f"{told}  {name if len(name) <= room else name[: room - 1] + '…'}" if room > 8 else told[:WIDTH]
