"""What to measure of a box, and what the measurements mean. `calibration.py` takes them.

Invariant: pure, but for reading what the processor is called. Threading: any.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

CHUNK_S = 1.0
"""About what the computing of one chunk should take."""
CHUNKS = (64, 128, 256, 512)
DEPTHS = (0.0, 0.25, 0.5, 0.85)
"""Of the context."""


@dataclass(frozen=True)
class Medium:
    """A medium below DRAM as it was measured."""

    latency_s: float
    read_bytes_per_s: float
    open_bytes_per_s: float
    """To verify and decrypt, one thread."""

    def load_s(self, nbytes: int) -> float:
        """From the medium into DRAM: while one part is opened the next is read."""
        return self.latency_s + nbytes / min(self.read_bytes_per_s, self.open_bytes_per_s)


def box() -> str:
    """What a calibration holds for: the processor and how many cores of it there are."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")
    return f"{name} x{os.cpu_count() or 1}"


def chunk_tokens(prefill_tokens_per_s: float) -> int:
    """The largest chunk that is computed in about CHUNK_S at shallow depth."""
    return max(n for n in CHUNKS if n == CHUNKS[0] or n <= CHUNK_S * prefill_tokens_per_s)


def depths(context_tokens: int, block_tokens: int) -> list[int]:
    """Whole blocks, rising, that leave room for the largest chunk and what is generated behind it."""
    room = context_tokens - 2 * CHUNKS[-1]
    return sorted(
        {
            int(share * context_tokens) // block_tokens * block_tokens
            for share in DEPTHS
            if share * context_tokens <= room
        }
    )
