"""The nouns every package shares: tokens, blocks, namespaces, fingerprints, tiers.

Invariant: everything here is an immutable value; nothing here does I/O. Safe to use from any thread.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import NewType

BlockId = NewType("BlockId", bytes)
"""32 bytes: HMAC chained over the prefix (FORMAT.md section 2). Opaque without the tenant's hash key."""

ROOT_BYTES = 32
TOKEN_BYTES = 4
MAX_TOKEN_ID = 2**31 - 1


class Tier(str, Enum):
    """Where KV lives, fastest first. On a CPU-only box `hbm` means the engine's own KV cells."""

    HBM = "hbm"
    DRAM = "dram"
    NVME = "nvme"
    REMOTE = "remote"

    def __str__(self) -> str:
        return self.value


class Tokens:
    """An immutable token sequence, held as the u32 little-endian bytes that are hashed, sealed and sent.

    Slicing is by token and returns Tokens; `data` is the bytes. A million tokens are 4 MB and one object.
    """

    __slots__ = ("data",)

    def __init__(self, data: bytes = b"") -> None:
        if len(data) % TOKEN_BYTES:
            raise ValueError(f"{len(data)} bytes are not a whole number of u32 tokens")
        self.data = bytes(data)

    @classmethod
    def of(cls, ids: Iterable[int]) -> Tokens:
        """Token ids in [0, 2**31); OverflowError or TypeError for anything else."""
        values = array("I", iter(ids))  # bytes would be read as machine words
        if values and max(values) > MAX_TOKEN_ID:
            raise OverflowError("token id beyond 2**31 - 1")
        if sys.byteorder == "big":
            values.byteswap()
        return cls(values.tobytes())

    def ids(self) -> list[int]:
        values = array("I")
        values.frombytes(self.data)
        if sys.byteorder == "big":
            values.byteswap()
        return values.tolist()

    def common_prefix(self, other: Tokens) -> int:
        """Number of leading tokens both sequences share."""
        n = min(len(self), len(other))
        low, high = 0, n
        a, b = self.data, other.data  # slices of bytes compare many times faster than those of memoryviews
        if a[: n * TOKEN_BYTES] == b[: n * TOKEN_BYTES]:
            return n
        while low < high:  # invariant: the first `low` tokens agree; they differ somewhere before `high`
            mid = (low + high) // 2
            if a[low * TOKEN_BYTES : (mid + 1) * TOKEN_BYTES] == b[low * TOKEN_BYTES : (mid + 1) * TOKEN_BYTES]:
                low = mid + 1
            else:
                high = mid
        return low

    def __len__(self) -> int:
        return len(self.data) // TOKEN_BYTES

    def __getitem__(self, part: slice) -> Tokens:
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise ValueError("tokens are sliced with step 1 only")
        return Tokens(self.data[start * TOKEN_BYTES : stop * TOKEN_BYTES])

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.data + other.data)

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokens) and self.data == other.data

    def __hash__(self) -> int:
        return hash(self.data)

    def __repr__(self) -> str:
        return f"Tokens({len(self)})"  # token ids are content: they never reach a log through repr


@dataclass(frozen=True)
class Fingerprint:
    """Everything that changes KV bytes or their meaning. Two 32-byte digests.

    model:  SHA-256 over the weights' SHA-256, adapters with scales, and rope parameters.
    layout: SHA-256 over engine name and build, state version, KV types, row sizes, layer count, backend class.
    """

    model: bytes
    layout: bytes

    def __post_init__(self) -> None:
        if len(self.model) != 32 or len(self.layout) != 32:
            raise ValueError("a fingerprint is two 32-byte digests")

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.model + self.layout).digest()


@dataclass(frozen=True)
class BlockLayout:
    """Shape of one block's KV bytes as an engine exports it.

    A payload of n tokens is `frames` parts in order, each sealed on its own; frame i holds
    `fixed_bytes[i] + n * token_bytes[i]` bytes. llama.cpp has one frame, a layer-streaming engine one per layer.
    A block of a layout that is not divisible holds the state after its last token: it is used whole or not at all.
    """

    block_tokens: int
    token_bytes: tuple[int, ...]
    fixed_bytes: tuple[int, ...]
    divisible: bool = True

    def __post_init__(self) -> None:
        if self.block_tokens < 1 or not self.token_bytes or len(self.token_bytes) != len(self.fixed_bytes):
            raise ValueError("a layout has at least one frame and one token per block")

    def frames(self, n_tokens: int) -> tuple[int, ...]:
        """Bytes of each frame of a block of n_tokens."""
        return tuple(f + n_tokens * t for f, t in zip(self.fixed_bytes, self.token_bytes, strict=True))

    def payload_bytes(self, n_tokens: int) -> int:
        return sum(self.fixed_bytes) + n_tokens * sum(self.token_bytes)

    @property
    def slot_bytes(self) -> int:
        """Bytes of a DRAM slot: a full block, rounded up to 4 KiB."""
        return -(-self.payload_bytes(self.block_tokens) // 4096) * 4096


@dataclass(frozen=True)
class Namespace:
    """Who may share KV: blocks are visible inside one (tenant, name, salt) and nowhere else."""

    tenant: str
    name: str = "default"
    salt: bytes = b""


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. Ranges are checked at the API edge."""

    max_tokens: int
    """0: prefill only, sample nothing."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    """None: no log-probabilities; n: of the chosen token and the n likeliest."""
    ignore_eos: bool = False
    min_tokens: int = 0
    """No end before so many tokens, unless a grammar allows nothing else."""
    grammar: str | None = None
    """GBNF, checked (chat/gbnf.py): the completion is a word of it, or the beginning of one where it is cut off."""


class FinishReason(str, Enum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class TokenLogprob:
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokensBySource:
    """Prompt tokens of one request, by where their KV came from."""

    hbm: int = 0
    dram: int = 0
    nvme: int = 0
    remote: int = 0
    computed: int = 0

    @property
    def cached(self) -> int:
        return self.hbm + self.dram + self.nvme + self.remote

    @property
    def total(self) -> int:
        return self.cached + self.computed


@dataclass(frozen=True)
class TierUsage:
    """Occupancy of one tier. Bytes are bytes of the tier's medium, alignment included."""

    tier: Tier
    capacity_bytes: int
    used_bytes: int
    blocks: int
    tokens: int
    pending_blocks: int = 0
    """On their way to this tier."""
    pending_bytes: int = 0
    state: str = "ok"
    """ok | degraded (failing, bypassed for now) | off"""
    pinned_blocks: int = 0
    pinned_bytes: int = 0
    pin_budget_bytes: int = 0
    notes: tuple[str, ...] = field(default=())
    oldest_s: float | None = None
    """Seconds since the least recently used block was used; None if there is none."""
    newest_s: float | None = None
