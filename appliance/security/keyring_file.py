"""The bytes of one keyring copy, and the key hierarchy inside them (FORMAT.md, "Keyring").

unlock key --wraps--> master key --wraps--> key-encryption key --seals--> body. The master key also gives, by HKDF, the
keys that authenticate the slots and the API keys.

Invariant: decode() returns only what a holder of the unlock key wrote, bit for bit. Pure functions, no I/O; any thread.
"""

from __future__ import annotations

import hmac
import os
from dataclasses import dataclass, field
from struct import Struct

import google_crc32c
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from appliance.errors import IntegrityError
from appliance.security.seal import KEY_BYTES, NONCE_BYTES, TAG_BYTES, Xaes
from appliance.security.tenants import Body

_MAGIC = b"KVKR"
_VERSION = 1
_WRAPPED_BYTES = NONCE_BYTES + KEY_BYTES + TAG_BYTES
_FIXED = Struct("<4sHH16sIQI")
_SLOT = Struct(f"<16s{_WRAPPED_BYTES}sH")
_AAD = Struct("<16sIQ")
_U32 = Struct("<I")
_KEYFILE = b"keyfile".ljust(16, b"\0")


class WrongKey(Exception):
    """The copy is whole, but no slot opens with this unlock key."""


@dataclass(frozen=True)
class Slot:
    """One way to the master key: `kind` says how a secret and `params` give the key that unwraps it."""

    kind: bytes
    wrapped: bytes
    params: bytes


@dataclass(frozen=True)
class State:
    """One verified keyring: all it takes to serve from it and to write its successor."""

    store_uuid: bytes
    epoch: int
    version: int
    slots: tuple[Slot, ...]
    wrapped_kek: bytes
    body: Body
    kek: bytes = field(repr=False)
    slot_mac_key: bytes = field(repr=False)
    pepper: bytes = field(repr=False)
    """Keys the HMAC that stands for an API key."""


def new_state(unlock_key: bytes) -> State:
    """A first keyring: random keys, no tenants, one key-file slot."""
    store_uuid, master, kek = os.urandom(16), os.urandom(KEY_BYTES), os.urandom(KEY_BYTES)
    wrapped_master = Xaes(unlock_key).seal(os.urandom(NONCE_BYTES), master, _slot_aad(store_uuid, _KEYFILE))
    wrapped_kek = _kek_wrapper(master, store_uuid).seal(os.urandom(NONCE_BYTES), kek, _kek_aad(store_uuid, 1))
    slots = (Slot(_KEYFILE, wrapped_master, b""),)
    return _state(store_uuid, 1, 1, slots, wrapped_kek, Body.new(), kek, master)


def encode(state: State) -> bytes:
    body = Xaes(state.kek).seal(
        os.urandom(NONCE_BYTES), state.body.encode(), body_aad(state.store_uuid, state.epoch, state.version)
    )
    head = _FIXED.pack(_MAGIC, _VERSION, len(state.slots), state.store_uuid, state.epoch, state.version, len(body))
    for slot in state.slots:
        head += _SLOT.pack(slot.kind, slot.wrapped, len(slot.params)) + slot.params
    head += state.wrapped_kek
    data = head + hmac.digest(state.slot_mac_key, head, "sha256") + body
    return data + _U32.pack(google_crc32c.value(data))


def decode(data: bytes, unlock_key: bytes) -> State:
    """WrongKey if no slot opens; IntegrityError (torn, version, tag) if the copy is damaged or of another version."""
    if len(data) < _FIXED.size + 4 or _U32.pack(google_crc32c.value(data[:-4])) != data[-4:] or data[:4] != _MAGIC:
        raise IntegrityError("keyring copy is torn", reason="torn")
    _, file_version, slot_count, store_uuid, epoch, version, body_bytes = _FIXED.unpack_from(data)
    if file_version != _VERSION:
        raise IntegrityError(
            f"keyring has format version {file_version}, this build reads {_VERSION}", reason="version"
        )
    slots, at = _read_slots(data, slot_count)
    wrapped_kek, mac_at = data[at : at + _WRAPPED_BYTES], at + _WRAPPED_BYTES
    body = data[mac_at + 32 : -4]
    if len(body) != body_bytes:
        raise IntegrityError("keyring lengths do not agree", reason="length")
    master = _unlock(slots, store_uuid, unlock_key)
    kek = _kek_wrapper(master, store_uuid).open(wrapped_kek, _kek_aad(store_uuid, epoch))
    plain = Xaes(kek).open(body, body_aad(store_uuid, epoch, version))
    state = _state(store_uuid, epoch, version, slots, wrapped_kek, Body.decode(plain), kek, master)
    if not hmac.compare_digest(data[mac_at : mac_at + 32], hmac.digest(state.slot_mac_key, data[:mac_at], "sha256")):
        raise IntegrityError("keyring slots do not verify", reason="tag")
    return state


def body_aad(store_uuid: bytes, epoch: int, version: int) -> bytes:
    """Additional data of the sealed body: an old body cannot pass for a newer one."""
    return _AAD.pack(store_uuid, epoch, version)


def _read_slots(data: bytes, count: int) -> tuple[tuple[Slot, ...], int]:
    """Slots and the offset behind them."""
    slots, at = [], _FIXED.size
    for _ in range(count):
        if at + _SLOT.size > len(data):
            raise IntegrityError("keyring slots are cut short", reason="length")
        kind, wrapped, params_bytes = _SLOT.unpack_from(data, at)
        at += _SLOT.size + params_bytes
        slots.append(Slot(kind, wrapped, data[at - params_bytes : at]))
    return tuple(slots), at


def _unlock(slots: tuple[Slot, ...], store_uuid: bytes, unlock_key: bytes) -> bytes:
    for slot in slots:
        if slot.kind == _KEYFILE:
            try:
                return Xaes(unlock_key).open(slot.wrapped, _slot_aad(store_uuid, slot.kind))
            except IntegrityError:
                continue  # another key file's slot
    raise WrongKey


def _state(
    store_uuid: bytes,
    epoch: int,
    version: int,
    slots: tuple[Slot, ...],
    wrapped_kek: bytes,
    body: Body,
    kek: bytes,
    master: bytes,
) -> State:
    slot_mac_key = _derive(master, store_uuid, b"kva/slot-mac/v1")
    pepper = _derive(master, store_uuid, b"kva/api-pepper/v1")
    return State(store_uuid, epoch, version, slots, wrapped_kek, body, kek, slot_mac_key, pepper)


def _derive(master: bytes, store_uuid: bytes, label: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=store_uuid, info=label).derive(master)


def _kek_wrapper(master: bytes, store_uuid: bytes) -> Xaes:
    return Xaes(_derive(master, store_uuid, b"kva/kek-wrap/v1"))


def _slot_aad(store_uuid: bytes, kind: bytes) -> bytes:
    return b"kva/slot/v1" + store_uuid + kind


def _kek_aad(store_uuid: bytes, epoch: int) -> bytes:
    return b"kva/kek/v1" + store_uuid + _U32.pack(epoch)
