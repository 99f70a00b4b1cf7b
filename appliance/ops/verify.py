"""kvctl verify without a running appliance.

Invariant: it looks at the store the appliance served from last. Repairing opens it as a start does; otherwise nothing in
it changes, and what a start would mend is reported. Blocking.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree

from appliance.api.control import VerifyProgress
from appliance.config import Profile
from appliance.errors import StateError
from appliance.kv.durable import Durable
from appliance.kv.opening import last_opened, look_below, open_below, store_folder
from appliance.kv.verify import verify as verify_records
from appliance.ops.home_lock import only_one
from appliance.ops.init import key_file
from appliance.security.keyring import Keyring


def verify(home: Path, profile: Profile, *, repair: bool) -> Iterator[VerifyProgress]:
    """Progress, and last the report. StateError or TierError if the store cannot be opened."""
    with only_one(home), _scratch(home) as scratch:
        keyring = Keyring.open(home, key_file(home, profile))
        last = last_opened(home)
        nvme = last or profile.tiers.nvme
        if last and not (folder := store_folder(home, last)).is_dir():
            raise StateError(f"{folder} is gone, where this appliance stored its blocks: is its disk mounted?")
        opened = open_below(home, keyring, nvme) if repair else look_below(home, keyring, nvme, scratch)
        sealed, recovered = opened
        durable = Durable(sealed, recovered.index)
        try:
            yield from verify_records(
                sealed, recovered.index, drop=durable.erase if repair else None, mended=recovered.mended
            )
        finally:
            durable.close()


@contextmanager
def _scratch(home: Path) -> Generator[Path, None, None]:
    """A folder for the time of the check, on the disk of the home."""
    folder = home / ".verify"
    try:
        rmtree(folder, ignore_errors=True)  # left by one that was killed
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise StateError(f"cannot write to {home}: {error.strerror}") from None
    try:
        yield folder
    finally:
        rmtree(folder, ignore_errors=True)
