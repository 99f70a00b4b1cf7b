"""Start-up: makes index, segments and capacity agree before the store serves (FORMAT.md, "Segments, index and crash rules").

Invariant: afterwards every index entry lies inside a segment of ours, every byte outside an entry was given back, and
the tier is within its capacity. The segments are the truth; whatever the index lacks is rebuilt from them. Blocking;
runs before anything else uses tier or index.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from appliance.errors import IntegrityError, TierError
from appliance.kv.check import remove, renew
from appliance.kv.index import FILE_NAME, Changes, Index, IndexEntry
from appliance.kv.tiers.base import ALIGN_BYTES, Extent, SegmentInfo
from appliance.kv.tiers.sealed import Found, Scratch, SealedTier
from appliance.security.keyring import Keyring
from appliance.types import BlockId, Tokens

log = logging.getLogger(__name__)


@dataclass
class Recovered:
    """What start-up found, and mended."""

    index: Index
    entries: dict[BlockId, IndexEntry]
    """Everything that is stored."""
    rebuilt: bool = False
    """The index was missing or damaged."""
    adopted: int = 0
    """Good records beyond the committed end: written, but not indexed before the crash."""
    found: int = 0
    """Records of a rebuild."""
    dangling: int = 0
    """Index entries whose segment is missing, short or set aside."""
    quarantined: int = 0
    """Segments set aside."""
    evicted: int = 0
    """Blocks beyond the capacity."""


def recover(sealed: SealedTier, keyring: Keyring, folder: Path) -> Recovered:
    """TierError if the medium, or the folder of the index, cannot be used at all."""
    segments, quarantined = _own_segments(sealed)
    state = _open_index(sealed, keyring, folder)
    state.quarantined = quarantined
    state.entries = dict(state.index.entries())
    committed = state.index.ends()
    lost = [b for b, entry in state.entries.items() if entry.extent.end > segments.get(entry.extent.segment, 0)]
    for block in lost:
        del state.entries[block]
    state.dangling = len(lost)
    state.index.apply(Changes(removed=lost, gone=[number for number in committed if number not in segments]))
    for number, end in segments.items():
        _adopt(sealed, state, number, committed.get(number, ALIGN_BYTES), end)
        live = [entry.extent for entry in state.entries.values() if entry.extent.segment == number]
        sealed.tier.settle(number, live)
    _fit(sealed, state)
    return state


def _own_segments(sealed: SealedTier) -> tuple[dict[int, int], int]:
    """Ends of the segments whose superblock verifies, and how many others were set aside."""
    ends: dict[int, int] = {}
    quarantined = 0
    for info in sealed.tier.scan():
        if _is_ours(sealed, info):
            ends[info.segment] = info.end
        elif not info.head:
            sealed.tier.settle(info.segment, ())  # created and never written: a crash, not damage
        else:
            sealed.tier.set_aside(info.segment)
            quarantined += 1
    return ends, quarantined


def _adopt(sealed: SealedTier, state: Recovered, number: int, start: int, end: int) -> None:
    """Index the records of a segment from `start` on: by their heads if the index is new, else only if they open."""
    added: dict[BlockId, tuple[IndexEntry, Tokens]] = {}
    scratch = Scratch()
    for record in sealed.heads(number, start, end):
        identity = record.meta.identity
        if identity.block not in state.entries and (state.rebuilt or _opens(sealed, record.extent, scratch)):
            added[identity.block] = (_entry(record), identity.tokens)
            state.entries[identity.block] = added[identity.block][0]
            start = record.extent.end
    state.index.apply(Changes(added=added, ends={number: start}))
    if state.rebuilt:
        state.found += len(added)
    else:
        state.adopted += len(added)


def _is_ours(sealed: SealedTier, info: SegmentInfo) -> bool:
    try:
        sealed.superblock(info)
    except IntegrityError as error:
        if info.head:
            log.warning("segment %016x is set aside: %s", info.segment, error)
        return False
    return True


def _open_index(sealed: SealedTier, keyring: Keyring, folder: Path) -> Recovered:
    path = folder / FILE_NAME
    # 4 bytes of token id for at least some hundred bytes of KV: an eighth of the tier is far more than is ever used
    map_bytes = 2**30 + sealed.tier.properties.capacity_bytes // 8 // ALIGN_BYTES * ALIGN_BYTES
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        checked = renew(path, index_key=keyring.index_key, store_uuid=keyring.store_uuid, map_bytes=map_bytes)
        if not checked:
            remove(path)
        index = Index(
            path, index_key=keyring.index_key, store_uuid=keyring.store_uuid, map_bytes=map_bytes, create=not checked
        )
    except OSError as error:
        raise TierError(f"cannot use {folder}: {error.strerror}") from None
    return Recovered(index, {}, rebuilt=not checked)


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


def _fit(sealed: SealedTier, state: Recovered) -> None:
    """Evict, least recently used and deepest first, until the tier is within a capacity that may be smaller than before."""
    order = iter(by_age(state.entries))
    while excess := sealed.tier.shortfall(b"", ()):
        victims: list[BlockId] = []
        while excess > 0 and (block := next(order, None)) is not None:
            victims.append(block)
            excess -= state.entries[block].extent.length
        if not victims:
            return
        state.index.apply(Changes(removed=victims))
        sealed.tier.free([state.entries.pop(block).extent for block in victims])
        state.evicted += len(victims)


def by_age(entries: dict[BlockId, IndexEntry]) -> list[BlockId]:
    """Blocks in the order of eviction: one use stamps a whole prefix, so of equal stamps the deeper goes first."""
    return sorted(entries, key=lambda block: (entries[block].used_us, -entries[block].start))
