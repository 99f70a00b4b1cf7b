"""What a tier forgets first when tenants share it: of who holds most, what that tenant's own policy says.

Invariant: no block of a tenant that holds no more than its equal share of the blocks goes while a larger holder has one
that can go. Threading: as its owner's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from heapq import heapify, heappop, heappushpop
from typing import Generic

from appliance.kv.policy import NEW, EvictionPolicy, Name, Standing


class FairShare(Generic[Name]):
    """One policy per tenant, each of them as `make` gives it."""

    def __init__(self, make: Callable[[], EvictionPolicy[Name]]) -> None:
        self._make = make
        self._policies: dict[str, EvictionPolicy[Name]] = {}
        self._owners: dict[Name, str] = {}

    def add(self, tenant: str, block: Name, parent: Name, start: int, standing: Standing = NEW) -> None:
        if tenant not in self._policies:
            self._policies[tenant] = self._make()
        self._policies[tenant].add(block, parent, start, standing)
        self._owners[block] = tenant

    def touch(self, blocks: Sequence[Name], *, counts: bool = True) -> list[Name]:
        """As EvictionPolicy.touch: names are one tenant's, so a path is."""
        tenant = next((self._owners[block] for block in reversed(blocks) if block in self._owners), None)
        return [] if tenant is None else self._policies[tenant].touch(blocks, counts=counts)

    def standing(self, block: Name) -> Standing:
        return self._policies[self._owners[block]].standing(block)

    def clock(self, tenant: str) -> float:
        """Of a block of this tenant that is used now."""
        policy = self._policies.get(tenant)
        return NEW.clock if policy is None else policy.clock

    def owner(self, block: Name) -> str | None:
        return self._owners.get(block)

    def remove(self, block: Name) -> None:
        """The tier no longer holds it. Unknown blocks are ignored."""
        tenant = self._owners.pop(block, None)
        if tenant is not None:
            policy = self._policies[tenant]
            policy.remove(block)
            if not len(policy):
                del self._policies[tenant]

    def evict(self, n: int, protected: Container[Name], tenant: str) -> list[Name]:
        """The n blocks to forget first for n new ones of `tenant`; empty if there are not n. As EvictionPolicy.evict."""
        chosen = [block for _, block in zip(range(n), self._in_order(protected, {tenant: n}), strict=False)]
        if len(chosen) < n:
            return []
        shares = Counter(self._owners[block] for block in chosen)
        return [block for owner, k in shares.items() for block in self._policies[owner].evict(k, protected)]

    def count(self, tenant: str) -> int:
        """Its blocks."""
        policy = self._policies.get(tenant)
        return 0 if policy is None else len(policy)

    def evict_own(self, n: int, protected: Container[Name], tenant: str) -> list[Name]:
        """Of this tenant's blocks the n to forget first, or those there are."""
        policy = self._policies.get(tenant)
        if policy is None:
            return []
        able = sum(1 for _ in zip(range(n), policy.oldest_first(protected), strict=False))
        return policy.evict(able, protected) if able else []

    def can_give(self, protected: Container[Name], tenant: str) -> bool:
        """Whether evict_own() would name one."""
        policy = self._policies.get(tenant)
        return policy is not None and next(policy.oldest_first(protected), None) is not None

    def oldest_first(self) -> Iterator[Name]:
        """All blocks in the order of eviction."""
        return self._in_order((), {})

    def _in_order(self, protected: Container[Name], coming: dict[str, int]) -> Iterator[Name]:
        """The largest holder gives one, again and again; of equals the one for whom room is made."""
        heads = [
            (-len(policy) - coming.get(tenant, 0), tenant not in coming, tenant, policy.oldest_first(protected))
            for tenant, policy in self._policies.items()
        ]
        heapify(heads)
        while heads:
            head = heappop(heads)
            while (block := next(head[3], None)) is not None:
                yield block
                head = heappushpop(heads, (head[0] + 1, *head[1:]))

    def heads(self) -> Iterator[Name]:
        """A few blocks, among them the least recently used."""
        return (block for policy in self._policies.values() for block in policy.heads())

    def __len__(self) -> int:
        return len(self._owners)

    def __contains__(self, block: object) -> bool:
        return block in self._owners
