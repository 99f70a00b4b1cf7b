"""`kvctl` whose engine process dies of one token and is slow to read a prompt; run it as MORTAL.

The same module is the engine process: what it is depends on how it is called. Patience with who was served more is short.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

from appliance import pressure
from appliance.engine import process, worker
from appliance.engine.base import Engine, Row
from kvctl.cli import main

MORTAL = (sys.executable, "-m", "tests.support.mortal_engine")
POISON = 7
"""A token id."""
CHUNK_S = 0.02
"""What a chunk of a prompt takes longer."""

_load, _launch = worker.load_engine, process._launch


def _mortal(*arguments: Any) -> Engine:
    engine = _load(*arguments)
    decode = engine.decode

    def fatal(rows: Sequence[Row]) -> None:
        if any(POISON in row.tokens.ids() for row in rows):
            os.kill(os.getpid(), signal.SIGKILL)
        if any(len(row.tokens) > 1 for row in rows):
            time.sleep(CHUNK_S)
        decode(rows)

    engine.decode = fatal  # type: ignore[method-assign]
    return engine


def _launch_mortal(*arguments: Any) -> subprocess.Popen[bytes]:
    popen = subprocess.Popen

    def instead(command: list[str], **settings: Any) -> subprocess.Popen[bytes]:
        return popen([*MORTAL, *command[len(MORTAL) :]], **settings)

    with mock.patch.object(subprocess, "Popen", instead):
        return _launch(*arguments)


if __name__ == "__main__":
    if "--socket-fd" in sys.argv:
        worker.load_engine = _mortal  # type: ignore[assignment]
        worker.main()
    else:
        process._launch = _launch_mortal
        pressure.PATIENCE_S = 0.3
        main()
