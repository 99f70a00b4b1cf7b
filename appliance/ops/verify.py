"""kvctl verify without a running appliance.

Invariant: opens the store the way a start does, so start-up recovery has mended what it can before records are read, and
the report tells of it. Blocking.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from appliance.api.control import VerifyProgress
from appliance.config import Profile
from appliance.kv.durable import Durable
from appliance.kv.opening import open_below
from appliance.kv.verify import verify as verify_records
from appliance.ops.home_lock import only_one
from appliance.ops.init import key_file
from appliance.security.keyring import Keyring


def verify(home: Path, profile: Profile, *, repair: bool) -> Iterator[VerifyProgress]:
    """Progress, and last the report. StateError or TierError if the store cannot be opened."""
    with only_one(home):
        keyring = Keyring.open(home, key_file(home, profile))
        sealed, recovered = open_below(home, keyring, profile.tiers.nvme)
        durable = Durable(sealed, recovered.index)
        try:
            yield from verify_records(
                sealed, recovered.index, drop=durable.erase if repair else None, mended=recovered.mended
            )
        finally:
            durable.close()
