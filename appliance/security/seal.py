"""XAES-256-GCM (c2sp.org/XAES-256-GCM): seal and open between buffers the caller owns.

Invariant: after a failed open the output buffer holds zeros, never unverified plaintext. No function here allocates
in proportion to the data, so buffers may be views of mmap'd or pinned memory. Every object is immutable; all threads
may share one, and the GIL is released while bytes are sealed or opened.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB

from appliance.errors import IntegrityError

KEY_BYTES = 32
NONCE_BYTES = 24
TAG_BYTES = 16

Buffer = bytes | bytearray | memoryview

_ZEROS = bytes(1 << 16)


def wipe(buffer: memoryview) -> None:
    """Overwrite with zeros."""
    for start in range(0, len(buffer), len(_ZEROS)):
        part = buffer[start : start + len(_ZEROS)]
        part[:] = _ZEROS[: len(part)]


class Subkey:
    """The AES-256-GCM key of one nonce prefix. Seals many frames if their nonce suffixes differ."""

    __slots__ = ("_aead",)

    def __init__(self, key: bytes) -> None:
        self._aead = AESGCM(key)

    def seal_into(self, suffix: bytes, plaintext: Buffer, aad: bytes, out: memoryview) -> int:
        """Write ciphertext and tag to the start of `out`; returns their length."""
        sealed_bytes = len(plaintext) + TAG_BYTES
        self._aead.encrypt_into(suffix, plaintext, aad, out[:sealed_bytes])
        return sealed_bytes

    def open_into(self, suffix: bytes, sealed: Buffer, aad: bytes, out: memoryview) -> int:
        """Write the plaintext to the start of `out`; returns its length. IntegrityError, and zeros, if it is not genuine."""
        assert len(suffix) == 12
        plain_bytes = len(sealed) - TAG_BYTES
        if plain_bytes < 0:
            raise IntegrityError("sealed bytes are shorter than a tag", reason="length")
        target = out[:plain_bytes]
        try:
            self._aead.decrypt_into(suffix, sealed, aad, target)
        except InvalidTag:
            wipe(target)
            raise IntegrityError("sealed bytes do not verify", reason="tag") from None
        return plain_bytes


class Xaes:
    """A 256-bit key that takes random 192-bit nonces."""

    __slots__ = ("_block", "_k1")

    def __init__(self, key: bytes) -> None:
        assert len(key) == KEY_BYTES
        self._block = Cipher(AES(key), ECB())  # one block at a time, as CMAC does
        top = int.from_bytes(self._encrypt(bytes(16)), "big")
        self._k1 = (top << 1 & (1 << 128) - 1) ^ (0x87 if top >> 127 else 0)  # CMAC's first subkey

    def _encrypt(self, blocks: bytes) -> bytes:
        return self._block.encryptor().update(blocks)

    def subkey(self, prefix: bytes) -> Subkey:
        """The key of all nonces that begin with these 12 bytes: NIST SP 800-108 counter mode over CMAC, label "X"."""
        assert len(prefix) == 12
        counters = (b"\x00\x01X\x00" + prefix, b"\x00\x02X\x00" + prefix)
        return Subkey(
            self._encrypt(b"".join((int.from_bytes(m, "big") ^ self._k1).to_bytes(16, "big") for m in counters))
        )

    def seal_into(self, nonce: bytes, plaintext: Buffer, aad: bytes, out: memoryview) -> int:
        """Write ciphertext and tag to the start of `out`; returns their length."""
        return self.subkey(nonce[:12]).seal_into(nonce[12:], plaintext, aad, out)

    def open_into(self, nonce: bytes, sealed: Buffer, aad: bytes, out: memoryview) -> int:
        """Write the plaintext to the start of `out`; returns its length. IntegrityError, and zeros, if it is not genuine."""
        return self.subkey(nonce[:12]).open_into(nonce[12:], sealed, aad, out)

    def seal(self, nonce: bytes, plaintext: bytes, aad: bytes) -> bytes:
        """For small values: nonce, ciphertext and tag in one string."""
        out = bytearray(len(plaintext) + TAG_BYTES)
        self.seal_into(nonce, plaintext, aad, memoryview(out))
        return nonce + bytes(out)

    def open(self, sealed: bytes, aad: bytes) -> bytes:
        """Reverse of seal()."""
        if len(sealed) < NONCE_BYTES + TAG_BYTES:
            raise IntegrityError("sealed bytes are shorter than nonce and tag", reason="length")
        out = bytearray(len(sealed) - NONCE_BYTES - TAG_BYTES)
        self.open_into(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], aad, memoryview(out))
        return bytes(out)
