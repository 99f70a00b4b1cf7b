"""Sealed records on a medium: plaintext slots in, plaintext slots out.

Invariant: a slot is filled only from a record that verified as the block that was asked for; what reaches the medium is
sealed. Any thread may load; writers are serialised by the caller.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from appliance.errors import IntegrityError, TierIO
from appliance.kv.record import HEADER_BYTES, RecordIdentity, RecordMeta, Sealer, read_header, record_bytes
from appliance.kv.superblock import check_superblock, make_superblock
from appliance.kv.tiers.base import ALIGN_BYTES, Extent, RecordTier, SegmentInfo, SuperblockMaker
from appliance.kv.tiers.files import aligned_buffer
from appliance.security.keyring import Keyring
from appliance.types import BlockLayout


def superblock_maker(keyring: Keyring) -> SuperblockMaker:
    def make(lane: bytes, segment: int) -> bytes:
        owner = keyring.data_key(lane)
        assert owner is not None, "a lane is a data key of the keyring"
        return make_superblock(
            store_uuid=keyring.store_uuid,
            segment_id=segment,
            data_key_id=lane,
            data_key=owner[1],
            epoch=keyring.epoch,
        )

    return make


@dataclass(frozen=True)
class Plain:
    """A block and the memory that holds, or will hold, its KV bytes."""

    identity: RecordIdentity
    slot: memoryview


@dataclass(frozen=True)
class Loaded:
    """What became of a run of records: the first `opened` are in their slots; `fault` is why the next is not."""

    opened: int
    nbytes: int
    seconds: float
    fault: str | None


@dataclass(frozen=True)
class Found:
    """A record whose head verified; its body has not been read."""

    extent: Extent
    meta: RecordMeta
    seq: int


class Scratch:
    """Memory to read a record into and to open it into, grown to the largest one asked for. One thread at a time."""

    def __init__(self) -> None:
        self._buffer = self._slot = memoryview(b"")

    def of(self, nbytes: int) -> tuple[memoryview, memoryview]:
        if len(self._buffer) < nbytes:
            self._buffer, self._slot = aligned_buffer(nbytes), aligned_buffer(nbytes)
        return self._buffer[:nbytes], self._slot


class SealedTier:
    def __init__(self, tier: RecordTier, keyring: Keyring, clock: Callable[[], float] = time.time) -> None:
        self.tier = tier
        self._keyring = keyring
        self._clock = clock
        self._sealers: dict[bytes, Sealer] = {}
        self._seq = 0

    def lane(self, tenant: str) -> bytes:
        return self._keyring.tenant(tenant).data_key_id

    # --- storing (one writer) --------------------------------------------------------------------------------------

    def store(self, blocks: Sequence[Plain], layout: BlockLayout, buffer: memoryview) -> list[Extent]:
        """Seal and append blocks of one tenant, durable on return. TierError: none of them is on the medium."""
        written: list[Extent] = []
        sealer = self._sealer(self.lane(blocks[0].identity.tenant))
        rest = list(blocks)
        try:
            while rest:
                written += self._append(rest, sealer, layout, buffer)
            self.tier.sync()
        except BaseException:
            self.tier.free(written)
            raise
        return written

    def _append(self, rest: list[Plain], sealer: Sealer, layout: BlockLayout, buffer: memoryview) -> list[Extent]:
        """Take from the front of `rest` what fits the buffer and write it."""
        extents: list[Extent] = []
        used = 0
        try:
            while rest and used + record_bytes(layout, n := len(rest[0].identity.tokens)) <= len(buffer):
                block = rest[0]
                payload = block.slot[: layout.payload_bytes(n)]
                self._seq = max(self._seq + 1, int(self._clock() * 1e6))
                nbytes = sealer.seal_record(buffer[used:], block.identity, layout.frames(n), payload, self._seq)
                extents.append(self.tier.reserve(sealer.data_key_id, nbytes))
                used += nbytes
                del rest[0]
        except BaseException:
            self.tier.free(extents)
            raise
        assert extents, "the buffer holds at least one record"
        self.tier.write(extents, buffer[:used])
        return extents

    # --- loading ---------------------------------------------------------------------------------------------------

    def load(
        self, blocks: Sequence[Plain], extents: Sequence[Extent], layout: BlockLayout, buffer: memoryview
    ) -> Loaded:
        """One read over adjacent records of one segment, each opened into its slot."""
        started_s = time.perf_counter()
        whole = Extent(extents[0].segment, extents[0].offset, extents[-1].end - extents[0].offset)
        self.tier.read(whole, buffer)
        opened = nbytes = 0
        fault: str | None = None
        try:
            for block, extent in zip(blocks, extents, strict=True):
                at = extent.offset - whole.offset
                record = buffer[at : at + extent.length]
                frames = layout.frames(len(block.identity.tokens))
                self._sealer(read_header(record).data_key_id).open_record(record, block.identity, frames, block.slot)
                opened, nbytes = opened + 1, nbytes + sum(frames)
        except IntegrityError as error:
            fault = error.reason
        return Loaded(opened, nbytes, time.perf_counter() - started_s, fault)

    # --- scanning --------------------------------------------------------------------------------------------------

    def check_superblock(self, info: SegmentInfo) -> str:
        """The tenant whose segment it is; IntegrityError if it is not this store's."""
        return check_superblock(
            info.head or b"",
            store_uuid=self._keyring.store_uuid,
            segment_id=info.segment,
            data_key=self._keyring.data_key,
        )

    def heads(self, segment: int, start: int, end: int) -> Iterator[Found | None]:
        """Records of [start, end) whose head verifies, in order; steps over holes and whatever is no record.

        None for each page that the medium cannot read. TierError if it cannot tell where data is.
        """
        buffer = aligned_buffer(32 * ALIGN_BYTES)  # the largest head there is, and more
        position = start
        while (data := self.tier.next_data(segment, position)) is not None and data < end:
            position = data + ALIGN_BYTES
            try:
                found = self._head(segment, data, end, buffer)
            except IntegrityError:
                continue
            except TierIO:
                yield None
                continue
            yield found
            position = found.extent.end

    def _head(self, segment: int, offset: int, end: int, buffer: memoryview) -> Found:
        self.tier.read(Extent(segment, offset, ALIGN_BYTES), buffer)
        header = read_header(buffer[:HEADER_BYTES])
        if offset + header.record_bytes > end or header.head_bytes > len(buffer):
            raise IntegrityError("record is cut short", reason="torn")
        if header.head_bytes > ALIGN_BYTES:
            self.tier.read(Extent(segment, offset, header.head_bytes), buffer)
        meta = self._sealer(header.data_key_id).open_meta(buffer[: header.head_bytes])
        return Found(Extent(segment, offset, header.record_bytes), meta, header.seq)

    def verify(self, extent: Extent, scratch: Scratch) -> RecordMeta:
        """Read and open one whole record and throw it away. IntegrityError or TierError says what is wrong."""
        buffer, slot = scratch.of(extent.length)
        self.tier.read(extent, buffer)
        header = read_header(buffer)
        if header.record_bytes != extent.length:
            raise IntegrityError("record has another length than its place", reason="length")
        sealer = self._sealer(header.data_key_id)
        meta = sealer.open_meta(buffer)
        sealer.open_record(buffer, meta.identity, meta.frame_bytes, slot)
        return meta

    def _sealer(self, data_key_id: bytes) -> Sealer:
        sealer = self._sealers.get(data_key_id)
        if sealer is None:
            owner = self._keyring.data_key(data_key_id)
            if owner is None:
                raise IntegrityError("record is sealed by an unknown key", reason="identity")
            tenant, key = owner
            sealer = self._sealers[data_key_id] = Sealer(
                store_uuid=self._keyring.store_uuid,
                tenant=tenant,
                data_key_id=data_key_id,
                data_key=key,
                locate_key=self._keyring.tenant(tenant).locate_key,
            )
        return sealer
