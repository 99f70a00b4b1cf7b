"""What the device under a folder can do: sequential reads past the page cache, the floor every restore is held against."""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import time
from pathlib import Path

from appliance.errors import TierIO

READ_BYTES = 8 << 20
DEPTH = 4


class ReadProbe:
    """A file of random bytes, read with O_DIRECT (or after dropping it from the page cache where that is refused)."""

    def __init__(self, folder: Path, nbytes: int) -> None:
        self._nbytes = -(-nbytes // READ_BYTES) * READ_BYTES
        self._file = tempfile.NamedTemporaryFile(dir=folder, prefix="read-probe-")
        chunk = os.urandom(READ_BYTES)
        try:
            for _ in range(self._nbytes // READ_BYTES):
                self._file.write(chunk)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.close()
            raise TierIO(f"cannot write {self._nbytes >> 20} MiB into {folder}: {error.strerror}") from None

    def read_bytes_per_s(self, depth: int = DEPTH) -> float:
        """One pass over the file with `depth` reads of 8 MiB in flight."""
        try:
            fd = os.open(self._file.name, os.O_RDONLY | os.O_DIRECT)
        except OSError:
            fd = os.open(self._file.name, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        offsets = iter(range(0, self._nbytes, READ_BYTES))
        lock = threading.Lock()
        buffers = [mmap.mmap(-1, READ_BYTES) for _ in range(depth)]
        for buffer in buffers:
            buffer[:] = bytes(READ_BYTES)  # first touch is not the device's time

        def work(buffer: mmap.mmap) -> None:
            while True:
                with lock:
                    offset = next(offsets, None)
                if offset is None:
                    return
                os.preadv(fd, [buffer], offset)

        threads = [threading.Thread(target=work, args=(buffer,)) for buffer in buffers]
        started_s = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        elapsed_s = time.perf_counter() - started_s
        os.close(fd)
        return self._nbytes / elapsed_s

    def close(self) -> None:
        self._file.close()
