"""Opens every record and cross-checks the index, beside a serving store or without one.

Invariant: a record that changed or went while it was read is not held against anybody. Synchronous; one thread at a time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from struct import Struct

from appliance.api.control import VerifyProgress, VerifyReport
from appliance.errors import IntegrityError, TierError
from appliance.kv.index import Index, IndexEntry
from appliance.kv.recovery import NOTHING_MENDED, Mended
from appliance.kv.runs import Runs
from appliance.kv.tiers.sealed import Scratch, SealedTier
from appliance.types import BlockId

_STEP_BYTES = 32 * 2**20
_PLACE = Struct(">QQ32s")  # segment, offset, block: in the order of reading

Drop = Callable[[Sequence[BlockId]], object]
"""Forgets blocks: their index entries, then their bytes."""


def verify(
    sealed: SealedTier, index: Index, *, drop: Drop | None, mended: Mended = NOTHING_MENDED
) -> Iterator[VerifyProgress]:
    """The last step carries the report. `mended` is what the opening before this found wrong; with `drop`, put right.

    bad: records by reason, and "segment" for each one that does not verify, "unread" for each page a rebuild could not read.
    index_missing: records that were found again because the index was gone. index_dangling: entries without a readable record.
    """
    started_s = time.perf_counter()
    places = Runs(_PLACE.size)
    for block, entry in index.entries():
        places.add(_PLACE.pack(entry.extent.segment, entry.extent.offset, block))
    total = len(places)
    bad: dict[BlockId, str] = {}
    nbytes = checked = since_step = 0
    scratch = Scratch()
    for n, packed in enumerate(places.drain(), start=1):
        block = BlockId(_PLACE.unpack(packed)[2])
        known = index.get_many([block]).get(block)
        if known is None:
            continue
        reason = _fault(sealed, block, known, scratch)
        if reason is None or _is_there(index, block, known):
            checked += 1
            nbytes += known.extent.length
            if reason is not None:
                bad[block] = reason
        since_step += known.extent.length
        if since_step >= _STEP_BYTES:
            since_step = 0
            yield VerifyProgress(records_done=n, records_total=total)
    if drop is not None and bad:
        drop(list(bad))
    reasons = Counter(reason for reason in bad.values() if reason != "lost")
    lost = len(bad) - reasons.total()
    reasons.update({"segment": mended.quarantined, "unread": mended.unread})
    before = mended.found + mended.dangling + mended.quarantined + mended.unread
    report = VerifyReport(
        segments=sealed.tier.usage().segments,
        records=checked,
        bytes_read=nbytes,
        ok=checked - len(bad),
        bad=dict(+reasons),
        index_missing=mended.found,
        index_dangling=mended.dangling + lost,
        repaired=0 if drop is None else before + len(bad),
        seconds=time.perf_counter() - started_s,
    )
    yield VerifyProgress(records_done=total, records_total=total, report=report)


def _is_there(index: Index, block: BlockId, entry: IndexEntry) -> bool:
    now = index.get_many([block]).get(block)
    return now is not None and now.extent == entry.extent


def _fault(sealed: SealedTier, block: BlockId, entry: IndexEntry, scratch: Scratch) -> str | None:
    """Why the record is not what the index says; "lost" if the medium does not give it."""
    try:
        meta = sealed.verify(entry.extent, scratch)
    except IntegrityError as error:
        return error.reason
    except TierError:
        return "lost"
    identity = meta.identity
    said = (entry.parent, entry.start, entry.n_tokens, entry.payload_bytes)
    same = said == (identity.parent, identity.start, len(identity.tokens), sum(meta.frame_bytes))
    return None if same and identity.block == block else "identity"
