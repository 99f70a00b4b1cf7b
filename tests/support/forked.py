"""A forked child that a test kills: it starts in milliseconds, so a test can afford many."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import BinaryIO


def lines_until_killed(work: Callable[[BinaryIO], None], n: int) -> list[bytes]:
    """Run work(pipe) in a child, kill it when it wrote n lines, and return all whole lines it wrote."""
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(receive)
        try:
            with os.fdopen(send, "wb") as out:
                work(out)
        finally:
            os._exit(1)  # never back into the test runner
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        lines = [pipe.readline() for _ in range(n)]
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        lines += pipe.readlines()
    return [line for line in lines if line.endswith(b"\n")]
