"""A home whose small store holds a few prompts, and the files it is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from appliance.config import NvmeSection
from appliance.kv.recovery import Recovered
from appliance.kv.tiers.sealed import SealedTier
from tests.support.kv import fill, opened, prompt

SMALL = NvmeSection(capacity=2**20, segment=2**16)
PROMPTS = [prompt(seed, 16 * 6 + 5) for seed in range(3)]
BLOCKS = 7 * len(PROMPTS)


async def stored(home: Path, **settings: Any) -> None:
    async with opened(home, **settings) as store:
        for tokens in PROMPTS:
            await fill(store, tokens)
            await store.flush(5)


def index_file(home: Path) -> Path:
    return home / "store" / "index" / "index.lmdb"


def segments(home: Path) -> list[Path]:
    return sorted((home / "store").glob("*.seg"))


def tree(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file: its bytes, when they changed and the blocks they take, so that a punched hole is seen too."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_blocks, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def closed(below: tuple[SealedTier, Recovered]) -> Recovered:
    sealed, recovered = below
    recovered.index.close()
    sealed.tier.close()
    return recovered
