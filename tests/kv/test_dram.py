"""The DRAM pool itself."""

from __future__ import annotations

import pytest

from appliance.errors import ConfigError
from appliance.kv.tiers.dram import DramPool


def test_a_pool_larger_than_memory_is_refused_before_it_is_touched() -> None:
    with pytest.raises(ConfigError, match=r"tiers\.dram\.capacity: \d+ MiB were asked for, \d+ MiB are free"):
        DramPool(2**60, lock=False)
