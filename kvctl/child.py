"""An appliance of our own as a child process, for `kvctl bench` and `kvctl demo`: start, stop, kill, start again.

Invariant: leaving the `with` block leaves no process behind. The child's start events (one JSON object a line, see
`kvctl serve --json`) are read until it is ready; what it says on stderr is kept for the error message.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from appliance.errors import KvctlError

STOP_S = 60.0


class ChildFailed(KvctlError):
    """The appliance did not become ready."""


class Child:
    def __init__(self, home: Path, arguments: Sequence[str], on_progress: Callable[[dict[str, Any]], None]) -> None:
        self.home = home
        self._arguments = list(arguments)
        self._on_progress = on_progress
        self._process: subprocess.Popen[str] | None = None
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self.ready: dict[str, Any] = {}

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Returns when the appliance answers. ChildFailed with its last words when it does not get there."""
        command = [sys.executable, "-m", "kvctl.cli", "--home", str(self.home), "serve", "--json", *self._arguments]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            start_new_session=True,
        )
        for line in self._process.stdout or ():
            event = json.loads(line)
            if event["kind"] == "ready":
                self.ready = event
                return
            self._on_progress(event)
        self._process.wait()
        self._stderr.seek(0)
        said = self._stderr.read().strip().splitlines()
        raise ChildFailed(f"the appliance did not start: {said[-1] if said else 'it said nothing'}")

    def kill(self) -> None:
        """SIGKILL, as a crash or a power cut would: nothing is flushed. The engine process dies with its parent."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM: drains and flushes."""
        self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> None:
        process = self._process
        if process is None:
            return
        self._process = None
        process.send_signal(how)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.stop()
        else:
            self.kill()
        self._stderr.close()
