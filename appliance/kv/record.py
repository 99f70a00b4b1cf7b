"""The bytes of a record, one sealed block at rest (FORMAT.md, "Record").

Invariant: identity goes into the additional data from the reader's request, never from the medium, so a record that
opens is the block that was asked for; what does not open leaves no byte of itself in a slot. Pure functions over buffers, no I/O;
any thread, and one Sealer may be shared by all of them.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from struct import Struct

import google_crc32c

from appliance.errors import IntegrityError
from appliance.kv.keys import length_prefixed
from appliance.kv.tiers.base import ALIGN_BYTES
from appliance.security.seal import NONCE_BYTES, TAG_BYTES, Buffer, Subkey, Xaes, wipe
from appliance.types import TOKEN_BYTES, BlockId, BlockLayout, Fingerprint, Tokens

HEADER_BYTES = 128
MAX_BLOCK_TOKENS = 4096
MAX_FRAMES = 1024
MAX_RECORD_BYTES = 2**32 - ALIGN_BYTES
MAX_NS_BYTES = 63

_MAGIC = b"KVR1"
_VERSION = 1
_XAES_256_GCM = 1
_LABEL = b"kva/rec/v1"
_HEADER = Struct("<4sBBH16s24s16sQQIIH")
_ZEROS_BEFORE_CRC = bytes(HEADER_BYTES - 4 - _HEADER.size)
_META = Struct("<32s32s32s32sQIHB63s")
_U32, _U64 = Struct("<I"), Struct("<Q")


@dataclass(frozen=True)
class RecordIdentity:
    """What a record claims to be, and what a reader must expect of it."""

    tenant: str
    ns: str
    block: BlockId
    parent: BlockId
    start: int
    tokens: Tokens
    fingerprint: Fingerprint


@dataclass(frozen=True)
class Header:
    """The part of a record in clear. Nothing in it is content; nothing in it is trusted before the frames verify."""

    data_key_id: bytes
    nonce: bytes
    slot_tag: bytes
    payload_bytes: int
    seq: int
    record_bytes: int
    meta_bytes: int
    """Sealed length of the meta frame."""
    frames: int
    raw: bytes
    """The 124 bytes under the checksum: additional data of every frame."""

    @property
    def head_bytes(self) -> int:
        """Header, meta frame and padding: what a scan reads of a record."""
        return _aligned(HEADER_BYTES + self.meta_bytes)


@dataclass(frozen=True)
class RecordMeta:
    """The opened meta frame."""

    identity: RecordIdentity
    frame_bytes: tuple[int, ...]


def head_bytes(n_tokens: int, frames: int) -> int:
    """Header, meta frame and padding of a record of n_tokens; a tail's is not larger than a full block's."""
    return _aligned(HEADER_BYTES + _sealed_meta_bytes(n_tokens, frames))


def record_bytes(layout: BlockLayout, n_tokens: int) -> int:
    """Bytes a block of n_tokens takes on the medium."""
    return _record_bytes(n_tokens, layout.frames(n_tokens))


def read_header(buf: Buffer) -> Header:
    """The header at the start of `buf`, with lengths that agree with each other. `buf` may end after the header."""
    if len(buf) < HEADER_BYTES:
        raise IntegrityError("record header is cut short", reason="torn")
    raw = bytes(buf[: HEADER_BYTES - 4])
    fields = _HEADER.unpack_from(raw)
    magic, version, algorithm, flags, dek_id, nonce, slot_tag, payload, seq, total, meta, frames = fields
    if magic != _MAGIC or bytes(buf[HEADER_BYTES - 4 : HEADER_BYTES]) != _U32.pack(google_crc32c.value(raw)):
        raise IntegrityError("record header is torn", reason="torn")
    if (version, algorithm, flags) != (_VERSION, _XAES_256_GCM, 0) or raw[_HEADER.size :] != _ZEROS_BEFORE_CRC:
        raise IntegrityError("record is of another format version", reason="version")
    header = Header(dek_id, nonce, slot_tag, payload, seq, total, meta, frames, raw)
    frames_fit = 1 <= frames <= MAX_FRAMES
    meta_fits = _sealed_meta_bytes(1, frames) <= meta <= _sealed_meta_bytes(MAX_BLOCK_TOKENS, frames)
    data_bytes = _aligned(payload + frames * TAG_BYTES)
    if not (frames_fit and meta_fits and total == header.head_bytes + data_bytes):
        raise IntegrityError("record lengths do not agree", reason="length")
    return header


class Sealer:
    """Seals and opens the records of one generation of one tenant's data key."""

    def __init__(
        self,
        *,
        store_uuid: bytes,
        tenant: str,
        data_key_id: bytes,
        data_key: bytes,
        locate_key: bytes,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        assert len(store_uuid) == len(data_key_id) == 16
        self.tenant = tenant
        self.data_key_id = data_key_id
        self._store_uuid = store_uuid
        self._xaes = Xaes(data_key)
        self._locate_key = locate_key
        self._random_bytes = random_bytes

    def slot_tag(self, block: BlockId) -> bytes:
        """What a header shows instead of the block id: 16 bytes, meaningless without the tenant's locate key."""
        return hmac.digest(self._locate_key, block, "sha256")[:16]

    def seal_record(
        self, out: memoryview, identity: RecordIdentity, frame_bytes: Sequence[int], payload: memoryview, seq: int
    ) -> int:
        """Write the whole record, padding included, to the start of `out`; returns its length."""
        assert identity.tenant == self.tenant
        assert len(payload) == sum(frame_bytes)
        meta = _pack_meta(identity, frame_bytes)
        total = _record_bytes(len(identity.tokens), frame_bytes)
        assert total <= MAX_RECORD_BYTES
        assert 1 <= len(frame_bytes) <= MAX_FRAMES
        assert len(out) >= total
        nonce = self._random_bytes(NONCE_BYTES)
        tag, meta_bytes, frames = self.slot_tag(identity.block), len(meta) + TAG_BYTES, len(frame_bytes)
        kind = (_MAGIC, _VERSION, _XAES_256_GCM, 0)
        raw = _HEADER.pack(*kind, self.data_key_id, nonce, tag, len(payload), seq, total, meta_bytes, frames)
        raw += _ZEROS_BEFORE_CRC
        out[:HEADER_BYTES] = raw + _U32.pack(google_crc32c.value(raw))
        subkey = self._xaes.subkey(nonce[:12])
        end = HEADER_BYTES + subkey.seal_into(_suffix(nonce, 0), meta, self._meta_aad(raw), out[HEADER_BYTES:])
        position = _aligned(end)
        wipe(out[end:position])
        read = 0
        for index, n in enumerate(frame_bytes, start=1):
            aad = self._frame_aad(identity, raw, len(payload), index, frames)
            position += subkey.seal_into(_suffix(nonce, index), payload[read : read + n], aad, out[position:])
            read += n
        wipe(out[position:total])
        return total

    def open_meta(self, buf: Buffer) -> RecordMeta:
        """Who the record at the start of `buf` says it is; needs its first `Header.head_bytes` only."""
        header = read_header(buf)
        if header.data_key_id != self.data_key_id:
            raise IntegrityError("record is sealed by another key", reason="identity")
        return self._open_meta(buf, header, self._xaes.subkey(header.nonce[:12]))

    def open_record(
        self, buf: memoryview, expected: RecordIdentity, frame_bytes: Sequence[int], slot: memoryview
    ) -> Header:
        """Open the record at the start of `buf` into `slot`, if it is the expected one; IntegrityError says why not."""
        header = read_header(buf)
        if expected.tenant != self.tenant or header.data_key_id != self.data_key_id:
            raise IntegrityError("record is sealed by another key", reason="identity")
        if header.slot_tag != self.slot_tag(expected.block):
            raise IntegrityError("record is another block", reason="identity")
        if header.payload_bytes != sum(frame_bytes) or header.frames != len(frame_bytes):
            raise IntegrityError("record has another shape than the block", reason="length")
        if len(buf) < header.record_bytes:
            raise IntegrityError("record is cut short", reason="torn")
        subkey = self._xaes.subkey(header.nonce[:12])
        meta = self._open_meta(buf, header, subkey)
        if meta.identity != expected or meta.frame_bytes != tuple(frame_bytes):
            raise IntegrityError("record is another block", reason="identity")
        try:
            self._open_frames(buf, header, subkey, expected, frame_bytes, slot)
        except IntegrityError:
            wipe(slot[: header.payload_bytes])
            raise
        return header

    def _open_meta(self, buf: Buffer, header: Header, subkey: Subkey) -> RecordMeta:
        end = HEADER_BYTES + header.meta_bytes
        if len(buf) < header.head_bytes or not _is_zero(buf[end : header.head_bytes]):
            raise IntegrityError("record head is torn", reason="torn")
        plain = bytearray(header.meta_bytes - TAG_BYTES)
        subkey.open_into(_suffix(header.nonce, 0), buf[HEADER_BYTES:end], self._meta_aad(header.raw), memoryview(plain))
        return _unpack_meta(bytes(plain), self.tenant, header)

    def _open_frames(
        self,
        buf: memoryview,
        header: Header,
        subkey: Subkey,
        expected: RecordIdentity,
        frame_bytes: Sequence[int],
        slot: memoryview,
    ) -> None:
        position, written = header.head_bytes, 0
        for index, n in enumerate(frame_bytes, start=1):
            aad = self._frame_aad(expected, header.raw, sum(frame_bytes), index, len(frame_bytes))
            sealed = buf[position : position + n + TAG_BYTES]
            written += subkey.open_into(_suffix(header.nonce, index), sealed, aad, slot[written:])
            position += len(sealed)
        if not _is_zero(buf[position : header.record_bytes]):
            raise IntegrityError("record padding is not zero", reason="torn")

    def _meta_aad(self, raw: bytes) -> bytes:
        # No block id here: a scan that rebuilds the index does not know it yet.
        return length_prefixed(_LABEL, self._store_uuid, self.tenant.encode(), self.data_key_id, _U32.pack(0), raw)

    def _frame_aad(self, identity: RecordIdentity, raw: bytes, payload_bytes: int, index: int, frames: int) -> bytes:
        who = (identity.tenant.encode(), identity.ns.encode(), self.data_key_id, identity.block)
        shape = (_U64.pack(payload_bytes), _U32.pack(index), _U32.pack(frames))
        fingerprint = identity.fingerprint
        return length_prefixed(_LABEL, self._store_uuid, *who, fingerprint.model, fingerprint.layout, *shape, raw)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES


def _is_zero(padding: Buffer) -> bool:
    return bytes(padding) == bytes(len(padding))


def _sealed_meta_bytes(n_tokens: int, frames: int) -> int:
    return _META.size + _U64.size * frames + TOKEN_BYTES * n_tokens + TAG_BYTES


def _record_bytes(n_tokens: int, frame_bytes: Sequence[int]) -> int:
    frames = len(frame_bytes)
    return head_bytes(n_tokens, frames) + _aligned(sum(frame_bytes) + frames * TAG_BYTES)


def _suffix(nonce: bytes, frame: int) -> bytes:
    """Last 12 bytes of the frame's nonce: the record's, with the frame index XORed into the last four."""
    last = int.from_bytes(nonce[20:], "little") ^ frame
    return nonce[12:20] + last.to_bytes(4, "little")


def _pack_meta(identity: RecordIdentity, frame_bytes: Sequence[int]) -> bytes:
    ns = identity.ns.encode()
    n_tokens = len(identity.tokens)
    assert len(ns) <= MAX_NS_BYTES
    assert 1 <= n_tokens <= MAX_BLOCK_TOKENS
    names = (identity.fingerprint.model, identity.fingerprint.layout, identity.block, identity.parent)
    fixed = _META.pack(*names, identity.start, n_tokens, len(frame_bytes), len(ns), ns)
    return fixed + b"".join(map(_U64.pack, frame_bytes)) + identity.tokens.data


def _unpack_meta(plain: bytes, tenant: str, header: Header) -> RecordMeta:
    """Fields of a verified meta frame; still checked, since they size what follows."""
    model, layout, block, parent, start, n_tokens, frames, ns_bytes, ns = _META.unpack_from(plain)
    if len(plain) != _sealed_meta_bytes(n_tokens, frames) - TAG_BYTES or frames != header.frames:
        raise IntegrityError("record meta frame has another length than it says", reason="length")
    tokens_at = _META.size + _U64.size * frames
    frame_bytes = tuple(n for (n,) in _U64.iter_unpack(plain[_META.size : tokens_at]))
    if sum(frame_bytes) != header.payload_bytes or ns_bytes > len(ns):
        raise IntegrityError("record meta frame does not match its header", reason="length")
    identity = RecordIdentity(
        tenant=tenant,
        ns=ns[:ns_bytes].decode(),
        block=BlockId(block),
        parent=BlockId(parent),
        start=start,
        tokens=Tokens(plain[tokens_at:]),
        fingerprint=Fingerprint(model, layout),
    )
    return RecordMeta(identity, frame_bytes)
