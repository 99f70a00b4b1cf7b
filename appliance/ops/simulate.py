"""Replays a trace against tiers of any size, with the eviction policies that the store itself uses.

The model: a request finds the longest prefix of its prompt's blocks in dram and nvme; the rest is computed. What was found
in nvme goes up to dram; what was computed, answer included, goes into both, and the policies give up what is too much. hbm
is left out: what it serves beyond dram costs no less. Tails are left out: less than a block a request. Times come from
the trace's header: seconds to compute a token at its depth, bytes per second from each tier.

Invariant: the same trace and sizes give the same result. Memory grows with the tiers, not with the trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from pydantic import ValidationError

from appliance.api.trace import Replayed, TraceEvent, TraceHeader
from appliance.errors import UsageError
from appliance.kv.costs import CostAware
from appliance.kv.policy import EvictionPolicy, LeafFirstLru

POLICIES: dict[str, Callable[[TraceHeader], EvictionPolicy[int]]] = {
    "cost": lambda header: CostAware(lambda position: header.prefill_token_s + header.prefill_depth_s * position),
    "lru": lambda header: LeafFirstLru(),
}

ROOT = -1
"""Parent of a path's first block."""


def read(path: Path) -> tuple[TraceHeader, Iterator[TraceEvent]]:
    """UsageError names the line that is not of a trace."""
    lines = _lines(path)
    try:
        header = TraceHeader.model_validate_json(next(lines, b""))
    except ValidationError:
        raise UsageError(f"{path} is not a trace; make one with: kvctl trace record {path.name}") from None
    return header, _events(path, lines)


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None


def _events(path: Path, lines: Iterator[bytes]) -> Iterator[TraceEvent]:
    for number, line in enumerate(lines, 2):
        try:
            event = TraceEvent.model_validate_json(line)
        except ValidationError:
            raise UsageError(f"{path}: line {number} is not an event of a trace") from None
        if any(first > last for first, last in event.path):
            raise UsageError(f"{path}: line {number} holds a range that runs backwards")
        yield event


class Simulation:
    """One choice of policy and sizes. `replay` events in order, then take the `result`."""

    def __init__(self, header: TraceHeader, policy: str, *, dram_bytes: int, nvme_bytes: int) -> None:
        self._header = header
        # as the store does: what DRAM gives up is loaded again, which costs the same at every depth
        above = header.model_copy(update={"prefill_depth_s": 0.0}) if nvme_bytes else header
        self._dram = _Tier(POLICIES[policy](above), dram_bytes // header.block_bytes, header.block_tokens)
        self._nvme = _Tier(POLICIES[policy](header), nvme_bytes // header.block_bytes, header.block_tokens)
        self._result = Replayed(policy=policy, dram_bytes=dram_bytes, nvme_bytes=nvme_bytes)
        self._seen = 0
        """Blocks with lower numbers appeared before."""

    def replay(self, event: TraceEvent) -> None:
        ids = list(chain.from_iterable(range(first, last + 1) for first, last in event.path))
        prompt = ids[: event.prompt_blocks]
        dram, nvme, result = self._dram, self._nvme, self._result
        in_dram = in_nvme = 0
        for block in prompt:
            if block in dram.policy:
                in_dram += 1
            elif block in nvme.policy:
                in_nvme += 1
            else:
                break
        found = in_dram + in_nvme
        dram.hold(ids, found)
        nvme.hold(ids, found)
        result.requests += 1
        result.block_events += len(ids)
        result.prompt_blocks += len(prompt)
        result.dram_blocks += in_dram
        result.nvme_blocks += in_nvme
        result.reusable_blocks += next((n for n, block in enumerate(prompt) if block >= self._seen), len(prompt))
        self._seen = max(self._seen, max(ids, default=-1) + 1)
        n_tokens = event.prompt_tokens
        computed_s = self._compute_s(found * self._header.block_tokens, n_tokens)
        result.compute_s += computed_s
        result.load_s += self._load_s("dram", in_dram) + self._load_s("nvme", in_nvme)
        result.saved_s += self._compute_s(0, n_tokens) - computed_s

    def result(self) -> Replayed:
        self._result.evicted_dram, self._result.evicted_nvme = self._dram.evicted, self._nvme.evicted
        return self._result

    def _compute_s(self, start: int, stop: int) -> float:
        header = self._header
        depth = (stop * stop - start * start) / 2
        return header.prefill_token_s * (stop - start) + header.prefill_depth_s * depth if stop > start else 0.0

    def _load_s(self, tier: str, blocks: int) -> float:
        rate = self._header.bytes_per_s.get(tier, 0.0)  # type: ignore[call-overload]
        return blocks * self._header.block_bytes / rate if rate else 0.0


class _Tier:
    def __init__(self, policy: EvictionPolicy[int], capacity_blocks: int, block_tokens: int) -> None:
        self.policy = policy
        self.evicted = 0
        self._capacity_blocks = capacity_blocks
        self._block_tokens = block_tokens

    def hold(self, ids: Sequence[int], found: int) -> None:
        """The whole path is used now; what of it the tier has not is put into it, as far as there is room for a path."""
        policy = self.policy
        ids = ids[: self._capacity_blocks]
        new = [n for n, block in enumerate(ids) if block not in policy]
        short = len(policy) + len(new) - self._capacity_blocks
        if short > 0:
            victims = policy.evict(short, frozenset(ids))
            for victim in victims:
                policy.remove(victim)
            self.evicted += len(victims)
        for n in new:
            policy.add(ids[n], ids[n - 1] if n else ROOT, n * self._block_tokens)
        policy.touch(ids)
