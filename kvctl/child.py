"""An appliance of our own as a child process on a throw-away home, for `kvctl bench` and `kvctl demo`.

Invariant: leaving the `with` block leaves no process behind. The child's start events (one JSON object a line, see
`kvctl serve --json`) are read until it is ready; what it says on stderr is kept for the error message.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from types import TracebackType
from typing import Any

from appliance.errors import KvctlError
from kvctl.client import AdminClient

KVCTL = (sys.executable, "-m", "kvctl.cli")
STOP_S = 60.0
SETTLE_S = 600.0


class ChildFailed(KvctlError):
    """The appliance did not become ready."""


@contextmanager
def throwaway_home(folder: Path, prefix: str) -> Iterator[Path]:
    """A new home inside `folder`, so on its disk; removed with all it holds."""
    folder.mkdir(parents=True, exist_ok=True)
    home = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
    try:
        yield home
    finally:
        rmtree(home, ignore_errors=True)


class Child:
    def __init__(
        self,
        home: Path,
        arguments: Sequence[str],
        on_progress: Callable[[dict[str, Any]], None],
        program: Sequence[str] = KVCTL,
    ) -> None:
        self.home = home
        self._command = [*program, "--home", str(home), "serve", "--json", *arguments]
        self._on_progress = on_progress
        self._process: subprocess.Popen[str] | None = None
        self._stderr = tempfile.TemporaryFile()
        self.ready: dict[str, Any] = {}

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Returns when the appliance answers. ChildFailed with its last words when it does not get there."""
        self._process = subprocess.Popen(
            self._command,
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
        said = self.said().strip().splitlines()
        raise ChildFailed(f"the appliance did not start: {said[-1] if said else 'it said nothing'}")

    def settle(self) -> None:
        """Wait until every block is durable. KvctlError after SETTLE_S."""
        deadline_s = time.monotonic() + SETTLE_S
        with AdminClient(self.home) as admin:
            while any(tier.pending_blocks for tier in admin.status().tiers):
                if time.monotonic() > deadline_s:
                    raise KvctlError("write-behind did not finish in 10 minutes")
                time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL, as a crash or a power cut would: nothing is flushed. The engine process dies with its parent."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """SIGTERM: drains and flushes. Returns the exit code."""
        return self._end(signal.SIGTERM)

    def wait(self) -> int:
        """Until it ends by itself, or by a signal sent already. Returns the exit code."""
        return self._end(None)

    def said(self) -> str:
        """All that was written to stderr since the first start."""
        fd = self._stderr.fileno()
        return os.pread(fd, os.fstat(fd).st_size, 0).decode("utf-8", "replace")

    def _end(self, how: signal.Signals | None) -> int:
        process = self._process
        if process is None:
            return 0
        self._process = None
        if how is not None:
            process.send_signal(how)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()
        return process.returncode

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
