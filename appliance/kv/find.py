"""Finds blocks by prefix, in DRAM and below: names, longest stored prefix to the token, what is missing.

Invariant: nothing here changes anything, not even recency. Threading: event loop only.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from appliance.kv.base import Hit, Lookup, NewBlock
from appliance.kv.below import Below
from appliance.kv.keys import block_id, chain, chain_root
from appliance.kv.retention import Retention
from appliance.kv.siblings import longest_common, strict_prefixes
from appliance.kv.tiers.dram import DramTable, Entry, SlotState
from appliance.security.keyring import Keyring
from appliance.types import BlockId, BlockLayout, Fingerprint, Namespace, Tier, Tokens


@dataclass(frozen=True)
class _Kept:
    """Blocks of a tier whose time is not over."""

    blocks: Container[BlockId]
    retention: Retention

    def __contains__(self, block: object) -> bool:
        return block in self.blocks and not self.retention.is_over(block)  # type: ignore[arg-type]


class Finder:
    def __init__(
        self,
        keyring: Keyring,
        fingerprint: Fingerprint,
        layout: BlockLayout,
        dram: DramTable,
        below: Below | None,
        retention: Retention,
    ) -> None:
        self._keyring = keyring
        self._fingerprint = fingerprint
        self._layout = layout
        self._dram = dram
        self._below = below
        self._retention = retention

    def hash_key(self, ns: Namespace) -> bytes:
        return self._keyring.tenant(ns.tenant).hash_key

    def root(self, ns: Namespace) -> bytes:
        return chain_root(self.hash_key(ns), ns, self._fingerprint, self._layout.block_tokens)

    def names(self, ns: Namespace, tokens: Tokens) -> list[BlockId]:
        return self._names(ns, tokens)[1:]

    def lookup(self, ns: Namespace, tokens: Tokens) -> Lookup:
        size = self._layout.block_tokens
        reach = len(tokens) if self._layout.divisible else len(tokens) - 1  # a state beyond that is of no use
        names = self._names(ns, tokens[: max(reach, 0)])
        payload_bytes = self._layout.payload_bytes(size)
        hits: list[Hit] = []
        below = self._usable_below()
        for n, block in enumerate(names[1:]):
            entry = self._dram.get(block)
            if not (block in below if entry is None else self._comes(entry)):
                break
            hits.append(Hit(block, names[n], n * size, size, size, _tier(entry), payload_bytes))
        partial = self._partial(names[len(hits)], tokens, len(hits) * size)
        return Lookup(tuple(hits) if partial is None else (*hits, partial))

    def missing(self, ns: Namespace, tokens: Tokens) -> list[NewBlock]:
        size = self._layout.block_tokens
        names = self._names(ns, tokens)
        below = self._usable_below()
        found = [
            NewBlock(block, names[n], n * size, tokens[n * size : (n + 1) * size])
            for n, block in enumerate(names[1:])
            if block not in below and not self._present(block)
        ]
        start = (len(names) - 1) * size
        tail = tokens[start:]
        if len(tail):
            new = NewBlock(block_id(self.hash_key(ns), names[-1], tail), names[-1], start, tail)
            if not self.holds(new):
                found.append(new)
        return found

    def _names(self, ns: Namespace, tokens: Tokens) -> list[BlockId]:
        """The namespace's root and the ids of the full blocks: names[n] is the parent of block n."""
        root = self.root(ns)
        return [BlockId(root), *chain(self.hash_key(ns), root, tokens, self._layout.block_tokens)]

    def _usable_below(self) -> Container[BlockId]:
        """What can be loaded. Nothing while the medium fails: its blocks are worth computing and keeping in DRAM again."""
        if self._below is None or not self._below.loads.breaker.allows:
            return ()
        return _Kept(self._below.policy, self._retention)

    def _comes(self, entry: Entry) -> bool:
        """Whether it is readable or soon will be: not if its time is over, or a failing medium has yet to give it."""
        if self._retention.is_over(entry.block):
            return False
        return entry.state is not SlotState.LOADING or self._below is None or self._below.loads.breaker.allows

    def _partial(self, parent: BlockId, tokens: Tokens, start: int) -> Hit | None:
        """The child of `parent` that shares most leading tokens with what comes at `start`; of equals, the one in DRAM."""
        rest = tokens[start : start + self._layout.block_tokens]
        if not self._layout.divisible:
            return self._longest_whole(parent, rest, start)
        best: tuple[int, BlockId, int] | None = None
        for entry in filter(self._comes, self._dram.children(parent)):
            shared = entry.tokens.common_prefix(rest)
            if shared and (best is None or shared > best[0]):
                best = (shared, entry.block, len(entry.tokens))
        if self._below is not None and self._below.loads.breaker.allows and len(rest):
            nearest = longest_common(self._below.children(parent), rest)
            if nearest is not None and (best is None or nearest[0] > best[0]):
                indexed = self._below.entries([nearest[1]]).get(nearest[1])
                if indexed is not None and not self._retention.is_over(nearest[1]):
                    best = (nearest[0], nearest[1], indexed.n_tokens)
        if best is None:
            return None
        shared, block, n_tokens = best
        tier = _tier(self._dram.get(block))
        return Hit(block, parent, start, n_tokens, shared, tier, self._layout.payload_bytes(n_tokens))

    def _longest_whole(self, parent: BlockId, rest: Tokens, start: int) -> Hit | None:
        """Of the children that `rest` begins with and goes on after, the longest."""
        found: dict[BlockId, int] = {}
        if self._below is not None and self._below.loads.breaker.allows:
            stored = strict_prefixes(self._below.children(parent), rest)
            entries = self._below.entries(block for block in stored if not self._retention.is_over(block))
            found |= {block: entry.n_tokens for block, entry in entries.items()}
        for entry in filter(self._comes, self._dram.children(parent)):
            n = len(entry.tokens)
            if n < len(rest) and entry.tokens == rest[:n]:
                found[entry.block] = n
        if not found:
            return None
        block, n = max(found.items(), key=lambda each: each[1])
        return Hit(block, parent, start, n, n, _tier(self._dram.get(block)), self._layout.payload_bytes(n))

    def _covered(self, parent: BlockId, tokens: Tokens) -> bool:
        """Whether a child of `parent` begins with these tokens."""
        hit = self._partial(parent, tokens, 0)
        return hit is not None and hit.use_tokens == len(tokens)

    def _present(self, block: BlockId) -> bool:
        """Whether it has a slot that it will not lose to its like."""
        entry = self._dram.get(block)
        return entry is not None and not (self._retention.is_over(block) and self._dram.evictable(entry))

    def holds(self, new: NewBlock) -> bool:
        """Whether some tier holds the block or will, or holds all of it in a longer one that may be used in part."""
        if self._present(new.block):
            return True
        if new.block in self._usable_below():
            return True
        in_part = self._layout.divisible and len(new.tokens) < self._layout.block_tokens
        return in_part and self._covered(new.parent, new.tokens)


def _tier(entry: Entry | None) -> Tier:
    return Tier.NVME if entry is None or entry.state is SlotState.LOADING else Tier.DRAM
