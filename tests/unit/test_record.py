"""The record and superblock codec: round trips, and every way bytes can be other than what was asked for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import IntegrityError
from appliance.kv import superblock as superblock_module
from appliance.kv.record import (
    HEADER_BYTES,
    RecordIdentity,
    Sealer,
    head_bytes,
    read_header,
    record_bytes,
)
from appliance.kv.superblock import SUPERBLOCK_BYTES, check_superblock, make_superblock
from appliance.kv.tiers.base import ALIGN_BYTES
from appliance.types import BlockId, BlockLayout, Fingerprint, Tokens

LAYOUT = BlockLayout(block_tokens=8, token_bytes=(24, 8), fixed_bytes=(5, 0))
FRAMES = LAYOUT.frames(8)
IDENTITY = RecordIdentity(
    tenant="acme",
    ns="default",
    block=BlockId(b"b" * 32),
    parent=BlockId(b"p" * 32),
    start=512,
    tokens=Tokens.of(range(100, 108)),
    fingerprint=Fingerprint(b"m" * 32, b"l" * 32),
)
PAYLOAD = bytes(i % 255 + 1 for i in range(LAYOUT.payload_bytes(8)))
STORE = b"store-uuid-16byt"


def sealer(
    tenant: str = "acme",
    data_key_id: bytes = b"d" * 16,
    data_key: bytes = b"k" * 32,
    locate_key: bytes = b"o" * 32,
    store_uuid: bytes = STORE,
) -> Sealer:
    return Sealer(
        store_uuid=store_uuid, tenant=tenant, data_key_id=data_key_id, data_key=data_key, locate_key=locate_key
    )


def seal(identity: RecordIdentity = IDENTITY, payload: bytes = PAYLOAD, by: Sealer | None = None) -> bytearray:
    out = bytearray(b"\xee" * (record_bytes(LAYOUT, len(identity.tokens)) + 64))
    n = (by or sealer()).seal_record(
        memoryview(out), identity, LAYOUT.frames(len(identity.tokens)), memoryview(payload), seq=9
    )
    assert out[n:] == b"\xee" * 64, "nothing beyond the record is written"
    return out[:n]


def refused(record: bytes | bytearray, expected: RecordIdentity = IDENTITY, by: Sealer | None = None) -> str:
    """The reason the record is refused for, after checking that no plaintext is left behind."""
    slot = bytearray(len(PAYLOAD))
    with pytest.raises(IntegrityError) as caught:
        (by or sealer()).open_record(memoryview(bytearray(record)), expected, FRAMES, memoryview(slot))
    assert not any(slot)
    return caught.value.reason


def with_crc(record: bytearray) -> bytearray:
    """A forger can always mend the checksum."""
    record[124:128] = google_crc32c.value(bytes(record[:124])).to_bytes(4, "little")
    return record


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 40)), min_size=1, max_size=5),
    st.integers(1, 600),
    st.data(),
)
def test_round_trip_of_any_shape(shape: list[tuple[int, int]], block_tokens: int, data: st.DataObject) -> None:
    layout = BlockLayout(block_tokens, tuple(t for t, _ in shape), tuple(f for _, f in shape))
    n_tokens = data.draw(st.integers(1, block_tokens))
    identity = replace(IDENTITY, tokens=Tokens.of(range(n_tokens)))
    payload = (b"\x01\x02\x03" * (layout.payload_bytes(n_tokens) // 3 + 1))[: layout.payload_bytes(n_tokens)]
    frames = layout.frames(n_tokens)
    out = bytearray(record_bytes(layout, n_tokens))
    total = sealer().seal_record(memoryview(out), identity, frames, memoryview(payload), seq=2**64 - 1)
    assert total == len(out)
    assert total % ALIGN_BYTES == 0

    header = read_header(out[:HEADER_BYTES])
    assert (header.record_bytes, header.seq, header.payload_bytes) == (total, 2**64 - 1, len(payload))
    assert header.head_bytes == head_bytes(n_tokens, len(frames)) <= head_bytes(block_tokens, len(frames))
    meta = sealer().open_meta(out[: header.head_bytes])
    assert (meta.identity, meta.frame_bytes) == (identity, frames)

    slot = bytearray(b"\xee" * (len(payload) + 8))
    assert sealer().open_record(memoryview(out), identity, frames, memoryview(slot)) == header
    assert slot == payload + b"\xee" * 8


def test_a_block_of_256_tokens_is_scanned_with_one_page() -> None:
    assert head_bytes(256, 1) == head_bytes(256, 80) == ALIGN_BYTES


def test_nothing_of_the_content_shows() -> None:
    record = seal(payload=bytes(len(PAYLOAD)))
    assert IDENTITY.block not in record
    assert IDENTITY.tokens.data[:8] not in record
    assert b"acme" not in record
    assert record != seal(payload=bytes(len(PAYLOAD))), "a fresh nonce each time"


def test_every_flipped_bit_is_refused() -> None:
    record, by = seal(), sealer()
    assert len(record) == 2 * ALIGN_BYTES
    view, slot = memoryview(record), memoryview(bytearray(len(PAYLOAD)))
    reasons = set()
    for bit in range(len(record) * 8):
        record[bit // 8] ^= 1 << bit % 8
        with pytest.raises(IntegrityError) as caught:
            by.open_record(view, IDENTITY, FRAMES, slot)
        record[bit // 8] ^= 1 << bit % 8
        reasons.add(caught.value.reason)
        assert not any(slot)
    assert reasons == {"torn", "tag"}
    by.open_record(view, IDENTITY, FRAMES, slot)
    assert slot == PAYLOAD


def test_every_flipped_header_bit_is_refused_with_the_checksum_mended() -> None:
    for bit in range(124 * 8):
        record = seal()
        record[bit // 8] ^= 1 << bit % 8
        refused(with_crc(record))
        with pytest.raises(IntegrityError):
            sealer().open_meta(bytes(record))


def test_every_truncation_is_refused() -> None:
    record = seal()
    for length in range(0, len(record), 64):
        assert refused(record[:length]) == "torn"
        zeroed = record[:length] + bytes(len(record) - length)
        if any(record[length:]):
            assert refused(zeroed) in {"torn", "tag"}


@pytest.mark.parametrize(
    "lengths",
    [
        {"payload": 2**64 - 1},
        {"total": 2**32 - 1},
        {"total": 0},
        {"meta": 2**32 - 1},
        {"meta": 0},
        {"frames": 0},
        {"frames": 65535},
    ],
)
def test_lying_lengths_are_refused_before_they_size_anything(lengths: dict[str, int]) -> None:
    at = {"payload": (64, 8), "total": (80, 4), "meta": (84, 4), "frames": (88, 2)}
    record = seal()
    for name, value in lengths.items():
        offset, width = at[name]
        record[offset : offset + width] = value.to_bytes(width, "little")
    assert refused(with_crc(record)) == "length"


def test_other_versions_are_never_read() -> None:
    for offset in (4, 5, 6, 90):
        record = seal()
        record[offset] = 2
        assert refused(with_crc(record)) == "version"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tenant", "evil"),
        ("ns", "public"),
        ("block", BlockId(b"c" * 32)),
        ("parent", BlockId(b"q" * 32)),
        ("start", 256),
        ("tokens", Tokens.of(range(101, 109))),
        ("fingerprint", Fingerprint(b"M" * 32, b"l" * 32)),
        ("fingerprint", Fingerprint(b"m" * 32, b"L" * 32)),
    ],
)
def test_a_record_is_only_what_it_was_sealed_as(field: str, value: object) -> None:
    assert refused(seal(), replace(IDENTITY, **{field: value})) == "identity"  # type: ignore[arg-type]


def test_two_records_of_one_shape_cannot_trade_places() -> None:
    other = replace(IDENTITY, block=BlockId(b"c" * 32), tokens=Tokens.of(range(8)))
    mine, theirs = seal(), seal(other, PAYLOAD[::-1])
    assert refused(theirs) == "identity"
    assert refused(mine, other) == "identity"
    assert refused(with_crc(mine[:48] + theirs[48:64] + mine[64:]), other) == "tag", "a forged slot tag"
    assert refused(mine[:ALIGN_BYTES] + theirs[ALIGN_BYTES:]) == "tag", "a data part from elsewhere"


def test_frames_of_one_record_cannot_trade_places() -> None:
    layout = BlockLayout(8, (16, 16), (0, 0))
    frames = layout.frames(8)
    payload = bytes(range(256))
    out = bytearray(record_bytes(layout, 8))
    sealer().seal_record(memoryview(out), IDENTITY, frames, memoryview(payload), seq=1)
    first, second = (slice(ALIGN_BYTES + i * 144, ALIGN_BYTES + (i + 1) * 144) for i in range(2))
    out[first], out[second] = out[second], out[first]
    slot = bytearray(256)
    with pytest.raises(IntegrityError) as caught:
        sealer().open_record(memoryview(out), IDENTITY, frames, memoryview(slot))
    assert caught.value.reason == "tag"
    assert not any(slot)


def test_a_bad_last_frame_wipes_the_frames_before_it() -> None:
    record = seal()
    end = ALIGN_BYTES + sum(FRAMES) + 16 * len(FRAMES)
    record[end - 1] ^= 1
    assert refused(record) == "tag"


@pytest.mark.parametrize(
    ("by", "reason"),
    [
        (sealer(data_key=b"K" * 32), "tag"),
        (sealer(data_key_id=b"D" * 16), "identity"),
        (sealer(store_uuid=b"another-store-id"), "tag"),
    ],
)
def test_other_keys_and_stores_open_nothing(by: Sealer, reason: str) -> None:
    record = seal()
    assert refused(record, by=by) == reason
    with pytest.raises(IntegrityError) as caught:
        by.open_meta(bytes(record))
    assert caught.value.reason == reason


def test_a_slot_tag_of_another_locate_key_is_refused() -> None:
    assert refused(seal(), by=sealer(locate_key=b"O" * 32)) == "identity"


def test_another_tenant_with_the_same_key_opens_nothing() -> None:
    assert refused(seal(), replace(IDENTITY, tenant="evil"), sealer(tenant="evil")) == "tag"


def test_an_expected_shape_that_differs_is_refused() -> None:
    slot = memoryview(bytearray(len(PAYLOAD)))
    for frames, reason in [((sum(FRAMES),), "length"), ((FRAMES[0] - 1, FRAMES[1] + 1), "identity")]:
        with pytest.raises(IntegrityError) as caught:
            sealer().open_record(memoryview(seal()), IDENTITY, frames, slot)
        assert caught.value.reason == reason


def test_one_sealer_serves_many_threads() -> None:
    by = sealer()

    def work(first: int) -> None:
        for i in range(first, first + 100):
            identity = replace(IDENTITY, block=BlockId(i.to_bytes(32, "big")), start=i)
            slot = bytearray(len(PAYLOAD))
            by.open_record(memoryview(seal(identity, by=by)), identity, FRAMES, memoryview(slot))
            assert slot == PAYLOAD

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(0, 400, 100)))


# --- superblock ------------------------------------------------------------------------------------------------


def superblock() -> bytes:
    return make_superblock(store_uuid=STORE, segment_id=7, data_key_id=b"d" * 16, data_key=b"k" * 32, epoch=3)


def check(raw: bytes | bytearray, segment_id: int = 7, store_uuid: bytes = STORE, key: bytes = b"k" * 32) -> str:
    keys = {b"d" * 16: ("acme", key)}
    return check_superblock(raw, store_uuid=store_uuid, segment_id=segment_id, data_key=keys.get)


def test_superblock_round_trip() -> None:
    raw = superblock()
    assert len(raw) == SUPERBLOCK_BYTES
    assert check(raw + b"more") == "acme"


def test_every_flipped_bit_of_a_superblock_is_refused() -> None:
    raw = bytearray(superblock())
    for bit in range(len(raw) * 8):
        raw[bit // 8] ^= 1 << bit % 8
        with pytest.raises(IntegrityError):
            check(raw)
        mended = raw[:4060] + google_crc32c.value(bytes(raw[:4060])).to_bytes(4, "little") + raw[4064:]
        if bytes(mended) != superblock():
            with pytest.raises(IntegrityError):
                check(mended)
        raw[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"segment_id": 8}, "identity"),
        ({"store_uuid": b"another-store-id"}, "identity"),
        ({"key": b"K" * 32}, "tag"),
    ],
)
def test_a_superblock_holds_for_one_store_place_and_key(change: dict[str, object], reason: str) -> None:
    with pytest.raises(IntegrityError) as caught:
        check(superblock(), **change)  # type: ignore[arg-type]
    assert caught.value.reason == reason


def test_a_forgotten_data_key_and_another_version_are_told_apart() -> None:
    with pytest.raises(IntegrityError) as caught:
        check_superblock(superblock(), store_uuid=STORE, segment_id=7, data_key={}.get)
    assert caught.value.reason == "identity"
    raw = bytearray(superblock())
    raw[8] = 2
    with pytest.raises(IntegrityError) as caught:
        check(raw[:4060] + google_crc32c.value(bytes(raw[:4060])).to_bytes(4, "little") + raw[4064:])
    assert caught.value.reason == "version"


def test_a_short_or_empty_superblock_is_torn() -> None:
    for raw in (b"", superblock()[:-1], bytes(SUPERBLOCK_BYTES)):
        with pytest.raises(IntegrityError) as caught:
            check(raw)
        assert caught.value.reason == "torn"


def test_a_superblock_with_another_alignment_is_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(superblock_module, "ALIGN_BYTES", 8192)
    other = superblock()
    monkeypatch.undo()
    with pytest.raises(IntegrityError) as caught:
        check(other)
    assert caught.value.reason == "version"
