"""The DRAM pool itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from appliance.errors import ConfigError
from appliance.kv.tiers.dram import DramPool


def test_a_pool_larger_than_memory_is_refused_before_it_is_touched() -> None:
    with pytest.raises(ConfigError, match=r"tiers\.dram\.capacity: [\d,.]+ GiB were asked for, [\d.]+ GiB are free"):
        DramPool(2**60, lock=False)


def test_the_pool_stays_out_of_core_dumps_and_swap_and_other_programs() -> None:
    pool = DramPool(2**20, lock=True)
    try:
        _, mapping = Path("/proc/self/smaps").read_text().split("memfd:kvctl-pool", 1)
        flags = next(line for line in mapping.splitlines() if line.startswith("VmFlags:")).split()
        assert "dd" in flags, "not dumped"
        assert "lo" in flags or any("not locked" in note for note in pool.notes)
        assert not os.get_inheritable(pool.fd), "whoever is to have it is given it"
    finally:
        pool.close()
