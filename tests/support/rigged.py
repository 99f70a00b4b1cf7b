"""`kvctl` that logs all there is, and whose nvme tier fails while a file says so; run it as RIGGED, and say so with `fault`.

The file is JSON, operation of RecordTier to "io" or "full", and lies in the home.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from appliance.kv import opening
from appliance.kv.tiers.nvme import NvmeTier
from kvctl.cli import main
from tests.support.faulty import FaultyTier, eio, full

RIGGED = (sys.executable, "-m", "tests.support.rigged")
ERRORS = {"io": eio, "full": full}
_FILE = "faults.json"


class RiggedTier(FaultyTier):
    def __init__(self, folder: Path, **settings: Any) -> None:
        super().__init__(NvmeTier(folder, **settings))
        self._file = folder.parent / _FILE

    def _enter(self, op: str) -> None:
        try:
            faults = json.loads(self._file.read_text())
        except FileNotFoundError:
            return
        if op in faults:
            raise ERRORS[faults[op]]()


def fault(home: Path, **faults: str) -> None:
    """From now on these operations fail; none: everything works again."""
    new = home / f"{_FILE}.new"
    new.write_text(json.dumps(faults))
    os.replace(new, home / _FILE)


if __name__ == "__main__":
    logging.basicConfig(level=logging.DEBUG)
    opening.NvmeTier = RiggedTier  # type: ignore[assignment,misc]
    main()
