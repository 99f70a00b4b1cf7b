"""Start-up: makes index, segments and capacity agree before the store serves (FORMAT.md, "Segments, index and crash rules").

Invariant: afterwards every index entry lies inside a segment of ours, every byte outside an entry was given back, and
the tier is within its capacity. The segments are the truth; whatever the index lacks is rebuilt from them. Blocking;
runs before anything else uses tier or index, in steps that do not keep other threads waiting.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from struct import Struct

from appliance.errors import IntegrityError, TierError
from appliance.kv.check import remove, renew
from appliance.kv.fair import FairShare
from appliance.kv.index import FILE_NAME, Changes, Index, IndexEntry, LastUse
from appliance.kv.policy import Standing
from appliance.kv.retention import FOR_EVER, PINNED
from appliance.kv.runs import Runs
from appliance.kv.tiers.base import ALIGN_BYTES, Extent, SegmentInfo
from appliance.kv.tiers.files import tier_error
from appliance.kv.tiers.sealed import Found, Scratch, SealedTier
from appliance.security.keyring import Keyring
from appliance.types import BlockId, Tokens

log = logging.getLogger(__name__)

_AGE = Struct(">QQ32s32sIdI")
"""Last use, depth, block, parent, standing, number of the tenant: in the order of these bytes blocks are added to the policy."""
_DEEPEST = 2**64 - 1
_BATCH = 4096
"""Blocks of one index transaction of a rebuild."""


@dataclass(frozen=True)
class Mended:
    """What start-up found wrong, and put right."""

    found: int = 0
    """Records indexed anew because the index was missing or damaged."""
    dangling: int = 0
    """Index entries dropped: their segment is missing, short or set aside."""
    quarantined: int = 0
    """Segments set aside."""
    unread: int = 0
    """Pages that the medium could not read while the index was rebuilt: what began there is lost."""
    evicted: int = 0
    """Blocks beyond the capacity."""
    expired: int = 0
    """Blocks that nobody wanted kept for so long."""

    @property
    def notes(self) -> tuple[str, ...]:
        """For an operator."""
        said = (
            (self.found, "the index was missing or damaged: rebuilt from {} records"),
            (self.dangling, "{} blocks were lost with their segments"),
            (self.quarantined, "{} segments do not verify and were set aside"),
            (self.unread, "{} pages cannot be read; the blocks in them are lost"),
        )
        return tuple(text.format(n) for n, text in said if n)


NOTHING_MENDED = Mended()


@dataclass(frozen=True)
class Recovered:
    """An index and its segments that agree."""

    index: Index
    policy: FairShare[BlockId]
    """Everything that is stored, in the order of eviction."""
    tokens: int
    newest_us: int
    mended: Mended
    kept: dict[BlockId, int]
    """Until when, of those that are not kept for ever."""


def recover(
    sealed: SealedTier,
    keyring: Keyring,
    source: Path,
    target: Path,
    policy: FairShare[BlockId],
    now_us: int,
    retention_s: float | None = None,
) -> Recovered:
    """Start with the index in folder `source` and keep the outcome in folder `target`, which is the same one to serve from.
    `policy` is an empty one, which is filled. `retention_s`: of blocks that the index does not know any more, since their sealing.

    TierError if the medium, or a folder, cannot be used at all.
    """
    segments, owners, quarantined = _own_segments(sealed)
    index, rebuilt = _open_index(sealed, keyring, source / FILE_NAME, target / FILE_NAME)
    try:
        census = _Census(owners)
        pending = _Pending(retention_s or None)
        expired = 0
        for block, entry in index.entries():
            if entry.extent.end > segments.get(entry.extent.segment, 0):
                pending.removed.add(block)
            elif entry.used.until_us <= now_us:
                pending.removed.add(block)
                expired += 1
            else:
                census.add(block, entry)
        dangling, known = len(pending.removed) - expired, census.blocks
        committed = index.ends()
        pending.gone.extend(number for number in committed if number not in segments)
        unread = 0
        for number, end in segments.items():
            start = committed.get(number, ALIGN_BYTES)
            for record in _records(sealed, number, start, end, heads_only=rebuilt):
                if record is None:
                    unread += rebuilt
                elif not pending.knows(index, record.meta.identity.block):
                    census.add(record.meta.identity.block, pending.add(record))
                    if len(pending.added) == _BATCH:
                        pending = pending.applied(index)
        pending.applied(index)
        found = census.blocks - known
        if found and not rebuilt:
            log.info("%d records were written but not indexed when the appliance ended; they are now", found)
        for number in segments:
            sealed.tier.settle(number, census.extents(number))
        census.fill(policy)
        evicted = _fit(sealed, index, policy, census.kept)
    except BaseException:
        index.close()
        raise
    mended = Mended(found if rebuilt else 0, dangling, quarantined, unread, len(evicted), expired)
    tokens = census.tokens - sum(entry.n_tokens for entry in evicted)
    return Recovered(index, policy, tokens, census.newest_us, mended, census.kept)


class _Census:
    """What is stored, packed: its parts are let go as fill() and extents() give them out."""

    def __init__(self, owners: dict[int, str]) -> None:
        """`owners`: the tenant of each segment."""
        self._tenants = sorted(set(owners.values()))
        numbers = {tenant: n for n, tenant in enumerate(self._tenants)}
        self._owners = {segment: numbers[tenant] for segment, tenant in owners.items()}
        self.blocks = self.tokens = self.newest_us = 0
        self._ages = Runs(_AGE.size)
        self._places: dict[int, array[int]] = {}
        self.kept: dict[BlockId, int] = {}

    def add(self, block: BlockId, entry: IndexEntry) -> None:
        self.blocks += 1
        self.tokens += entry.n_tokens
        self.newest_us = max(self.newest_us, entry.used.us)
        used_us, *standing, until_us = entry.used
        if until_us != FOR_EVER:
            self.kept[block] = until_us
        extent = entry.extent
        owner = self._owners[extent.segment]
        self._ages.add(_AGE.pack(used_us, _DEEPEST - entry.start, block, entry.parent, *standing, owner))
        self._places.setdefault(extent.segment, array("Q")).extend((extent.offset, extent.length))

    def extents(self, segment: int) -> list[Extent]:
        places = iter(self._places.pop(segment, ()))
        return [Extent(segment, offset, length) for offset, length in zip(places, places, strict=True)]

    def fill(self, policy: FairShare[BlockId]) -> None:
        """One use stamps a whole prefix, so of equal stamps the deeper goes first. A parent and its name are one object."""
        parents: dict[bytes, tuple[BlockId, int]] = {}
        for packed in self._ages.drain():
            _, height, block, parent, uses, clock, owner = _AGE.unpack(packed)
            block, floor = parents.pop(block, (block, 0))
            parent, below = parents.get(parent, (parent, 0))
            standing = Standing(uses, clock, floor)
            policy.add(self._tenants[owner], block, parent, _DEEPEST - height, standing)
            parents[parent] = (parent, max(below, policy.standing(block).floor))


@dataclass
class _Pending:
    """Changes of the index that wait for their transaction."""

    retention_s: float | None
    """Of records that the index does not know, since they were sealed."""
    added: dict[BlockId, tuple[IndexEntry, Tokens]] = field(default_factory=dict)
    removed: set[BlockId] = field(default_factory=set)
    gone: list[int] = field(default_factory=list)
    ends: dict[int, int] = field(default_factory=dict)

    def knows(self, index: Index, block: BlockId) -> bool:
        return block in self.added or (block not in self.removed and bool(index.get_many([block])))

    def add(self, record: Found) -> IndexEntry:
        """Records of a segment come in order, so its committed end grows."""
        identity, extent = record.meta.identity, record.extent
        payload_bytes, n_tokens = sum(record.meta.frame_bytes), len(identity.tokens)
        until_us = FOR_EVER if self.retention_s is None else record.seq + int(self.retention_s * 1e6)
        used = LastUse(record.seq, until_us=until_us)
        entry = IndexEntry(extent, payload_bytes, n_tokens, identity.start, identity.parent, used)
        self.added[identity.block] = (entry, identity.tokens)
        self.ends[extent.segment] = extent.end
        return entry

    def applied(self, index: Index) -> _Pending:
        """What waits then: nothing."""
        if self.added or self.removed or self.gone:
            index.apply(Changes(added=self.added, removed=list(self.removed), ends=self.ends, gone=self.gone))
        return _Pending(self.retention_s)


def _own_segments(sealed: SealedTier) -> tuple[dict[int, int], dict[int, str], int]:
    """Ends and tenants of the segments whose superblock verifies, and how many others were set aside."""
    ends: dict[int, int] = {}
    owners: dict[int, str] = {}
    quarantined = 0
    for info in sealed.tier.scan():
        owner = _owner(sealed, info)
        if owner is not None:
            ends[info.segment], owners[info.segment] = info.end, owner
        elif info.head == b"":
            sealed.tier.settle(info.segment, ())  # created and never written: a crash, not damage
        else:
            sealed.tier.set_aside(info.segment)
            quarantined += 1
    return ends, owners, quarantined


def _records(sealed: SealedTier, number: int, start: int, end: int, *, heads_only: bool) -> Iterator[Found | None]:
    """Records of [start, end) of a segment, those that open as a whole unless `heads_only`; None for an unreadable page."""
    scratch = Scratch()
    for record in sealed.heads(number, start, end):
        if record is None or heads_only or _opens(sealed, record.extent, scratch):
            yield record


def _owner(sealed: SealedTier, info: SegmentInfo) -> str | None:
    """The tenant whose segment it is; None if it is not ours."""
    try:
        return sealed.check_superblock(info)
    except IntegrityError as error:
        if info.head != b"":
            log.warning("segment %016x is set aside: %s", info.segment, error)
        return None


def _open_index(sealed: SealedTier, keyring: Keyring, source: Path, target: Path) -> tuple[Index, bool]:
    """The checked index, or an empty one that is to be rebuilt (True)."""
    # 4 bytes of token id for at least some hundred bytes of KV: an eighth of the tier is far more than is ever used
    map_bytes = 2**30 + sealed.tier.properties.capacity_bytes // 8 // ALIGN_BYTES * ALIGN_BYTES
    secret, uuid = keyring.index_key, keyring.store_uuid
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if renew(source, target, index_key=secret, store_uuid=uuid, map_bytes=map_bytes):
            return Index(target, index_key=secret, store_uuid=uuid, map_bytes=map_bytes), False
        remove(target)
        return Index(target, index_key=secret, store_uuid=uuid, map_bytes=map_bytes, create=True), True
    except OSError as error:
        raise tier_error(error, f"cannot use {target.parent}") from None


def _opens(sealed: SealedTier, extent: Extent, scratch: Scratch) -> bool:
    try:
        sealed.verify(extent, scratch)
    except (IntegrityError, TierError):
        return False
    return True


def _fit(sealed: SealedTier, index: Index, policy: FairShare[BlockId], kept: dict[BlockId, int]) -> list[IndexEntry]:
    """Evict until the tier is within a capacity that may be smaller than before; what is pinned goes last."""
    evicted: list[IndexEntry] = []
    while excess := sealed.tier.shortfall(b"", ()):
        victims: dict[BlockId, IndexEntry] = {}
        for block in _in_order(policy, kept):
            if excess <= 0:
                break
            victims.update(found := index.get_many([block]))
            excess -= sum(entry.extent.length for entry in found.values())
        if not victims:
            break
        index.apply(Changes(removed=list(victims)))
        sealed.tier.free([entry.extent for entry in victims.values()])
        for block in victims:
            policy.remove(block)
        evicted += victims.values()
    return evicted


def _in_order(policy: FairShare[BlockId], kept: dict[BlockId, int]) -> Iterator[BlockId]:
    for pinned in (False, True):
        yield from (block for block in policy.oldest_first() if (kept.get(block) == PINNED) is pinned)
