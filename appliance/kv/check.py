"""The check of the index before it is used: a child process rewrites it, reads the copy through and only then lets it in.

LMDB has no checksums and trusts its map: damage may crash or hang whoever reads it. So the control process opens only a
file that `python -m appliance.kv.check` has just written and read. Invariant: the original is replaced as a whole or not
at all. The index key goes to the child through stdin. Blocking; start-up only.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from appliance.errors import IntegrityError, TierError
from appliance.kv.index import Index
from appliance.kv.tiers.files import fsync_folder

_BASE_TIMEOUT_S = 30.0
_BYTES_PER_S = 20e6
_KEY_BYTES = 32


def renew(path: Path, *, index_key: bytes, store_uuid: bytes, map_bytes: int) -> bool:
    """Replace the index at `path` by a checked copy of itself. False: it is missing, damaged or another store's."""
    copy = path.with_suffix(".copy")
    remove(copy)
    if not path.is_file():
        return False
    command = [sys.executable, "-m", "appliance.kv.check", str(path), str(copy), store_uuid.hex(), str(map_bytes)]
    root = Path(__file__).resolve().parents[2]
    try:
        child = subprocess.run(
            command,
            input=index_key,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_BASE_TIMEOUT_S + path.stat().st_size / _BYTES_PER_S,
            cwd=root,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    finally:
        _remove_lock(path)
        _remove_lock(copy)
    if child.returncode != 0 or not copy.is_file():
        remove(copy)
        return False
    os.replace(copy, path)
    fsync_folder(path.parent)
    return True


def remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        path.unlink()
    _remove_lock(path)


def _remove_lock(path: Path) -> None:
    """LMDB's reader table: of no use to the next opener, and of no format that anybody checks."""
    with suppress(FileNotFoundError):
        Path(f"{path}-lock").unlink()


def main(arguments: list[str]) -> int:
    path, copy, uuid, map_bytes = arguments
    index_key = sys.stdin.buffer.read(_KEY_BYTES)
    options = {"index_key": index_key, "store_uuid": bytes.fromhex(uuid), "map_bytes": int(map_bytes)}
    try:
        original = Index(Path(path), **options)  # type: ignore[arg-type]
        original.copy(Path(copy))
        original.close()
        rewritten = Index(Path(copy), **options)  # type: ignore[arg-type]
        rewritten.check()
        rewritten.close()
    except (IntegrityError, TierError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
