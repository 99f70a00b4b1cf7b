"""XAES-256-GCM against the published vectors, and what a failed open leaves behind."""

from __future__ import annotations

import hashlib
import mmap

import pytest

from appliance.errors import IntegrityError
from appliance.security.seal import TAG_BYTES, Xaes, wipe

NONCE = b"ABCDEFGHIJKLMNOPQRSTUVWX"


@pytest.mark.parametrize(
    ("key", "aad", "sealed"),
    [
        (b"\x01" * 32, b"", "ce546ef63c9cc60765923609b33a9a1974e96e52daf2fcf7075e2271"),
        (b"\x03" * 32, b"c2sp.org/XAES-256-GCM", "986ec1832593df5443a179437fd083bf3fdb41abd740a21f71eb769d"),
    ],
)
def test_published_vectors(key: bytes, aad: bytes, sealed: str) -> None:
    """The two keys take both branches of the CMAC subkey: top bit of L clear, and set."""
    assert Xaes(key).seal(NONCE, b"XAES-256-GCM", aad) == NONCE + bytes.fromhex(sealed)


def test_published_accumulated_vector() -> None:
    """10,000 random inputs drawn from SHAKE128 of nothing; the digest of all ciphertexts is published."""
    stream, at = memoryview(hashlib.shake_128(b"").digest(4_000_000)), 0

    def draw(n: int) -> bytes:
        nonlocal at
        at += n
        assert at <= len(stream)
        return bytes(stream[at - n : at])

    digest = hashlib.shake_128()
    for _ in range(10_000):
        key, nonce = draw(32), draw(24)
        plaintext = draw(draw(1)[0])
        aad = draw(draw(1)[0])
        xaes = Xaes(key)
        sealed = xaes.seal(nonce, plaintext, aad)
        assert xaes.open(sealed, aad) == plaintext
        digest.update(sealed[24:])
    assert digest.hexdigest(32) == "e6b9edf2df6cec60c8cbd864e2211b597fb69a529160cd040d56c0c210081939"


def test_every_flipped_bit_is_refused_and_the_output_is_zero() -> None:
    xaes = Xaes(bytes(range(32)))
    plaintext = bytes(i % 251 + 1 for i in range(2048))
    sealed = bytearray(xaes.seal(NONCE, plaintext, b"aad")[24:])
    out = bytearray(len(plaintext))
    subkey = xaes.subkey(NONCE[:12])
    for bit in range(len(sealed) * 8):
        sealed[bit // 8] ^= 1 << bit % 8
        out[:] = b"\xff" * len(out)
        with pytest.raises(IntegrityError) as caught:
            subkey.open_into(NONCE[12:], sealed, b"aad", memoryview(out))
        sealed[bit // 8] ^= 1 << bit % 8
        assert caught.value.reason == "tag"
        assert out.count(0) == len(out)
    assert xaes.open_into(NONCE, sealed, b"aad", memoryview(out)) == len(plaintext)
    assert out == plaintext


@pytest.mark.parametrize("change", ["key", "nonce", "aad"])
def test_another_key_nonce_or_aad_is_refused(change: str) -> None:
    sealed = Xaes(b"k" * 32).seal(NONCE, b"text", b"aad")
    key = (b"K" if change == "key" else b"k") * 32
    nonce = NONCE.lower() if change == "nonce" else NONCE
    with pytest.raises(IntegrityError):
        Xaes(key).open(nonce + sealed[24:], b"AAD" if change == "aad" else b"aad")


@pytest.mark.parametrize("length", [0, 1, 39])
def test_less_than_a_nonce_and_a_tag_is_refused(length: int) -> None:
    with pytest.raises(IntegrityError) as caught:
        Xaes(b"k" * 32).open(bytes(length), b"")
    assert caught.value.reason == "length"


def test_works_on_views_of_mapped_memory_and_touches_nothing_else() -> None:
    source, target = memoryview(mmap.mmap(-1, 8192)), memoryview(mmap.mmap(-1, 12288))
    source[:5000] = b"\x07" * 5000
    target[:] = b"\xee" * len(target)
    xaes = Xaes(b"k" * 32)
    n = xaes.seal_into(NONCE, source[:5000], b"", target[100:])
    assert n == 5000 + TAG_BYTES
    assert bytes(target[:100]) == b"\xee" * 100
    assert bytes(target[100 + n :]) == b"\xee" * (len(target) - 100 - n)
    opened = memoryview(bytearray(6000))
    assert xaes.open_into(NONCE, target[100 : 100 + n], b"", opened) == 5000
    assert opened[:5000] == source[:5000]
    assert not any(opened[5000:])


def test_wipe_covers_buffers_larger_than_its_step() -> None:
    buffer = bytearray(b"\x01" * 200_001)
    wipe(memoryview(buffer)[:200_000])
    assert buffer == bytes(200_000) + b"\x01"
