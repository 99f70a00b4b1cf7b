"""The index: which block is where. Derived data in LMDB; the segments are the truth (FORMAT.md, "Segments, index and crash rules").

Invariant: an entry is added only after its record is durable and removed, durably, before its bytes are freed. Every
value is authenticated under the index key together with its own key: a value that does not verify does not exist.
Threading: one writer at a time (`apply`); reads from any thread beside it, none beside `close`.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple

import lmdb

from appliance.errors import IntegrityError, TierError, TierFull, TierIO
from appliance.kv.keys import length_prefixed
from appliance.kv.retention import FOR_EVER
from appliance.kv.siblings import Child, SiblingCache
from appliance.kv.tiers.base import Extent
from appliance.security.seal import NONCE_BYTES, Xaes
from appliance.types import BlockId, Tokens

FORMAT_VERSION = 3
FILE_NAME = "index.lmdb"

_BLOCK = Struct("<QQQQII32sQIdQ")
_LAST_USE = Struct("<QIdQ")
_SEGMENT = Struct("<Q")
_U64 = Struct(">Q")  # big-endian keys: LMDB's order is the order of segments
_META = Struct("<I16s")
_AT_ONCE = 1024
"""Children that are decrypted while a lookup waits: about 10 ms."""
_MAC_BYTES = 16
_ID_BYTES = 32


class LastUse(NamedTuple):
    """When it was, what the eviction policy knew (policy.Standing), and how long the block is kept since."""

    us: int
    """Microseconds since 1970."""
    uses: int = 0
    clock: float = 0.0
    until_us: int = FOR_EVER
    """As retention.py counts."""


@dataclass(frozen=True, slots=True)
class IndexEntry:
    extent: Extent
    payload_bytes: int
    n_tokens: int
    start: int
    parent: BlockId
    used: LastUse
    """The last one that was written down."""


@dataclass(frozen=True)
class Changes:
    """One transaction. Removals are applied before additions."""

    added: Mapping[BlockId, tuple[IndexEntry, Tokens]] = field(default_factory=dict)
    removed: Sequence[BlockId] = ()
    used: Mapping[BlockId, LastUse] = field(default_factory=dict)
    """Of blocks that are still there."""
    ends: Mapping[int, int] = field(default_factory=dict)
    """Committed end of segments: what lies beyond is not in the index yet."""
    gone: Sequence[int] = ()
    """Segments that no longer exist."""


class Index:
    def __init__(
        self,
        path: Path,
        *,
        index_key: bytes,
        store_uuid: bytes,
        map_bytes: int,
        create: bool = False,
        read_only: bool = False,
    ) -> None:
        """TierError if LMDB refuses; IntegrityError if it is another store's or version's.

        `create` starts an empty one; `read_only` leaves no trace in the folder, for a file nobody else has open.
        """
        self._mac = hashlib.blake2b(key=_derive(index_key, b"mac"), digest_size=_MAC_BYTES)
        self._xaes = Xaes(_derive(index_key, b"children"))
        self._siblings = SiblingCache()
        self._reader = ThreadPoolExecutor(1, "index")
        self._closing = False
        try:
            self._env = lmdb.open(
                str(path),
                subdir=False,
                max_dbs=4,
                map_size=map_bytes,
                create=create,
                mode=0o600,
                readonly=read_only,
                lock=not read_only,
            )
            self._meta, self._blocks, self._children, self._segments = (
                self._env.open_db(name, create=create) for name in (b"meta", b"blocks", b"children", b"segments")
            )
            if create:
                with self._env.begin(write=True) as txn:
                    txn.put(b"format", self._sign(b"format", _META.pack(FORMAT_VERSION, store_uuid)), db=self._meta)
            with self._env.begin() as txn:
                stamp = self._verified(b"format", txn.get(b"format", db=self._meta))
        except lmdb.Error as error:
            raise _failed(error) from None
        if stamp != _META.pack(FORMAT_VERSION, store_uuid):
            self._env.close()
            raise IntegrityError("index is another store's, another version's or damaged", reason="version")

    # --- reading -------------------------------------------------------------------------------------------------

    def get_many(self, blocks: Iterable[BlockId]) -> dict[BlockId, IndexEntry]:
        """The entries of those that are there."""
        with self._cursor(self._blocks) as cursor:
            found = cursor.getmulti(list(blocks))
        return {BlockId(key): _unpack(value) for key, value in found if self._genuine(key, value)}

    def children(self, parent: BlockId) -> list[Child]:
        """(token bytes, block) of the children, sorted by token bytes. The list is a shared one: do not change it.

        Of a parent not asked for lately these are _AT_ONCE children, until a thread has read the others behind them; of
        more than FAMILY children so many.
        """
        known = self._siblings.get(parent)
        if known is not None:
            return known
        self._siblings.begin(parent)
        rest = self._read_children(parent, parent)
        if rest is not None:
            self._reader.submit(self._read_on, parent, rest)
        return self._siblings.get(parent) or []

    def _read_children(self, parent: BlockId, start: bytes) -> bytes | None:
        """Decrypt _AT_ONCE children from key `start` on. Returns where to go on, if there is more and use for it."""
        found: list[Child] = []
        rest: bytes | None = None
        try:
            with self._cursor(self._children) as cursor:
                more = cursor.set_range(start)
                while more and (key := cursor.key()).startswith(parent):
                    if len(found) == _AT_ONCE:
                        rest = key
                        break
                    tokens = self._open_tokens(key, cursor.value())
                    if tokens is not None:
                        found.append((tokens, BlockId(key[_ID_BYTES:])))
                    more = cursor.next()
        except TierError:
            self._siblings.forget(parent)
            raise
        return rest if self._siblings.merge(parent, found, last=rest is None) else None

    def _read_on(self, parent: BlockId, rest: bytes | None) -> None:
        with suppress(TierError):  # forgotten: the next lookup begins anew
            while rest is not None and not self._closing:
                rest = self._read_children(parent, rest)

    def child_tokens(self, parent: BlockId, block: BlockId) -> Tokens | None:
        """Token ids of one block."""
        with self._cursor(self._children) as cursor:
            sealed = cursor.get(parent + block)
        tokens = self._open_tokens(parent + block, sealed) if sealed is not None else None
        return None if tokens is None else Tokens(tokens)

    def entries(self) -> Iterator[tuple[BlockId, IndexEntry]]:
        """Every genuine entry, as of now."""
        with self._cursor(self._blocks) as cursor:
            for key, value in cursor:
                if self._genuine(key, value):
                    yield BlockId(key), _unpack(value)

    def ends(self) -> dict[int, int]:
        with self._cursor(self._segments) as cursor:
            signed = [(key, self._verified(key, value)) for key, value in cursor]
        return {_U64.unpack(key)[0]: _SEGMENT.unpack(end)[0] for key, end in signed if end is not None}

    def check(self) -> int:
        """Read everything, by iteration and by key; IntegrityError at the first thing wrong. Returns the blocks.

        Damage may crash or hang the process in here: only `check.py`'s child process calls it.
        """
        with self._env.begin() as txn:
            for key, value in self._walk(txn, self._blocks, _ID_BYTES):
                if not self._genuine(key, value) or len(value) != _BLOCK.size + _MAC_BYTES:
                    raise IntegrityError("index entry does not verify", reason="index")
                if txn.get(_unpack(value).parent + key, db=self._children) is None:
                    raise IntegrityError("index entry has no tokens", reason="index")
            for key, value in self._walk(txn, self._children, 2 * _ID_BYTES):
                if self._open_tokens(key, value) is None:
                    raise IntegrityError("index tokens do not verify", reason="index")
            for key, value in self._walk(txn, self._segments, _U64.size):
                if not self._genuine(key, value) or len(value) != _SEGMENT.size + _MAC_BYTES:
                    raise IntegrityError("index segment entry does not verify", reason="index")
            blocks, children = (int(txn.stat(db)["entries"]) for db in (self._blocks, self._children))
            if blocks != children:
                raise IntegrityError("index tables do not agree", reason="index")
        return blocks

    def copy(self, path: Path) -> None:
        """A compacted copy: every page is read and written anew. TierError if it cannot be written, IntegrityError if
        LMDB finds damage on the way."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            self._env.copyfd(fd, compact=True)
            os.fsync(fd)
        except lmdb.Error as error:
            if type(error) is lmdb.Error or isinstance(error, lmdb.DiskError):  # an errno of the write
                raise _failed(error) from None
            raise IntegrityError("index cannot be copied", reason="index") from None
        finally:
            os.close(fd)

    # --- writing -------------------------------------------------------------------------------------------------

    def apply(self, changes: Changes) -> None:
        """All of it, durable when this returns, or TierError and nothing."""
        dropped: list[tuple[BlockId, BlockId]] = []
        try:
            with self._env.begin(write=True) as txn:
                for block in changes.removed:
                    value = txn.pop(block, db=self._blocks)
                    if value is not None:
                        parent = _unpack(value).parent
                        txn.delete(parent + block, db=self._children)
                        dropped.append((parent, block))
                for number in changes.gone:
                    txn.delete(_U64.pack(number), db=self._segments)
                for block, used in changes.used.items():
                    self._touch(txn, block, used)
                for block, (entry, tokens) in changes.added.items():
                    txn.put(block, self._sign(block, _pack(entry)), db=self._blocks)
                    key = entry.parent + block
                    txn.put(key, self._xaes.seal(os.urandom(NONCE_BYTES), tokens.data, key), db=self._children)
                for number, end in changes.ends.items():
                    key = _U64.pack(number)
                    txn.put(key, self._sign(key, _SEGMENT.pack(end)), db=self._segments)
        except lmdb.Error as error:
            raise _failed(error) from None
        for parent, block in dropped:
            self._siblings.discard(parent, block)
        for block, (entry, tokens) in changes.added.items():
            self._siblings.add(entry.parent, tokens.data, block)

    def close(self) -> None:
        self._closing = True
        self._reader.shutdown()
        self._env.close()

    def _touch(self, txn: Any, block: BlockId, used: LastUse) -> None:
        value = txn.get(block, db=self._blocks)
        if value is not None and self._genuine(block, value):
            changed = value[: _BLOCK.size - _LAST_USE.size] + _LAST_USE.pack(*used)
            txn.put(block, self._sign(block, changed), db=self._blocks)

    @contextmanager
    def _cursor(self, db: Any) -> Iterator[Any]:
        try:
            with self._env.begin() as txn, txn.cursor(db) as cursor:
                yield cursor
        except lmdb.Error as error:
            raise _failed(error) from None

    @staticmethod
    def _walk(txn: Any, db: Any, key_bytes: int) -> Iterator[tuple[bytes, bytes]]:
        previous, count = b"", 0
        with txn.cursor(db) as cursor:
            for key, value in cursor:
                if len(key) != key_bytes or key <= previous or txn.get(key, db=db) != value:
                    raise IntegrityError("index is out of order", reason="index")
                previous, count = key, count + 1
                yield key, value
        if count != txn.stat(db)["entries"]:
            raise IntegrityError("index counts do not agree", reason="index")

    # --- authenticity --------------------------------------------------------------------------------------------

    def _sign(self, key: bytes, value: bytes) -> bytes:
        mac = self._mac.copy()
        mac.update(length_prefixed(key, value))
        return value + mac.digest()

    def _genuine(self, key: bytes, signed: bytes) -> bool:
        mac = self._mac.copy()
        mac.update(length_prefixed(key, signed[:-_MAC_BYTES]))
        return hmac.compare_digest(mac.digest(), signed[-_MAC_BYTES:])

    def _verified(self, key: bytes, signed: bytes | None) -> bytes | None:
        if signed is None or not self._genuine(key, signed):
            return None
        return signed[:-_MAC_BYTES]

    def _open_tokens(self, key: bytes, sealed: bytes) -> bytes | None:
        try:
            return self._xaes.open(sealed, key)
        except IntegrityError:
            return None


def _derive(index_key: bytes, purpose: bytes) -> bytes:
    return hmac.digest(index_key, length_prefixed(b"kva/index/v1", purpose), "sha256")


def _pack(entry: IndexEntry) -> bytes:
    extent = entry.extent
    return _BLOCK.pack(
        extent.segment,
        extent.offset,
        extent.length,
        entry.start,
        entry.payload_bytes,
        entry.n_tokens,
        entry.parent,
        *entry.used,
    )


def _unpack(value: bytes) -> IndexEntry:
    segment, offset, length, start, payload, n_tokens, parent, *used = _BLOCK.unpack_from(value)
    return IndexEntry(Extent(segment, offset, length), payload, n_tokens, start, BlockId(parent), LastUse(*used))


def _failed(error: lmdb.Error) -> TierError:
    kind = TierFull if isinstance(error, (lmdb.MapFullError, lmdb.DiskError)) else TierIO
    return kind(f"index: {type(error).__name__}")
