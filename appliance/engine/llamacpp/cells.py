"""The bytes of a llama.cpp sequence state, taken apart into rows per token and put together again.

Owns the blob layout; calls no engine. Invariant: a block's payload does not depend on the run it was exported in: for
each part (what a cell's entry says beyond its position, a layer's K, then a layer's V) the rows of the block's tokens in
order. Threading: values only, any thread.

A blob of n cells (all integers little-endian), one section per KV cache (two when some layers use a sliding window):

    u32 magic · i32 sequence
    section x { u32 streams(=1) · u32 n · n x { i32 position · u32 1 · [more, if positions have parts] · i32 sequence }
                u32 v_transposed(=0) · u32 layers
                layers x { i32 type · u64 row_bytes · n rows }      K
                layers x { i32 type · u64 row_bytes · n rows } }    V, which latent attention (MLA) has not
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

_HEADER = struct.Struct("<Ii")
HEADER_BYTES = _HEADER.size
_SECTION = struct.Struct("<II")
_PART = struct.Struct("<iQ")
_META_BYTES = 12
_MORE_AT = 8
_MOST_MORE_BYTES = 64


class LayoutError(ValueError):
    """The blob is not laid out as rows per token."""


@dataclass(frozen=True)
class Part:
    """One layer's K or V: the ggml type and the bytes of one token's row."""

    kind: int
    row_bytes: int


@dataclass(frozen=True)
class Section:
    """One KV cache."""

    layers: int
    more_bytes: int
    """Of a cell's entry, beyond position and sequence: it is kept with the rows."""
    parts: tuple[Part, ...]
    """K of all layers, then V of all layers or nothing."""

    @property
    def token_bytes(self) -> int:
        return self.more_bytes + sum(part.row_bytes for part in self.parts)

    @property
    def meta_bytes(self) -> int:
        return _META_BYTES + self.more_bytes


@dataclass(frozen=True)
class RowLayout:
    """Shape of every blob of one context, whatever its length."""

    magic: int
    sections: tuple[Section, ...]

    @property
    def token_bytes(self) -> int:
        return sum(section.token_bytes for section in self.sections)

    def blob_bytes(self, n_tokens: int) -> int:
        cells = sum(part.row_bytes for section in self.sections for part in section.parts)
        cells += sum(section.meta_bytes for section in self.sections)
        parts = sum(len(section.parts) for section in self.sections)
        return _HEADER.size + 2 * _SECTION.size * len(self.sections) + _PART.size * parts + n_tokens * cells

    @staticmethod
    def magic_of(blob: Bytes) -> int:
        return _unpack(_HEADER, blob, 0)[0]

    @classmethod
    def parse(cls, blob: Bytes) -> RowLayout:
        """Layout of a blob whose cells are those of positions [0, n), n > 1. LayoutError if it is anything else than rows."""
        at = _HEADER.size
        sections = []
        while at < len(blob):
            section, at = _parse_section(blob, at)
            sections.append(section)
        if not sections:
            raise LayoutError("no cells")
        return cls(cls.magic_of(blob), tuple(sections))

    def split(
        self, blob: Bytes, start: int, stop: int, targets: Sequence[Bytes], n_tokens: Sequence[int], skip: int
    ) -> None:
        """Copy the rows of positions [start, stop) out of a blob, into consecutive blocks.

        Target i is the whole payload of a block of n_tokens[i]; the blob's first row belongs at token `skip` of the
        first target, and its last row may fall short of the end of the last. LayoutError if it holds anything else than those positions.
        """
        n_cells = stop - start
        if len(blob) != self.blob_bytes(n_cells) or self.magic_of(blob) != self.magic:
            raise LayoutError("unexpected size of a state")
        at = _HEADER.size
        targets_at = [0] * len(targets)
        for section in self.sections:
            if _unpack(_SECTION, blob, at) != (1, n_cells):
                raise LayoutError("a cache holds another number of cells")
            at += _SECTION.size
            meta = blob[at : at + section.meta_bytes * n_cells].reshape(n_cells, -1)
            order = _order(meta, start)
            at += meta.size
            if _unpack(_SECTION, blob, at) != (0, section.layers):
                raise LayoutError("another number of layers")
            at += _SECTION.size
            tables = [meta[:, _MORE_AT : _MORE_AT + section.more_bytes]]
            for part in section.parts:
                if _unpack(_PART, blob, at) != (part.kind, part.row_bytes):
                    raise LayoutError("another row size")
                at += _PART.size
                tables.append(blob[at : at + part.row_bytes * n_cells].reshape(n_cells, part.row_bytes))
                at += part.row_bytes * n_cells
            for table in tables:
                row_bytes = table.shape[1]
                rows = (table if order is None else table[order]).reshape(-1)
                for i, (first, count, offset) in enumerate(_spans(n_tokens, skip, n_cells)):
                    to = targets_at[i] + offset * row_bytes
                    source = rows[first * row_bytes : (first + count) * row_bytes]
                    targets[i][to : to + len(source)] = source
                    targets_at[i] += n_tokens[i] * row_bytes

    def join(self, blob: Bytes, start: int, sequence: int, blocks: Sequence[tuple[int, int, Bytes]]) -> None:
        """Fill a blob of blob_bytes(sum of used) with the first `used` rows of each (n_tokens, used, payload)."""
        n_cells = sum(used for _, used, _ in blocks)
        assert len(blob) == self.blob_bytes(n_cells)
        _HEADER.pack_into(blob.data, 0, self.magic, sequence)
        at = _HEADER.size
        sources_at = [0] * len(blocks)

        def take(row_bytes: int) -> Iterator[tuple[int, Bytes]]:
            """(first token, rows) of each block's next part."""
            first = 0
            for i, (n_tokens, used, payload) in enumerate(blocks):
                yield first, payload[sources_at[i] : sources_at[i] + used * row_bytes]
                sources_at[i] += n_tokens * row_bytes
                first += used

        for section in self.sections:
            _SECTION.pack_into(blob.data, at, 1, n_cells)
            at += _SECTION.size
            meta = blob[at : at + section.meta_bytes * n_cells].reshape(n_cells, -1)
            meta[:, :4] = np.arange(start, start + n_cells, dtype="<i4").view(np.uint8).reshape(-1, 4)
            meta[:, 4:8] = np.array([1], "<u4").view(np.uint8)
            for first, rows in take(section.more_bytes):
                more = rows.reshape(-1, section.more_bytes) if section.more_bytes else rows.reshape(0, 0)
                meta[first : first + len(more), _MORE_AT:-4] = more
            meta[:, -4:] = np.array([sequence], "<i4").view(np.uint8)
            at += meta.size
            _SECTION.pack_into(blob.data, at, 0, section.layers)
            at += _SECTION.size
            for part in section.parts:
                _PART.pack_into(blob.data, at, part.kind, part.row_bytes)
                at += _PART.size
                for first, rows in take(part.row_bytes):
                    to = at + first * part.row_bytes
                    blob[to : to + len(rows)] = rows
                at += part.row_bytes * n_cells


def _parse_section(blob: Bytes, at: int) -> tuple[Section, int]:
    """The section that begins at `at`, and where it ends."""
    streams, n_cells = _unpack(_SECTION, blob, at)
    if streams != 1 or not 1 < n_cells < len(blob):
        raise LayoutError("not one stream of cells")
    at += _SECTION.size
    more_bytes = _parse_meta(blob[at:], n_cells)
    at += (_META_BYTES + more_bytes) * n_cells
    transposed, layers = _unpack(_SECTION, blob, at)
    if transposed or not 0 < layers < 4096:
        raise LayoutError("values are transposed")
    at += _SECTION.size
    parts: list[Part] = []
    while len(parts) < 2 * layers and not (len(parts) == layers and at == len(blob)):
        kind, row_bytes = _unpack(_PART, blob, at)
        if not 0 < row_bytes <= 1 << 24:
            raise LayoutError("no row size")
        parts.append(Part(kind, row_bytes))
        at += _PART.size + row_bytes * n_cells
    if at > len(blob):
        raise LayoutError("a state ends early")
    return Section(layers, more_bytes, tuple(parts)), at


def _parse_meta(meta: Bytes, n_cells: int) -> int:
    """Bytes of a cell's entry beyond position and sequence."""
    for more_bytes in range(0, _MOST_MORE_BYTES + 1, 4):
        entry_bytes = _META_BYTES + more_bytes
        if entry_bytes * n_cells > len(meta):
            break
        entries = meta[: entry_bytes * n_cells].reshape(n_cells, entry_bytes)
        positions, counts = (np.ascontiguousarray(entries[:, i : i + 4]).view("<i4") for i in (0, 4))
        if np.array_equal(positions[:, 0], np.arange(n_cells)) and (counts == 1).all():
            return more_bytes
    raise LayoutError("cells are not laid out one by one")


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
    positions = np.ascontiguousarray(meta[:, :4]).view("<i4")[:, 0]
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
