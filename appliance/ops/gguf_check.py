"""Is this file a whole GGUF model? Read before anything heavier touches it.

Owns a reader that trusts nothing: every count and length is capped and compared with the bytes that are there, so a
hostile file costs bounded time and memory. Invariant: the file is only read. Threading: any thread.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from appliance.errors import ModelError

MAX_ITEMS = 1 << 22
"""Of all arrays together; the largest real vocabularies have about 300,000 tokens."""
MAX_HEADER_BYTES = 1 << 28
MAX_KEY_BYTES = 1 << 16
MAX_STRING_BYTES = 1 << 24
MAX_TENSORS = 1 << 16
MAX_DIMENSIONS = 4

_FIXED_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY, _U16, _U32 = 8, 9, 2, 4
_KEPT = ("general.architecture", "general.name")


@dataclass(frozen=True)
class Summary:
    architecture: str
    name: str
    parameters: int


class _Bad(Exception):
    """What is wrong, in a few words."""


def check(path: Path) -> Summary:
    """ModelError with one clear line unless `path` is a GGUF model with all its tensor data."""
    try:
        with path.open("rb") as file:
            return _Reader(file, path.stat().st_size).summary()
    except _Bad as error:
        raise ModelError(f"{path}: {error}") from None
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None


class _Reader:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self._at = 0
        self._items = 0
        self._strings: dict[str, str] = {}
        self._alignment = 32
        self._splits = 1

    def summary(self) -> Summary:
        if self._size < 4 or self._take(4) != b"GGUF":
            raise _Bad("not a GGUF file")
        version = self._u32()
        if version not in (2, 3):
            raise _Bad(f"GGUF version {version} is not supported")
        tensors, pairs = self._u64(), self._u64()
        if not 0 < tensors <= MAX_TENSORS or pairs > MAX_TENSORS:
            raise _Bad("damaged: its header announces no tensors or absurdly many entries")
        for _ in range(pairs):
            self._pair()
        if self._splits > 1:
            raise _Bad(f"one of {self._splits} parts; merge them first with llama-gguf-split --merge")
        if "general.architecture" not in self._strings:
            raise _Bad("damaged: it does not say which architecture it is")
        infos = [self._tensor() for _ in range(tensors)]
        data_at = -(-self._at // self._alignment) * self._alignment
        end = data_at + max(offset + nbytes for offset, nbytes, _ in infos)
        if end > self._size:
            raise _Bad(f"truncated: {self._size} of at least {end} bytes are there")
        architecture = self._strings["general.architecture"]
        return Summary(architecture, self._strings.get("general.name", ""), sum(n for _, _, n in infos))

    def _pair(self) -> None:
        key = self._string(MAX_KEY_BYTES)
        kind = self._u32()
        if kind == _ARRAY:
            self._array()
        elif kind == _STRING:
            value = self._string(MAX_STRING_BYTES)
            if key in _KEPT:
                self._strings[key] = value
        else:
            raw = self._take(_fixed_bytes(kind))
            if key == "general.alignment" and kind == _U32:
                self._alignment = int.from_bytes(raw, "little")
                if not 0 < self._alignment <= 1 << 20:
                    raise _Bad("damaged: its alignment makes no sense")
            elif key == "split.count" and kind == _U16:
                self._splits = int.from_bytes(raw, "little")

    def _array(self) -> None:
        kind, count = self._u32(), self._u64()
        self._items += count
        if self._items > MAX_ITEMS or kind == _ARRAY:
            raise _Bad("damaged: it holds an absurdly long or nested list")
        if kind == _STRING:
            for _ in range(count):
                self._skip(self._u64())
        else:
            self._skip(count * _fixed_bytes(kind))

    def _tensor(self) -> tuple[int, int, int]:
        """(offset, bytes, elements) of one tensor."""
        self._string(MAX_KEY_BYTES)
        dimensions = self._u32()
        if not 0 < dimensions <= MAX_DIMENSIONS:
            raise _Bad("damaged: a tensor has an impossible shape")
        shape = [self._u64() for _ in range(dimensions)]
        kind, offset = self._u32(), self._u64()
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except ValueError:
            raise _Bad(f"a tensor has the unknown type {kind}") from None
        elements = prod(shape)
        if elements < 1 or shape[0] % block or offset % self._alignment:
            raise _Bad("damaged: a tensor has an impossible shape")
        return offset, elements // block * block_bytes, elements

    def _string(self, limit: int) -> str:
        n = self._u64()
        if n > limit:
            raise _Bad("damaged: a text in its header is absurdly long")
        return self._take(n).decode("utf-8", "replace")

    def _u32(self) -> int:
        return int(struct.unpack("<I", self._take(4))[0])

    def _u64(self) -> int:
        return int(struct.unpack("<Q", self._take(8))[0])

    def _take(self, n: int) -> bytes:
        self._advance(n)
        return self._file.read(n)

    def _skip(self, n: int) -> None:
        self._advance(n)
        self._file.seek(self._at)

    def _advance(self, n: int) -> None:
        """Bounds are checked before anything of that size is read or allocated."""
        self._at += n
        if self._at > self._size:
            raise _Bad("truncated: it ends inside its header")
        if self._at > MAX_HEADER_BYTES:
            raise _Bad("damaged: its header is absurdly long")


def _fixed_bytes(kind: int) -> int:
    if kind not in _FIXED_BYTES:
        raise _Bad("damaged: a header entry has an unknown type")
    return _FIXED_BYTES[kind]
