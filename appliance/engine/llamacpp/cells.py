"""The bytes of a llama.cpp sequence state, taken apart into rows per token and put together again.

Owns the blob layout; calls no engine. Invariant: a block's payload does not depend on the run it was exported in: for
each part (a layer's K, then a layer's V) the rows of the block's tokens in order. Threading: values only, any thread.

A blob of n cells (all integers little-endian), one section per KV cache (two when some layers use a sliding window):

    u32 magic · i32 sequence
    section x { u32 streams(=1) · u32 n · n x { i32 position · u32 1 · i32 sequence } · u32 v_transposed(=0) · u32 layers
                layers x { i32 type · u64 row_bytes · n rows }      K
                layers x { i32 type · u64 row_bytes · n rows } }    V
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

_HEADER = struct.Struct("<Ii")
_SECTION = struct.Struct("<II")
_PART = struct.Struct("<iQ")
_META_BYTES = 12


class LayoutError(ValueError):
    """The blob is not laid out as rows per token."""


@dataclass(frozen=True)
class Part:
    """One layer's K or V: the ggml type and the bytes of one token's row."""

    kind: int
    row_bytes: int


@dataclass(frozen=True)
class RowLayout:
    """Shape of every blob of one context, whatever its length."""

    magic: int
    sections: tuple[tuple[Part, ...], ...]
    """Parts of each section: K of all layers, then V of all layers."""

    @property
    def token_bytes(self) -> int:
        return sum(part.row_bytes for parts in self.sections for part in parts)

    def blob_bytes(self, n_tokens: int) -> int:
        parts = sum(len(section) for section in self.sections)
        fixed = _HEADER.size + 2 * _SECTION.size * len(self.sections) + _PART.size * parts
        return fixed + n_tokens * (self.token_bytes + _META_BYTES * len(self.sections))

    @classmethod
    def parse(cls, blob: Bytes) -> RowLayout:
        """Layout of a blob that holds at least one cell. LayoutError if it is anything else than rows."""
        magic, _ = _unpack(_HEADER, blob, 0)
        at = _HEADER.size
        sections = []
        while at < len(blob):
            streams, n_cells = _unpack(_SECTION, blob, at)
            if streams != 1 or n_cells == 0:
                raise LayoutError("not one stream of cells")
            at += _SECTION.size + _META_BYTES * n_cells
            transposed, layers = _unpack(_SECTION, blob, at)
            if transposed or not 0 < layers < 4096:
                raise LayoutError("values are transposed")
            at += _SECTION.size
            parts = []
            for _ in range(2 * layers):
                kind, row_bytes = _unpack(_PART, blob, at)
                if not 0 < row_bytes <= 1 << 24:
                    raise LayoutError("no row size")
                parts.append(Part(kind, row_bytes))
                at += _PART.size + row_bytes * n_cells
            sections.append(tuple(parts))
        if at != len(blob) or not sections:
            raise LayoutError("bytes left over")
        return cls(magic, tuple(sections))

    def split(
        self, blob: Bytes, start: int, stop: int, targets: Sequence[Bytes], n_tokens: Sequence[int], skip: int
    ) -> None:
        """Copy the rows of positions [start, stop) out of a blob, into consecutive blocks.

        Target i is the whole payload of a block of n_tokens[i]; the blob's first row belongs at token `skip` of the
        first target, and its last row may fall short of the end of the last. LayoutError if it holds anything else than those positions.
        """
        n_cells = stop - start
        if len(blob) != self.blob_bytes(n_cells) or _unpack(_HEADER, blob, 0)[0] != self.magic:
            raise LayoutError("unexpected size of a state")
        at = _HEADER.size
        targets_at = [0] * len(targets)
        for parts in self.sections:
            if _unpack(_SECTION, blob, at) != (1, n_cells):
                raise LayoutError("a cache holds another number of cells")
            at += _SECTION.size
            order = _order(blob[at : at + _META_BYTES * n_cells], start)
            at += _META_BYTES * n_cells
            if _unpack(_SECTION, blob, at) != (0, len(parts) // 2):
                raise LayoutError("another number of layers")
            at += _SECTION.size
            for part in parts:
                if _unpack(_PART, blob, at) != (part.kind, part.row_bytes):
                    raise LayoutError("another row size")
                at += _PART.size
                rows = blob[at : at + part.row_bytes * n_cells]
                if order is not None:
                    rows = rows.reshape(n_cells, part.row_bytes)[order].reshape(-1)
                for i, (first, count, offset) in enumerate(_spans(n_tokens, skip, n_cells)):
                    to = targets_at[i] + offset * part.row_bytes
                    source = rows[first * part.row_bytes : (first + count) * part.row_bytes]
                    targets[i][to : to + len(source)] = source
                    targets_at[i] += n_tokens[i] * part.row_bytes
                at += part.row_bytes * n_cells

    def join(self, blob: Bytes, start: int, sequence: int, blocks: Sequence[tuple[int, int, Bytes]]) -> None:
        """Fill a blob of blob_bytes(sum of used) with the first `used` rows of each (n_tokens, used, payload)."""
        n_cells = sum(used for _, used, _ in blocks)
        assert len(blob) == self.blob_bytes(n_cells)
        _HEADER.pack_into(blob.data, 0, self.magic, sequence)
        meta = np.empty((n_cells, 3), dtype="<i4")
        meta[:, 0] = np.arange(start, start + n_cells)
        meta[:, 1] = 1
        meta[:, 2] = sequence
        at = _HEADER.size
        sources_at = [0] * len(blocks)
        for parts in self.sections:
            _SECTION.pack_into(blob.data, at, 1, n_cells)
            at += _SECTION.size
            blob[at : at + _META_BYTES * n_cells] = meta.reshape(-1).view(np.uint8)
            at += _META_BYTES * n_cells
            _SECTION.pack_into(blob.data, at, 0, len(parts) // 2)
            at += _SECTION.size
            for part in parts:
                _PART.pack_into(blob.data, at, part.kind, part.row_bytes)
                at += _PART.size
                for i, (n_tokens, used, payload) in enumerate(blocks):
                    size = used * part.row_bytes
                    blob[at : at + size] = payload[sources_at[i] : sources_at[i] + size]
                    sources_at[i] += n_tokens * part.row_bytes
                    at += size


def _spans(n_tokens: Sequence[int], skip: int, n_cells: int) -> Iterator[tuple[int, int, int]]:
    """(first row of the blob, rows, first token of the block) for each block the blob's rows reach."""
    first = 0
    for n in n_tokens:
        count = min(n - skip, n_cells - first)
        yield first, count, skip
        first += count
        skip = 0
    assert first == n_cells


def _order(meta: Bytes, start: int) -> NDArray[np.intp] | None:
    """Which cell holds each position in turn; None when cells are in position order already."""
    positions = meta.view("<i4").reshape(-1, 3)[:, 0]
    wanted = np.arange(start, start + len(positions))
    if np.array_equal(positions, wanted):
        return None
    order = np.argsort(positions, kind="stable")
    if not np.array_equal(positions[order], wanted):
        raise LayoutError("positions are not the ones asked for")
    return order


def _unpack(form: struct.Struct, blob: Bytes, at: int) -> tuple[int, ...]:
    if at + form.size > len(blob):
        raise LayoutError("a state ends early")
    return form.unpack_from(blob.data, at)
