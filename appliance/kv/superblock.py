"""The first 4096 bytes of a segment (FORMAT.md, "Superblock"): whose segment it is and under which key.

Invariant: a superblock that passes the check was written by a holder of the data key for this store and this segment number.
Pure functions; any thread.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from struct import Struct

import google_crc32c

from appliance.errors import IntegrityError
from appliance.kv.keys import length_prefixed
from appliance.kv.tiers.base import ALIGN_BYTES
from appliance.security.seal import Buffer

SUPERBLOCK_BYTES = ALIGN_BYTES

_MAGIC = b"KVSEGMNT"
_VERSION = 1
_FIELDS = Struct("<8sHHI16sQ16sI4x32s")
_CRC_AT = SUPERBLOCK_BYTES - 36
_MAC_AT = SUPERBLOCK_BYTES - 32
_U32, _U64 = Struct("<I"), Struct("<Q")


def make_superblock(*, store_uuid: bytes, segment_id: int, data_key_id: bytes, data_key: bytes, epoch: int) -> bytes:
    """`epoch` is the keyring's at creation."""
    fields = _FIELDS.pack(
        _MAGIC, _VERSION, 0, ALIGN_BYTES, store_uuid, segment_id, data_key_id, epoch, _commit(data_key, segment_id)
    )
    body = fields.ljust(_CRC_AT, b"\0")
    body += _U32.pack(google_crc32c.value(body))
    return body + _mac(data_key, body)


def check_superblock(
    buf: Buffer, *, store_uuid: bytes, segment_id: int, data_key: Callable[[bytes], tuple[str, bytes] | None]
) -> str:
    """The tenant whose segment it is; IntegrityError if it is not genuine.

    `data_key` gives (tenant, key) of a data key id, as `Keyring.data_key` does.
    """
    raw = bytes(buf[:SUPERBLOCK_BYTES])
    body, mac = raw[:_MAC_AT], raw[_MAC_AT:]
    if len(raw) < SUPERBLOCK_BYTES or not raw.startswith(_MAGIC):
        raise IntegrityError("not a segment, or its first page is torn", reason="torn")
    if body[_CRC_AT:] != _U32.pack(google_crc32c.value(body[:_CRC_AT])):
        raise IntegrityError("first page of the segment is torn", reason="torn")
    _, version, _, align_bytes, uuid, number, dek_id, _, commit = _FIELDS.unpack_from(body)
    if version != _VERSION:
        raise IntegrityError(f"segment has format version {version}, this build reads {_VERSION}", reason="version")
    owner = data_key(dek_id)
    if uuid != store_uuid or number != segment_id or owner is None:
        raise IntegrityError("segment belongs to another store, place or key", reason="identity")
    tenant, key = owner
    if not (hmac.compare_digest(mac, _mac(key, body)) and hmac.compare_digest(commit, _commit(key, number))):
        raise IntegrityError("first page of the segment does not verify", reason="tag")
    if align_bytes != ALIGN_BYTES:
        raise IntegrityError(
            f"segment has records aligned to {align_bytes}, this build {ALIGN_BYTES}", reason="version"
        )
    return tenant


def _commit(data_key: bytes, segment_id: int) -> bytes:
    """Binds the segment to one data key: AES-GCM alone does not commit to its key."""
    return hmac.digest(data_key, length_prefixed(b"kva/seg/commit/v1", _U64.pack(segment_id)), "sha256")


def _mac(data_key: bytes, body: bytes) -> bytes:
    return hmac.digest(data_key, length_prefixed(b"kva/seg/mac/v1", body), "sha256")
