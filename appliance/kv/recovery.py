"""Start-up: makes index, segments and capacity agree before the store serves (FORMAT.md, "Segments, index and crash rules").

Invariant: afterwards every index entry lies inside a segment of ours, every byte outside an entry was given back, and
the tier is within its capacity. The segments are the truth; whatever the index lacks is rebuilt from them. Blocking;
runs before anything else uses tier or index.
"""

from __future__ import annotations

import logging
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from appliance.errors import IntegrityError, TierError
from appliance.kv.check import remove, renew
from appliance.kv.index import FILE_NAME, Changes, Index, IndexEntry
from appliance.kv.tiers.base import ALIGN_BYTES, Extent, SegmentInfo
from appliance.kv.tiers.files import tier_error
from appliance.kv.tiers.sealed import Found, Scratch, SealedTier
from appliance.security.keyring import Keyring
from appliance.types import BlockId, Tokens

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mended:
    """What start-up found wrong, and put right."""

    found: int = 0
    """Records indexed anew because the index was missing or damaged."""
    dangling: int = 0
    """Index entries dropped: their segment is missing, short or set aside."""
    quarantined: int = 0
    """Segments set aside."""
    evicted: int = 0
    """Blocks beyond the capacity."""

    @property
    def notes(self) -> tuple[str, ...]:
        """For an operator."""
        said = (
            (self.found, "the index was missing or damaged: rebuilt from {} records"),
            (self.dangling, "{} blocks were lost with their segments"),
            (self.quarantined, "{} segments do not verify and were set aside"),
        )
        return tuple(text.format(n) for n, text in said if n)


NOTHING_MENDED = Mended()


@dataclass(frozen=True)
class Recovered:
    """An index and its segments that agree."""

    index: Index
    entries: dict[BlockId, IndexEntry]
    """Everything that is stored."""
    adopted: int
    """Good records beyond a committed end: durable before the crash, but not yet indexed."""
    mended: Mended


def recover(sealed: SealedTier, keyring: Keyring, folder: Path) -> Recovered:
    """TierError if the medium, or the folder of the index, cannot be used at all."""
    segments, quarantined = _own_segments(sealed)
    index, rebuilt = _open_index(sealed, keyring, folder)
    entries = dict(index.entries())
    committed = index.ends()
    lost = [block for block, entry in entries.items() if entry.extent.end > segments.get(entry.extent.segment, 0)]
    for block in lost:
        del entries[block]
    index.apply(Changes(removed=lost, gone=[number for number in committed if number not in segments]))
    known = len(entries)
    live: dict[int, list[Extent]] = {number: [] for number in segments}
    for number, end in segments.items():
        added = _scan(sealed, entries, number, committed.get(number, ALIGN_BYTES), end, heads_only=rebuilt)
        end = max((entry.extent.end for entry, _ in added.values()), default=committed.get(number, ALIGN_BYTES))
        index.apply(Changes(added=added, ends={number: end}))
        entries.update((block, entry) for block, (entry, _) in added.items())
    found = len(entries) - known
    for entry in entries.values():
        live[entry.extent.segment].append(entry.extent)
    for number, extents in live.items():
        sealed.tier.settle(number, extents)
    evicted = _fit(sealed, index, entries)
    mended = Mended(found if rebuilt else 0, len(lost), quarantined, evicted)
    return Recovered(index, entries, 0 if rebuilt else found, mended)


def _own_segments(sealed: SealedTier) -> tuple[dict[int, int], int]:
    """Ends of the segments whose superblock verifies, and how many others were set aside."""
    ends: dict[int, int] = {}
    quarantined = 0
    for info in sealed.tier.scan():
        if _is_ours(sealed, info):
            ends[info.segment] = info.end
        elif info.head == b"":
            sealed.tier.settle(info.segment, ())  # created and never written: a crash, not damage
        else:
            sealed.tier.set_aside(info.segment)
            quarantined += 1
    return ends, quarantined


def _scan(
    sealed: SealedTier, known: Container[BlockId], number: int, start: int, end: int, *, heads_only: bool
) -> dict[BlockId, tuple[IndexEntry, Tokens]]:
    """Records of [start, end) of a segment that are not known yet; those that open as a whole, unless `heads_only`."""
    found: dict[BlockId, tuple[IndexEntry, Tokens]] = {}
    scratch = Scratch()
    for record in sealed.heads(number, start, end):
        block = record.meta.identity.block
        if block not in known and (heads_only or _opens(sealed, record.extent, scratch)):
            found[block] = (_entry(record), record.meta.identity.tokens)
    return found


def _is_ours(sealed: SealedTier, info: SegmentInfo) -> bool:
    try:
        sealed.superblock(info)
    except IntegrityError as error:
        if info.head != b"":
            log.warning("segment %016x is set aside: %s", info.segment, error)
        return False
    return True


def _open_index(sealed: SealedTier, keyring: Keyring, folder: Path) -> tuple[Index, bool]:
    """The checked index, or an empty one that is to be rebuilt (True)."""
    path = folder / FILE_NAME
    # 4 bytes of token id for at least some hundred bytes of KV: an eighth of the tier is far more than is ever used
    map_bytes = 2**30 + sealed.tier.properties.capacity_bytes // 8 // ALIGN_BYTES * ALIGN_BYTES
    secret, uuid = keyring.index_key, keyring.store_uuid
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if renew(path, index_key=secret, store_uuid=uuid, map_bytes=map_bytes):
            return Index(path, index_key=secret, store_uuid=uuid, map_bytes=map_bytes), False
        remove(path)
        return Index(path, index_key=secret, store_uuid=uuid, map_bytes=map_bytes, create=True), True
    except OSError as error:
        raise tier_error(error, f"cannot use {folder}") from None


def _opens(sealed: SealedTier, extent: Extent, scratch: Scratch) -> bool:
    try:
        sealed.verify(extent, scratch)
    except (IntegrityError, TierError):
        return False
    return True


def _entry(record: Found) -> IndexEntry:
    identity = record.meta.identity
    return IndexEntry(
        record.extent, sum(record.meta.frame_bytes), len(identity.tokens), identity.start, identity.parent, record.seq
    )


def _fit(sealed: SealedTier, index: Index, entries: dict[BlockId, IndexEntry]) -> int:
    """Evict, least recently used and deepest first, until the tier is within a capacity that may be smaller than before."""
    before = len(entries)
    order = iter(by_age(entries))
    while excess := sealed.tier.shortfall(b"", ()):
        victims: list[BlockId] = []
        while excess > 0 and (block := next(order, None)) is not None:
            victims.append(block)
            excess -= entries[block].extent.length
        if not victims:
            break
        index.apply(Changes(removed=victims))
        sealed.tier.free([entries.pop(block).extent for block in victims])
    return before - len(entries)


def by_age(entries: dict[BlockId, IndexEntry]) -> list[BlockId]:
    """Blocks in the order of eviction: one use stamps a whole prefix, so of equal stamps the deeper goes first."""
    return sorted(entries, key=lambda block: (entries[block].used_us, -entries[block].start))
