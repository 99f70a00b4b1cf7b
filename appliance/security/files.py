"""Files only their owner may read: keys, keyring copies, client settings.

Invariant: a file written here is absent, or whole with mode 0600, whatever interrupts the writer. `exclusive` orders
processes and threads alike.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from appliance.errors import KeyringError


def read_private(path: Path, limit_bytes: int) -> bytes:
    """Contents of a file nobody else can read. KeyringError names the command that mends a loose mode."""
    with open(path, "rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if mode & 0o077:
            raise KeyringError(f"{path} is open to other users (mode {mode:04o}); run: chmod 600 {path}")
        return file.read(limit_bytes)


def write_private(path: Path, data: bytes) -> None:
    """Put `data` at `path`, durably, all or nothing. Callers take turns: see `exclusive`."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # left by a writer that died
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; waits for whoever has it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
