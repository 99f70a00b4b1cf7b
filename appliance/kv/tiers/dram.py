"""The dram tier: one shared pool of memory, divided into slots, and what each slot holds.

Invariant: a slot belongs to at most one block; a block that is pinned, or not CLEAN, is never evicted; a slot that last
held another tenant's bytes is zeroed before it is handed out. The pool is plaintext KV: it is locked, left out of core
dumps, and shared with nobody but the inheritor of its descriptor. Threading: event loop only; views of slots may be
read and filled by other threads while the slot is LOADING or pinned.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import logging
import mmap
import os
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum

import psutil

from appliance.errors import ConfigError
from appliance.kv.base import PoolShape
from appliance.kv.counts import TierCounts
from appliance.kv.fair import FairShare
from appliance.kv.quotas import Quotas
from appliance.kv.tiers.files import tier_error
from appliance.security.seal import wipe
from appliance.types import BlockId, Namespace, Tier, TierUsage, Tokens

log = logging.getLogger(__name__)

_MADV_DONTDUMP = 16
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class DramPool:
    """A memfd of known size, mapped and touched; how it divides into slots is known once the engine told its layout."""

    def __init__(self, capacity_bytes: int, *, lock: bool) -> None:
        self.capacity_bytes = capacity_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        self.notes: tuple[str, ...] = ()
        if not self.capacity_bytes:
            raise ConfigError("tiers.dram.capacity must be at least one page")
        free_bytes = psutil.virtual_memory().available
        if self.capacity_bytes > free_bytes:  # to be told is better than to be killed while touching it
            raise ConfigError(
                f"tiers.dram.capacity: {self.capacity_bytes / 2**30:,.1f} GiB were asked for,"
                f" {free_bytes / 2**30:,.1f} GiB are free"
            )
        self.fd = os.memfd_create("kvctl-pool", os.MFD_CLOEXEC)  # the engine process gets it by pass_fds
        try:
            os.posix_fallocate(self.fd, 0, self.capacity_bytes)  # an error here, not a SIGBUS later
            self._map = mmap.mmap(
                self.fd, self.capacity_bytes, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
            )
        except OSError as error:
            os.close(self.fd)
            raise ConfigError(
                f"tiers.dram.capacity: {tier_error(error, 'this machine has not that much memory')}"
            ) from None
        self._map.madvise(_MADV_DONTDUMP)
        self._view = memoryview(self._map)
        self._slot_bytes = 0
        if lock and (refused := self._lock()):
            self.notes = (refused,)
            log.warning("%s", refused)

    def partition(self, slot_bytes: int) -> PoolShape:
        """Divide into slots. ConfigError if not even two fit: one block cannot come while another is pinned."""
        slots = self.capacity_bytes // slot_bytes
        if slots < 2:
            raise ConfigError(
                f"tiers.dram.capacity of {self.capacity_bytes} bytes holds no two blocks of {slot_bytes} bytes: "
                "raise it, or lower kv.block_tokens"
            )
        self._slot_bytes = slot_bytes
        return PoolShape(self.fd, slot_bytes, slots)

    def view(self, slot: int) -> memoryview:
        start = slot * self._slot_bytes
        return self._view[start : start + self._slot_bytes]

    def close(self) -> None:
        wipe(self._view)
        os.close(self.fd)
        with suppress(BufferError):  # whoever still holds a view of a slot holds the mapping, now zeroed
            self._view.release()
            self._map.close()

    def _lock(self) -> str | None:
        """Keep the pool out of swap; the reason and its fix if the kernel refuses."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        if _libc.mlock(address, self.capacity_bytes) == 0:
            return None
        number = ctypes.get_errno()
        if number not in (errno.ENOMEM, errno.EPERM, errno.EAGAIN):
            return f"the DRAM pool is not locked in memory: {os.strerror(number)}"
        return (
            f"the DRAM pool of {self.capacity_bytes >> 20} MiB is not locked and may be swapped out: allow it with "
            "`ulimit -l unlimited`, or LimitMEMLOCK=infinity in the systemd unit, or set tiers.dram.lock = false"
        )


class SlotState(str, Enum):
    RESERVED = "reserved"
    """Promised to a new block; the engine fills it."""
    LOADING = "loading"
    """Being read and opened from a lower tier."""
    DIRTY = "dirty"
    """Readable; its record is not durable yet."""
    CLEAN = "clean"
    """Readable, and durable below or kept by no lower tier: may be evicted."""

    @property
    def readable(self) -> bool:
        return self in (SlotState.DIRTY, SlotState.CLEAN)


@dataclass(eq=False)
class Entry:
    """One block in the pool."""

    ns: Namespace
    block: BlockId
    parent: BlockId
    start: int
    tokens: Tokens
    slot: int
    state: SlotState
    ready: asyncio.Future[bool]
    """Done when readable (True) or gone before that (False)."""
    used_us: int
    durable: bool = True
    """To be written below, or there already; False: it was asked to stay in memory only."""
    pins: int = 0
    kept: bool = False
    """Pinned by an operator, where no tier below holds it."""


@dataclass(frozen=True)
class Either:
    """What is in one of two containers."""

    first: Container[BlockId]
    second: Container[BlockId]

    def __contains__(self, block: object) -> bool:
        return block in self.first or block in self.second


class DramTable:
    """Which block is in which slot, and which go first."""

    def __init__(
        self, pool: DramPool, shape: PoolShape, policy: FairShare[BlockId], count: TierCounts, quotas: Quotas
    ) -> None:
        self._pool = pool
        self.slots = shape.slots
        self._slot_bytes = shape.slot_bytes
        self.policy = policy
        self._free = list(range(shape.slots - 1, -1, -1))
        self._last_tenant: list[str | None] = [None] * shape.slots
        self._entries: dict[BlockId, Entry] = {}
        self._children: dict[BlockId, dict[BlockId, Entry]] = {}
        self._held: set[BlockId] = set()  # pinned, kept, or not CLEAN: what eviction must pass over
        self._waiters: list[asyncio.Future[None]] = []
        self._pinned = 0
        self._pin_limit = shape.slots - max(1, shape.slots // 4)
        self._count = count
        self._quotas = quotas
        self._pinned_of: Counter[str] = Counter()

    def get(self, block: BlockId) -> Entry | None:
        return self._entries.get(block)

    def children(self, parent: BlockId) -> Iterator[Entry]:
        return iter(self._children.get(parent, {}).values())

    def entries(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def has_room(self, tenant: str, sparing: Container[BlockId] | None = None) -> bool:
        """Whether put() finds a slot for a block of this tenant without the blocks in `sparing`."""
        if self.policy.count(tenant) >= self._quotas.dram(tenant):
            return self.policy.can_give(Either(self._held, sparing or ()), tenant)
        if self._free or not sparing:
            return bool(self._free) or len(self._held) < len(self._entries)
        return any(block not in self._held and block not in sparing for block in self._entries)

    def may_pin(self, entry: Entry | None, tenant: str) -> bool:
        """Whether one more block of this tenant, or this one, may be pinned: a quarter of the slots, and of the tenant's
        quota, is left to exports."""
        quota = self._quotas.dram(tenant)
        free = self._pinned < self._pin_limit and self._pinned_of[tenant] < quota - max(1, quota // 4)
        return free or (entry is not None and entry.pins > 0)

    def enforce(self, tenant: str) -> None:
        """Evict what is beyond its quota, as far as it is not in use; that goes when the tenant's next block comes."""
        over = self.policy.count(tenant) - self._quotas.dram(tenant)
        if over > 0:
            for block in self.policy.evict_own(over, self._held, tenant):
                self.evict(self._entries[block], "quota")

    def change(self) -> asyncio.Future[None]:
        """Done when a slot was freed, unpinned or changed its state."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        return waiter

    def touch(self, blocks: Sequence[BlockId], used_us: int, *, counts: bool = True) -> None:
        """A prefix that ends with the last of these blocks is used now; `counts`: by one more request."""
        for block in self.policy.touch(blocks, counts=counts):
            self._entries[block].used_us = used_us

    def put(
        self,
        ns: Namespace,
        block: BlockId,
        parent: BlockId,
        start: int,
        tokens: Tokens,
        state: SlotState,
        used_us: int,
        sparing: Container[BlockId] | None = None,
    ) -> Entry:
        """A slot for a block the pool does not hold; evicts one if none is free, or the tenant's quota is full. The caller saw
        has_room(tenant, sparing)."""
        assert block not in self._entries
        protected = Either(self._held, sparing) if sparing else self._held
        over = self.policy.count(ns.tenant) + 1 - self._quotas.dram(ns.tenant)
        for own in self.policy.evict_own(over, protected, ns.tenant) if over > 0 else ():
            self.evict(self._entries[own], "quota")
        if not self._free:
            (victim,) = self.policy.evict(1, protected, ns.tenant)
            self.evict(self._entries[victim], "capacity")
        slot = self._free.pop()
        if self._last_tenant[slot] not in (None, ns.tenant):
            wipe(self._pool.view(slot))
        self._last_tenant[slot] = ns.tenant
        ready: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        entry = Entry(ns, block, parent, start, tokens, slot, state, ready, used_us)
        self._entries[block] = entry
        self._children.setdefault(parent, {})[block] = entry
        self._held.add(block)
        self.policy.add(ns.tenant, block, parent, start)
        return entry

    def set_state(self, entry: Entry, state: SlotState) -> None:
        entry.state = state
        if state.readable and not entry.ready.done():
            entry.ready.set_result(True)
        self._hold(entry)

    def pin(self, entry: Entry) -> None:
        entry.pins += 1
        self._pinned += entry.pins == 1
        self._pinned_of[entry.ns.tenant] += entry.pins == 1
        self._held.add(entry.block)

    def keep(self, entry: Entry, *, kept: bool) -> None:
        """Whether eviction passes it over."""
        entry.kept = kept
        self._hold(entry)

    def unpin(self, entry: Entry) -> None:
        assert entry.pins > 0
        entry.pins -= 1
        self._pinned -= entry.pins == 0
        self._pinned_of[entry.ns.tenant] -= entry.pins == 0
        self._hold(entry)

    def evict(self, entry: Entry, why: str) -> None:
        """drop(), counted."""
        self.drop(entry)
        self._count.evicted(why, 1)

    def drop(self, entry: Entry) -> None:
        """Forget the block and free its slot."""
        assert self._entries.get(entry.block) is entry
        if entry.pins:  # of waiters: there is nothing to read any more
            self._pinned -= 1
            self._pinned_of[entry.ns.tenant] -= 1
            entry.pins = 0
        del self._entries[entry.block]
        siblings = self._children[entry.parent]
        del siblings[entry.block]
        if not siblings:
            del self._children[entry.parent]
        self._held.discard(entry.block)
        self.policy.remove(entry.block)
        self._free.append(entry.slot)
        if not entry.ready.done():
            entry.ready.set_result(False)
        self._changed()

    def usage(self, now_us: int) -> TierUsage:
        entries = list(self._entries.values())
        used = [entry.used_us for entry in entries]
        return TierUsage(
            tier=Tier.DRAM,
            capacity_bytes=self.slots * self._slot_bytes,
            used_bytes=len(entries) * self._slot_bytes,
            blocks=len(entries),
            tokens=sum(len(entry.tokens) for entry in entries),
            pending_blocks=sum(not entry.state.readable for entry in entries),
            notes=self._pool.notes,
            oldest_s=max(0, now_us - min(used)) / 1e6 if used else None,
            newest_s=max(0, now_us - max(used)) / 1e6 if used else None,
        )

    def evictable(self, entry: Entry) -> bool:
        return entry.block not in self._held

    def _hold(self, entry: Entry) -> None:
        if entry.pins or entry.kept or entry.state is not SlotState.CLEAN:
            self._held.add(entry.block)
        else:
            self._held.discard(entry.block)
        self._changed()

    def _changed(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
