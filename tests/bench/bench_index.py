"""Time to find a 1M-token prompt among 1M blocks: names, index reads and their MACs. Run as `python -m tests.bench.bench_index`.

The index is built as the store builds it. Prints one line per measurement; the lookup line is the one with a target (30 ms).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from appliance.kv.check import renew
from appliance.kv.index import FILE_NAME, Changes, Index, IndexEntry
from appliance.kv.keys import chain, chain_root
from appliance.kv.tiers.base import Extent
from appliance.types import BlockId, Fingerprint, Namespace, Tokens

BLOCK_TOKENS = 256
RECORD_BYTES = 3 * 2**20 + 8192
BATCH = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--prompt-tokens", type=int, default=1_000_000)
    parser.add_argument("--check", action="store_true", help="also time the check at start")
    options = parser.parse_args()
    key, uuid = os.urandom(32), os.urandom(16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE_NAME
        index = Index(path, index_key=key, store_uuid=uuid, map_bytes=16 * 2**30, create=True)
        prompt = Tokens(os.urandom(4 * options.prompt_tokens))
        root = chain_root(key, Namespace("bench"), Fingerprint(bytes(32), bytes(32)), BLOCK_TOKENS)
        ids = chain(key, root, prompt, BLOCK_TOKENS)
        started_s = time.perf_counter()
        build(index, options.blocks, prompt, [BlockId(root), *ids])
        say("build", time.perf_counter() - started_s, f"{options.blocks} blocks, {path.stat().st_size >> 20} MiB")
        times = []
        for _ in range(21):
            started_s = time.perf_counter()
            names = chain(key, root, prompt, BLOCK_TOKENS)
            found = index.present(names)
            times.append(time.perf_counter() - started_s)
            assert found == len(ids)
        say("lookup, first", times[0], f"{found} blocks, {options.prompt_tokens} tokens")
        say("lookup, median", statistics.median(times), f"worst {max(times) * 1e3:.1f} ms")
        index.close()
        if options.check:
            started_s = time.perf_counter()
            assert renew(path, index_key=key, store_uuid=uuid, map_bytes=16 * 2**30)
            say("check at start", time.perf_counter() - started_s, "copied, read through, replaced")


def build(index: Index, blocks: int, prompt: Tokens, names: list[BlockId]) -> None:
    """The prompt's blocks spread among others."""
    stride = max(1, blocks // len(names))
    batch: dict[BlockId, tuple[IndexEntry, Tokens]] = {}
    for n in range(blocks):
        depth, rest = divmod(n, stride)
        if rest == 0 and depth + 1 < len(names):
            block, parent, tokens = (
                names[depth + 1],
                names[depth],
                prompt[depth * BLOCK_TOKENS : (depth + 1) * BLOCK_TOKENS],
            )
        else:
            block, parent, tokens = (
                BlockId(os.urandom(32)),
                BlockId(os.urandom(32)),
                Tokens(os.urandom(4 * BLOCK_TOKENS)),
            )
        extent = Extent(n // 80, 4096 + n % 80 * RECORD_BYTES, RECORD_BYTES)
        batch[block] = (IndexEntry(extent, 3 * 2**20, BLOCK_TOKENS, depth * BLOCK_TOKENS, parent, n), tokens)
        if len(batch) == BATCH:
            index.apply(Changes(added=batch))
            batch = {}
    index.apply(Changes(added=batch))


def say(what: str, seconds: float, detail: str) -> None:
    print(f"{what:16} {seconds * 1e3:12.1f} ms   {detail}")  # noqa: T201


if __name__ == "__main__":
    main()
