"""The check of the index before it is used: a child process rewrites it, reads the copy through and only then lets it in.

LMDB has no checksums and trusts its map: damage may crash or hang whoever reads it. So the control process opens only a
file that `python -m appliance.kv.check` has just written and read, or only read where there is no room to write. Invariant:
an index is given up for damage alone, never because the check could not be made; it is replaced as a whole or not at all.
The index key goes to the child through stdin. Blocking; start-up only.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from contextlib import suppress
from enum import IntEnum
from pathlib import Path

from appliance.errors import IntegrityError, TierError, TierFull, TierIO
from appliance.kv.index import Index
from appliance.kv.tiers.files import fsync_folder

_BASE_CPU_S = 30.0
_BYTES_PER_CPU_S = 20e6
_KEY_BYTES = 32
_ROOT = Path(__file__).resolve().parents[2]


class Verdict(IntEnum):
    """Exit codes of the child."""

    WHOLE = 0
    DAMAGED = 1  # also how Python ends after an exception nobody expected
    NO_COPY = 3
    NO_MEMORY = 4


_CRASHES = frozenset(
    {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP, signal.SIGXCPU}
)
"""What damage may do to its reader. A hang is a loop: the child's processor time is limited, a slow medium's time is not."""


def renew(source: Path, target: Path, *, index_key: bytes, store_uuid: bytes, map_bytes: int) -> bool:
    """Make `target`, which may be `source`, a checked copy of the index at `source`.

    False: it is missing, damaged or another store's. TierError: that cannot be told now; the index is as it was.
    """
    copy = target.with_suffix(".copy")
    remove(copy)
    if not source.is_file() or not source.stat().st_size:
        return False
    arguments = [store_uuid.hex(), str(map_bytes), str(source)]
    verdict = _judge([*arguments, str(copy)], index_key, source.stat().st_size)
    if verdict is Verdict.WHOLE:
        os.replace(copy, target)
        fsync_folder(target.parent)
    else:
        remove(copy)
    if verdict is Verdict.NO_COPY:
        if source != target:
            raise TierFull(f"no room in {target.parent} for a copy of the index")
        verdict = _judge(arguments, index_key, source.stat().st_size)
    _remove_lock(target)
    return verdict is Verdict.WHOLE


def remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        path.unlink()
    _remove_lock(path)


def _remove_lock(path: Path) -> None:
    """LMDB's reader table: of no use to the next opener, and of no format that anybody checks."""
    with suppress(FileNotFoundError):
        Path(f"{path}-lock").unlink()


def _judge(arguments: list[str], index_key: bytes, nbytes: int) -> Verdict:
    cpu_s = int(_BASE_CPU_S + nbytes / _BYTES_PER_CPU_S)
    child = subprocess.run(
        [sys.executable, "-m", "appliance.kv.check", str(cpu_s), *arguments],
        input=index_key,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=_ROOT,
        start_new_session=True,  # a signal of the terminal is not for it
        check=False,
    )
    if -child.returncode in _CRASHES:
        return Verdict.DAMAGED
    if child.returncode not in {Verdict.WHOLE, Verdict.DAMAGED, Verdict.NO_COPY}:
        raise TierIO(f"the index could not be checked: its check ended with {child.returncode}")
    return Verdict(child.returncode)


def main(arguments: list[str]) -> Verdict:
    cpu_s, uuid, map_bytes, source, *copy = arguments
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_s), hard))
    index_key, store_uuid = sys.stdin.buffer.read(_KEY_BYTES), bytes.fromhex(uuid)

    def opened(path: str) -> Index:
        return Index(Path(path), index_key=index_key, store_uuid=store_uuid, map_bytes=int(map_bytes), read_only=True)

    try:
        index = opened(source)
        for path in copy:
            try:
                index.copy(Path(path))
            except (TierError, OSError):
                return Verdict.NO_COPY
            index = opened(path)
        index.check()
    except MemoryError:
        return Verdict.NO_MEMORY
    except (IntegrityError, TierError):
        return Verdict.DAMAGED
    return Verdict.WHOLE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
