"""One process at a time works on a home's store.

Invariant: the lock lives as long as its holder, however that ends; the file names the holder for a message only.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from appliance.errors import AlreadyRunning, NotInitialised, StateError


@contextmanager
def only_one(home: Path) -> Generator[None, None, None]:
    """Hold the home's lock. AlreadyRunning names the pid of the holder, if it has written it down already."""
    try:
        lock = open(home / "appliance.lock", "a+b")
    except FileNotFoundError:
        raise NotInitialised(f"{home} is not initialised; run: kvctl init") from None
    except OSError as error:
        raise StateError(f"{home} cannot be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _taken(home, lock) from None
        lock.truncate(0)
        lock.write(b"%d" % os.getpid())
        lock.flush()
        yield


def _taken(home: Path, lock: BinaryIO) -> AlreadyRunning:
    lock.seek(0)
    said = lock.read(20)
    if not said.isdigit():
        return AlreadyRunning(f"another process is using {home}; stop it first", pid=None)
    pid = int(said)
    return AlreadyRunning(f"pid {pid} is using {home}; stop it first: kill {pid}", pid=pid)
