"""The store that keeps nothing: for kv.enabled = false, and for models whose state cannot be sliced into blocks.

Invariant: namespaces stay apart in hbm all the same, so roots are the real ones. Threading: event loop only.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Container, Iterable, Mapping, Sequence

from appliance.api.control import VerifyProgress
from appliance.kv.base import NOTHING_VERIFIED, Hit, KVStore, Lookup, NewBlock, PoolShape, Reservation, Staged
from appliance.kv.keys import chain, chain_root
from appliance.security.keyring import Keyring
from appliance.types import BlockId, BlockLayout, Fingerprint, Namespace, Tier, TierUsage, Tokens


class NullStore(KVStore):
    pool: PoolShape | None = None

    def __init__(self, keyring: Keyring, fingerprint: Fingerprint, layout: BlockLayout, why: str) -> None:
        self._keyring = keyring
        self._fingerprint = fingerprint
        self._layout = layout
        self._why = why

    def root(self, ns: Namespace) -> bytes:
        hash_key = self._keyring.tenant(ns.tenant).hash_key
        return chain_root(hash_key, ns, self._fingerprint, self._layout.block_tokens)

    def names(self, ns: Namespace, tokens: Tokens) -> list[BlockId]:
        hash_key = self._keyring.tenant(ns.tenant).hash_key
        return chain(hash_key, self.root(ns), tokens, self._layout.block_tokens)

    def lookup(self, ns: Namespace, tokens: Tokens) -> Lookup:
        return Lookup(())

    def missing(self, ns: Namespace, tokens: Tokens) -> list[NewBlock]:
        return []

    def touch(self, hits: Sequence[Hit]) -> None:
        assert not hits, "nothing is ever found here"

    async def stage(
        self, ns: Namespace, tokens: Tokens, hits: Sequence[Hit], *, sparing: Container[BlockId] | None = None
    ) -> AsyncGenerator[Staged, None]:
        assert not hits, "nothing is ever found here"
        return
        yield

    def unpin(self, staged: Staged) -> None:
        raise AssertionError("nothing is ever staged here")

    async def reserve(
        self, ns: Namespace, blocks: Sequence[NewBlock], *, retention_s: float | None = None
    ) -> list[Reservation]:
        return []

    def keep(self, ns: Namespace, tokens: Tokens, *, retention_s: float | None = None) -> None:
        pass

    def commit(self, reservations: Sequence[Reservation]) -> None:
        assert not reservations

    def abort(self, reservations: Sequence[Reservation]) -> None:
        assert not reservations

    def in_dram(self, blocks: Iterable[BlockId]) -> set[BlockId]:
        return set()

    def evict_dram(self) -> int:
        return 0

    async def erase(self, ns: Namespace, tokens: Tokens) -> int:
        return 0

    async def pin_prompt(self, ns: Namespace, tokens: Tokens) -> int:
        return 0

    async def unpin_prompt(self, ns: Namespace, tokens: Tokens) -> int:
        return 0

    async def enforce_quotas(self) -> None:
        pass

    def usage(self) -> list[TierUsage]:
        dram = TierUsage(Tier.DRAM, 0, 0, 0, 0, state="off", notes=(self._why,))
        return [dram, TierUsage(Tier.NVME, 0, 0, 0, 0, state="off")]

    def counters(self) -> Mapping[str, float]:
        return {}

    async def verify(self, *, repair: bool) -> AsyncGenerator[VerifyProgress, None]:
        yield NOTHING_VERIFIED

    async def flush(self, timeout_s: float) -> bool:
        return True

    async def close(self) -> None:
        pass
