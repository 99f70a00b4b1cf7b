"""Tenants' quotas in blocks: as many full ones as the bytes of a quota hold, so that no quota is exceeded by tails.

Invariant: a quota counts from the moment it is set. Threading: as the keyring's readers.
"""

from __future__ import annotations

from collections.abc import Callable

from appliance.kv.record import record_bytes
from appliance.security.tenants import Quota
from appliance.types import BlockLayout

UNBOUNDED = 2**63
LEAST_SLOTS = 2
"""All that is stored or loaded passes through DRAM."""


class Quotas:
    def __init__(self, quota: Callable[[str], Quota], layout: BlockLayout) -> None:
        self._quota = quota
        self._slot_bytes = layout.slot_bytes
        self._record_bytes = record_bytes(layout, layout.block_tokens)

    def dram(self, tenant: str) -> int:
        """Most slots."""
        nbytes = self._quota(tenant).dram
        return UNBOUNDED if nbytes is None else max(LEAST_SLOTS, nbytes // self._slot_bytes)

    def nvme(self, tenant: str) -> int:
        """Most records; 0: what it stores stays in memory."""
        nbytes = self._quota(tenant).nvme
        return UNBOUNDED if nbytes is None else nbytes // self._record_bytes
