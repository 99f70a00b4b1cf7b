"""Records at rest of a stopped appliance, and ways to damage them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from appliance.config import NvmeSection
from appliance.kv.opening import open_below
from appliance.kv.record import HEADER_BYTES, read_header
from appliance.security.keyring import Keyring
from appliance.types import Tokens

PAGE = 4096


@dataclass(frozen=True)
class Record:
    segment: Path
    offset: int
    length: int
    start: int
    """Position of its first token."""
    tokens: Tokens

    @property
    def data(self) -> bytes:
        with self.segment.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.length)

    @property
    def boundaries(self) -> dict[str, int]:
        """Offsets in the record where a field of FORMAT.md section 3 begins, or ends."""
        header = read_header(self.data[:HEADER_BYTES])
        meta_end, data_at = HEADER_BYTES + header.meta_bytes, header.head_bytes
        data_end = data_at + header.payload_bytes + 16 * header.frames
        found = {
            "magic": 0, "version": 4, "algorithm": 5, "flags": 6, "data-key-id": 8, "nonce": 24, "slot-tag": 48,
            "payload-bytes": 64, "sequence": 72, "record-bytes": 80, "meta-bytes": 84, "frames": 88, "zeros": 90,
            "checksum": 124,
        }  # fmt: skip
        meta = {
            "model": 0, "layout": 32, "block": 64, "parent": 96, "position": 128, "n-tokens": 136, "n-frames": 140,
            "name-length": 142, "name": 143, "frame-lengths": 206, "tokens": 206 + 8 * header.frames,
        }  # fmt: skip
        found |= {f"meta-{name}": HEADER_BYTES + at for name, at in meta.items()}
        found |= {"checksum-end": HEADER_BYTES - 1, "meta-tag": meta_end - 16, "meta-tag-end": meta_end - 1}
        found |= {"head-padding": meta_end, "head-padding-end": data_at - 1}
        found |= {"data": data_at, "data-tag": data_end - 16, "data-tag-end": data_end - 1}
        found |= {"data-padding": data_end, "data-padding-end": header.record_bytes - 1}
        return {name: at for name, at in found.items() if at < header.record_bytes}


SUPERBLOCK = {
    "magic": 0, "version": 8, "zero": 10, "alignment": 12, "store": 16, "segment": 32, "data-key-id": 40, "epoch": 56,
    "zeros": 60, "commitment": 64, "zero-page": 96, "zero-page-end": 4059, "checksum": 4060, "mac": 4064, "mac-end": 4095,
}  # fmt: skip
"""Offsets in a segment where a field of FORMAT.md section 4 begins, or ends."""


def records(home: Path) -> list[Record]:
    """All that is indexed, by place."""
    keyring = Keyring.open(home, home / "unlock.key")
    sealed, recovered = open_below(home, keyring, NvmeSection(capacity=2**30))
    found = []
    for block, entry in recovered.index.entries():
        tokens = recovered.index.child_tokens(entry.parent, block)
        assert tokens is not None
        extent = entry.extent
        segment = home / "store" / f"{extent.segment:016x}.seg"
        found.append(Record(segment, extent.offset, extent.length, entry.start, tokens))
    recovered.index.close()
    sealed.tier.close()
    return sorted(found, key=lambda record: (record.segment, record.offset))


def flip(path: Path, at: int) -> None:
    """One bit."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << at % 8]))


def zero_page(path: Path, at: int) -> None:
    """The 4 KiB page around `at`, as after a lost write."""
    start = at // PAGE * PAGE
    overwrite(path, start, bytes(min(PAGE, path.stat().st_size - start)))


def cut(path: Path, at: int) -> None:
    os.truncate(path, at)


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
