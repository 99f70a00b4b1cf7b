"""Opens every record and cross-checks the index, beside a serving store or without one.

Invariant: a record that changed or went while it was read is not held against anybody. Synchronous; one thread at a time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from appliance.api.control import VerifyProgress, VerifyReport
from appliance.errors import IntegrityError, TierError
from appliance.kv.index import Index, IndexEntry
from appliance.kv.recovery import NOTHING_MENDED, Mended
from appliance.kv.tiers.sealed import Scratch, SealedTier
from appliance.types import BlockId

_STEP_BYTES = 32 * 2**20

Drop = Callable[[Sequence[BlockId]], object]
"""Forgets blocks: their index entries, then their bytes."""


def verify(
    sealed: SealedTier, index: Index, *, drop: Drop | None, mended: Mended = NOTHING_MENDED
) -> Iterator[VerifyProgress]:
    """The last step carries the report. `mended` is what the start before this found wrong, and put right.

    index_missing: records a rebuild found; 0 if the index was whole. index_dangling: entries without a readable record.
    """
    started_s = time.perf_counter()
    entries = sorted(index.entries(), key=lambda item: item[1].extent)
    bad: dict[BlockId, str] = {}
    nbytes = checked = since_step = 0
    scratch = Scratch()
    for n, (block, entry) in enumerate(entries):
        reason = _fault(sealed, block, entry, scratch)
        if reason is None or _is_there(index, block, entry):
            checked += 1
            nbytes += entry.extent.length
            if reason is not None:
                bad[block] = reason
        since_step += entry.extent.length
        if since_step >= _STEP_BYTES:
            since_step = 0
            yield VerifyProgress(records_done=n + 1, records_total=len(entries))
    if drop is not None and bad:
        drop(list(bad))
    reasons = Counter(reason for reason in bad.values() if reason != "lost")
    report = VerifyReport(
        segments=sealed.tier.usage().segments,
        records=checked,
        bytes_read=nbytes,
        ok=checked - len(bad),
        bad=dict(reasons),
        index_missing=mended.found,
        index_dangling=mended.dangling + len(bad) - reasons.total(),
        repaired=mended.found + mended.dangling + (len(bad) if drop is not None else 0),
        seconds=time.perf_counter() - started_s,
    )
    yield VerifyProgress(records_done=len(entries), records_total=len(entries), report=report)


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
