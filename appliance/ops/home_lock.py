"""One process at a time works on a home's store.

Invariant: the lock lives as long as its holder, however that ends; the file names the holder for a message only.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from appliance.errors import AlreadyRunning, NotInitialised, StateError


@contextmanager
def only_one(home: Path) -> Generator[None, None, None]:
    """Hold the home's lock. AlreadyRunning names the pid of the holder."""
    try:
        lock = open(home / "appliance.lock", "a+", encoding="ascii")
    except FileNotFoundError:
        raise NotInitialised(f"{home} is not initialised; run: kvctl init") from None
    except OSError as error:
        raise StateError(f"{home} cannot be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            pid = int(lock.read().strip() or 0)
            raise AlreadyRunning(f"pid {pid} is using {home}; stop it first: kill {pid}", pid=pid) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
