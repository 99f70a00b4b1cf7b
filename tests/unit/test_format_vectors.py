"""FORMAT.md against committed bytes: the code must write them and read them, and so must a second reading of the text.

A change that fails here is a new format version, not a new vector.
"""

from __future__ import annotations

import hmac
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.cmac import CMAC

from appliance.kv.keys import block_id, chain, chain_root
from appliance.kv.record import RecordIdentity, Sealer
from appliance.kv.superblock import check_superblock, make_superblock
from appliance.security.keyring_file import body_aad, decode
from appliance.types import BlockId, Fingerprint, Namespace, Tokens

VECTORS = Path(__file__).resolve().parents[1] / "vectors"


def load(name: str) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((VECTORS / name).read_text())
    return {key: bytes.fromhex(value) if isinstance(value, str) else value for key, value in tree.items()}


@pytest.fixture
def names() -> dict[str, Any]:
    return load("names.json")


@pytest.fixture
def record() -> dict[str, Any]:
    return load("record.json")


def padded(data: bytes) -> bytes:
    return data.ljust(-(-len(data) // 4096) * 4096, b"\0")


def identity(v: dict[str, Any]) -> RecordIdentity:
    return RecordIdentity(
        tenant=v["tenant"].decode(),
        ns=v["ns"].decode(),
        block=BlockId(v["block"]),
        parent=BlockId(v["parent"]),
        start=v["start"],
        tokens=Tokens(v["tokens"]),
        fingerprint=Fingerprint(v["model"], v["layout"]),
    )


def sealer(v: dict[str, Any]) -> Sealer:
    return Sealer(
        store_uuid=v["store_uuid"],
        tenant=v["tenant"].decode(),
        data_key_id=v["data_key_id"],
        data_key=v["data_key"],
        locate_key=v["locate_key"],
        random_bytes=lambda n: v["nonce"][:n],
    )


def test_names(names: dict[str, Any]) -> None:
    v = names
    ns = Namespace(v["tenant"].decode(), v["ns"].decode(), v["salt"])
    root = chain_root(v["hash_key"], ns, Fingerprint(v["model"], v["layout"]), v["block_tokens"])
    assert root == v["root"]
    blocks = chain(v["hash_key"], root, Tokens(v["tokens"]), v["block_tokens"])
    assert blocks == [v["block_0"], v["block_1"]]
    assert block_id(v["hash_key"], blocks[-1], Tokens(v["tokens"])[2 * v["block_tokens"] :]) == v["tail"]


def test_record_is_written_byte_for_byte(record: dict[str, Any]) -> None:
    v = record
    expected = padded(v["head"]) + padded(v["data"])
    out = bytearray(len(expected))
    total = sealer(v).seal_record(memoryview(out), identity(v), v["frame_bytes"], memoryview(v["payload"]), v["seq"])
    assert total == len(expected)
    assert out == expected


def test_record_is_read(record: dict[str, Any]) -> None:
    v = record
    stored = memoryview(padded(v["head"]) + padded(v["data"]))
    slot = bytearray(len(v["payload"]))
    sealer(v).open_record(stored, identity(v), v["frame_bytes"], memoryview(slot))
    assert slot == v["payload"]
    assert sealer(v).open_meta(stored[:4096]).identity == identity(v)


def test_superblock() -> None:
    v = load("superblock.json")
    expected = v["fields"].ljust(4060, b"\0") + v["crc_and_mac"]
    made = make_superblock(
        store_uuid=v["store_uuid"],
        segment_id=v["segment_id"],
        data_key_id=v["data_key_id"],
        data_key=v["data_key"],
        epoch=v["epoch"],
    )
    assert made == expected
    keys = {v["data_key_id"]: ("acme", v["data_key"])}
    owner = check_superblock(expected, store_uuid=v["store_uuid"], segment_id=v["segment_id"], data_key=keys.get)
    assert owner == "acme"


def test_keyring_copy() -> None:
    v = load("keyring.json")
    state = decode(v["copy"], v["unlock_key"])
    assert state.body.encode() == v["body"]
    assert (state.store_uuid, state.epoch, state.version) == (v["store_uuid"], v["epoch"], v["version"])
    assert body_aad(state.store_uuid, state.epoch, state.version) == v["body_aad"]
    assert state.body.owner(state.pepper, v["api_key"].decode()) == "acme"


# --- a second reading of FORMAT.md, with nothing of the project's code --------------------------------------------


def lp(*fields: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(field)) + field for field in fields)


def xaes(key: bytes, nonce: bytes) -> AESGCM:
    def cmac(counter: int) -> bytes:
        mac = CMAC(AES(key))
        mac.update(struct.pack(">H", counter) + b"X\0" + nonce[:12])
        return mac.finalize()

    return AESGCM(cmac(1) + cmac(2))


def test_names_as_the_text_says(names: dict[str, Any]) -> None:
    v = names
    n = v["block_tokens"]
    size = struct.pack("<I", n)
    message = lp(b"kva/px/v1", v["tenant"], v["ns"], v["model"], v["layout"], size, v["salt"])
    assert hmac.digest(v["hash_key"], message, "sha256") == v["root"]
    assert hmac.digest(v["hash_key"], v["root"] + v["tokens"][: 4 * n], "sha256") == v["block_0"]


def test_record_as_the_text_says(record: dict[str, Any]) -> None:
    v = record
    head, data, aead = v["head"], v["data"], xaes(v["data_key"], v["nonce"])
    meta_bytes, frames = struct.unpack_from("<IH", head, 84)
    assert head[:8] == b"KVR1\x01\x01\x00\x00"
    assert (head[8:24], head[24:48]) == (v["data_key_id"], v["nonce"])
    assert head[48:64] == hmac.digest(v["locate_key"], v["block"], "sha256")[:16]
    assert struct.unpack_from("<QQI", head, 64) == (len(v["payload"]), v["seq"], 8192)

    def nonce(index: int) -> bytes:
        last = struct.unpack("<I", v["nonce"][20:])[0] ^ index
        return v["nonce"][12:20] + struct.pack("<I", last)  # type: ignore[no-any-return]

    label, raw, key_id, zero = b"kva/rec/v1", head[:124], v["data_key_id"], struct.pack("<I", 0)
    meta = aead.decrypt(
        nonce(0), head[128 : 128 + meta_bytes], lp(label, v["store_uuid"], v["tenant"], key_id, zero, raw)
    )
    assert meta[:128] == v["model"] + v["layout"] + v["block"] + v["parent"]
    assert struct.unpack_from("<QIHB", meta, 128) == (v["start"], len(v["tokens"]) // 4, frames, len(v["ns"]))
    assert meta[143:206].rstrip(b"\0") == v["ns"]
    assert list(struct.unpack_from(f"<{frames}Q", meta, 206)) == v["frame_bytes"]
    assert meta[206 + 8 * frames :] == v["tokens"]

    at, payload = 0, b""
    for index, n in enumerate(v["frame_bytes"], start=1):
        aad = lp(
            label,
            v["store_uuid"],
            v["tenant"],
            v["ns"],
            key_id,
            v["block"],
            v["model"],
            v["layout"],
            struct.pack("<Q", len(v["payload"])),
            struct.pack("<I", index),
            struct.pack("<I", frames),
            raw,
        )
        payload += aead.decrypt(nonce(index), data[at : at + n + 16], aad)
        at += n + 16
    assert payload == v["payload"]
    assert at == len(data)


def test_superblock_as_the_text_says() -> None:
    v = load("superblock.json")
    fields = v["fields"]
    assert fields[:16] == b"KVSEGMNT" + struct.pack("<HHI", 1, 0, 4096)
    number = struct.pack("<Q", v["segment_id"])
    assert fields[16:64] == v["store_uuid"] + number + v["data_key_id"] + struct.pack("<II", v["epoch"], 0)
    assert fields[64:] == hmac.digest(v["data_key"], lp(b"kva/seg/commit/v1", number), "sha256")
    body = fields.ljust(4060, b"\0") + v["crc_and_mac"][:4]
    assert v["crc_and_mac"][4:] == hmac.digest(v["data_key"], lp(b"kva/seg/mac/v1", body), "sha256")


def test_keyring_copy_as_the_text_says() -> None:
    v = load("keyring.json")
    copy = v["copy"]
    magic, version, slots, uuid, epoch, number, body_bytes = struct.unpack_from("<4sHH16sIQI", copy)
    assert (magic, version, slots, uuid, epoch, number) == (b"KVKR", 1, 1, v["store_uuid"], v["epoch"], v["version"])
    kind, wrapped, params_bytes = struct.unpack_from("<16s72sH", copy, 40)
    assert (kind.rstrip(b"\0"), params_bytes) == (b"keyfile", 0)
    master = xaes(v["unlock_key"], wrapped).decrypt(wrapped[12:24], wrapped[24:], b"kva/slot/v1" + uuid + kind)

    def derive(label: bytes) -> bytes:
        return hmac.digest(hmac.digest(uuid, master, "sha256"), label + b"\x01", "sha256")  # one block of HKDF

    sealed_kek, key = copy[130:202], derive(b"kva/kek-wrap/v1")
    kek_aad = b"kva/kek/v1" + uuid + struct.pack("<I", epoch)
    kek = xaes(key, sealed_kek).decrypt(sealed_kek[12:24], sealed_kek[24:], kek_aad)
    assert copy[202:234] == hmac.digest(derive(b"kva/slot-mac/v1"), copy[:202], "sha256")
    sealed = copy[234:-4]
    assert len(sealed) == body_bytes
    assert xaes(kek, sealed).decrypt(sealed[12:24], sealed[24:], v["body_aad"]) == v["body"]
    (tenant,) = json.loads(v["body"])["tenants"]
    assert tenant["api_keys"][0]["mac"] == hmac.digest(derive(b"kva/api-pepper/v1"), v["api_key"], "sha256").hex()
