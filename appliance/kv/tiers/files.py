"""What a tier on a file system needs of Linux beyond the standard library: holes, direct I/O, page-aligned memory.

Invariant: nothing here keeps state. Any thread.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from appliance.errors import TierError, TierFull, TierIO
from appliance.kv.tiers.base import ALIGN_BYTES

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01
_POPULATE = getattr(mmap, "MAP_POPULATE", 0)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def tier_error(error: OSError, doing: str) -> TierError:
    """The error of the medium in the project's terms."""
    text = f"{doing}: {error.strerror or error}"
    return TierFull(text) if error.errno in _FULL else TierIO(text, errno=error.errno)


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give the blocks of a range back to the file system. OSError(EOPNOTSUPP) where it cannot."""
    if _libc.fallocate(fd, _PUNCH_HOLE_KEEP_SIZE, offset, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def fsync_folder(path: Path) -> None:
    with opened(path, os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.fsync(fd)


def supports_direct(folder: Path) -> bool:
    """Whether files in `folder` can be read and written past the page cache. OSError if it cannot be written at all."""
    probe = folder / f".probe-{os.getpid()}"
    buffer = aligned_buffer(ALIGN_BYTES)
    try:
        with opened(probe, os.O_RDWR | os.O_CREAT | os.O_DIRECT) as fd:
            return os.pwrite(fd, buffer, 0) == os.preadv(fd, [buffer], 0) == ALIGN_BYTES
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        if error.errno in _FULL:  # the open said yes
            return True
        raise
    finally:
        with suppress(FileNotFoundError):
            probe.unlink()


def aligned_buffer(nbytes: int) -> memoryview:
    """Page-aligned memory, touched: direct I/O needs the first, and a first touch costs more than the I/O."""
    return memoryview(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _POPULATE))


def write_all(fd: int, buffer: memoryview, offset: int) -> None:
    while buffer:
        n = os.pwrite(fd, buffer, offset)
        if n == 0:
            raise OSError(errno.EIO, "write made no progress")
        buffer, offset = buffer[n:], offset + n


def read_all(fd: int, into: memoryview, offset: int) -> None:
    while into:
        n = os.preadv(fd, [into], offset)
        if n == 0:
            raise OSError(errno.EIO, "file is shorter than its record")
        into, offset = into[n:], offset + n
