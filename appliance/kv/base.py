"""The KV store as the request path sees it: tiers below hbm, found by prefix. `store.py` implements it.

Invariants: a lookup has no side effect. Bytes reach a slot that others can see only after tag, identity and length
were verified. A block is readable from DRAM from commit() until its record is durable and beyond. Every failure of a
medium or of verification is a miss and a counter, never an exception to the caller of stage().

Threading: called from the event loop. Blocking work runs on the transfer pool inside.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from appliance.api.control import VerifyProgress, VerifyReport
from appliance.types import BlockId, Namespace, Tier, TierUsage, Tokens


@dataclass(frozen=True)
class Hit:
    """One block of a stored prefix. `use_tokens` < `n_tokens` only in the last hit of a lookup."""

    block: BlockId
    parent: BlockId
    start: int
    """Position of the block's first token."""
    n_tokens: int
    use_tokens: int
    tier: Tier
    """The fastest tier that holds it. It may still be on its way to DRAM: stage() waits for it."""
    payload_bytes: int


@dataclass(frozen=True)
class Lookup:
    """The longest stored prefix of a token sequence: hits contiguous from token 0."""

    hits: tuple[Hit, ...]

    @property
    def tokens(self) -> int:
        return self.hits[-1].start + self.hits[-1].use_tokens if self.hits else 0

    def by_tier(self, start: int = 0) -> dict[Tier, int]:
        """Tokens at positions >= start in each tier."""
        counts: dict[Tier, int] = {}
        for hit in self.hits:
            n = hit.start + hit.use_tokens - max(start, hit.start)
            if n > 0:
                counts[hit.tier] = counts.get(hit.tier, 0) + n
        return counts


@dataclass(frozen=True)
class Staged:
    """A run of consecutive blocks in DRAM slots, verified and pinned until unpin()."""

    hits: tuple[Hit, ...]
    slots: tuple[int, ...]
    nbytes: int
    """Payload bytes of the run."""
    seconds: float
    """Read and open time of this run; 0 when it was in DRAM already."""


@dataclass(frozen=True)
class NewBlock:
    """A block that no tier holds yet."""

    block: BlockId
    parent: BlockId
    start: int
    tokens: Tokens


@dataclass(frozen=True)
class Reservation:
    """A slot to export a new block into. Ends by commit() or abort()."""

    new: NewBlock
    slot: int


@dataclass(frozen=True)
class PoolShape:
    """The shared DRAM pool: a memfd of slots * slot_bytes bytes."""

    fd: int
    slot_bytes: int
    slots: int


NOTHING_VERIFIED = VerifyProgress(
    records_done=0,
    records_total=0,
    report=VerifyReport(
        segments=0, records=0, bytes_read=0, ok=0, bad={}, index_missing=0, index_dangling=0, repaired=0, seconds=0.0
    ),
)
"""All there is to say of a store that keeps nothing durable."""


class KVStore(ABC):
    pool: PoolShape | None
    """None: this store never moves a block."""

    @abstractmethod
    def root(self, ns: Namespace) -> bytes:
        """h0 of the namespace (FORMAT.md section 2): the opaque namespace id given to the engine."""

    @abstractmethod
    def names(self, ns: Namespace, tokens: Tokens) -> list[BlockId]:
        """Ids of the full blocks of a sequence, in order, stored or not."""

    @abstractmethod
    def lookup(self, ns: Namespace, tokens: Tokens) -> Lookup:
        """Longest stored prefix, to the token. No side effects: not even recency changes."""

    @abstractmethod
    def missing(self, ns: Namespace, tokens: Tokens) -> list[NewBlock]:
        """Blocks of `tokens`, tail included, that no tier holds or covers. Parents before children."""

    @abstractmethod
    def touch(self, hits: Sequence[Hit]) -> None:
        """The prefix that ends with these hits of a lookup is used, whichever tier serves it, hbm included."""

    @abstractmethod
    def stage(
        self, ns: Namespace, tokens: Tokens, hits: Sequence[Hit], *, sparing: Container[BlockId] | None = None
    ) -> AsyncGenerator[Staged, None]:
        """Bring consecutive hits into DRAM and yield them in order, in runs, as they arrive. Touches recency.

        `tokens` is the sequence the hits were looked up for: it is compared to what the records say they hold.
        Ends early when a block cannot be had: the caller recomputes the rest. Each yielded run is owed an unpin().
        `sparing` is for what nobody waits for: these blocks are not evicted to make room, nor is room waited for.
        """

    @abstractmethod
    def unpin(self, staged: Staged) -> None: ...

    @abstractmethod
    async def reserve(
        self, ns: Namespace, blocks: Sequence[NewBlock], *, retention_s: float | None = None
    ) -> list[Reservation]:
        """Slots for new blocks, waiting while write-behind is at its bound or no slot can be had.

        Keeps the order, and may give fewer: a block that another request stored or is storing meanwhile is left out, and
        a pool too small for all of them gives the first ones. Commit those, then ask missing() again. Empty only if
        nothing is left to store. `retention_s` as in keep(). StoreBusy if nothing moves for a while: the caller holds cells
        that others may wait for.
        """

    @abstractmethod
    def keep(self, ns: Namespace, tokens: Tokens, *, retention_s: float | None = None) -> None:
        """The stored prefix of these is used, and to be kept for so long from now on; of several wishes the longest counts.

        None: as the profile says. 0: in memory only, until room is needed; anything else is written below, too.
        """

    @abstractmethod
    def commit(self, reservations: Sequence[Reservation]) -> None:
        """The slots hold their blocks: readable now, sealed and appended in the background."""

    @abstractmethod
    def abort(self, reservations: Sequence[Reservation]) -> None: ...

    @abstractmethod
    def in_dram(self, blocks: Iterable[BlockId]) -> set[BlockId]:
        """Those of them that are readable in DRAM."""

    @abstractmethod
    def evict_dram(self) -> int:
        """Free every DRAM slot whose block is durable below and not pinned; returns the blocks evicted."""

    @abstractmethod
    async def erase(self, ns: Namespace, tokens: Tokens) -> int:
        """Forget the stored prefix of a prompt in every tier, but for what is in use; returns the blocks that went.
        TierError if the medium refuses."""

    @abstractmethod
    async def pin_prompt(self, ns: Namespace, tokens: Tokens) -> int:
        """Keep the stored prefix of a prompt, whoever needs room, until it is unpinned; returns the tokens that are pinned.
        RequestError beyond the budget, TierError if the medium refuses: then nothing is."""

    @abstractmethod
    async def unpin_prompt(self, ns: Namespace, tokens: Tokens) -> int:
        """Returns the blocks that are not pinned any more: not those that another pinned prompt begins with."""

    @abstractmethod
    async def enforce_quotas(self) -> None:
        """Forget what tenants hold beyond quotas that were lowered. TierError if the medium refuses."""

    @abstractmethod
    def usage(self) -> list[TierUsage]:
        """dram, nvme and, when configured, remote."""

    @abstractmethod
    def counters(self) -> Mapping[str, float]:
        """Monotonic counters under their metric names without the `kvctl_` prefix; labels as `name{tier="nvme"}`."""

    @abstractmethod
    def verify(self, *, repair: bool) -> AsyncGenerator[VerifyProgress, None]:
        """Open every durable record and cross-check the index, while serving; the last step carries the report.
        `repair` drops what is bad."""

    @abstractmethod
    async def flush(self, timeout_s: float) -> bool:
        """Wait until every committed block is durable. False if the time ran out."""

    @abstractmethod
    async def close(self) -> None: ...
