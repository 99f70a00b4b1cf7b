"""Children of one parent: many of them, read in parts while others come and go."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.errors import TierIO
from appliance.kv import index as index_module
from appliance.kv import siblings as siblings_module
from appliance.kv.index import Changes, Index, IndexEntry, LastUse
from appliance.kv.siblings import SiblingCache
from appliance.kv.tiers.base import Extent
from appliance.types import BlockId, Tokens

PARENT = BlockId(b"p" * 32)
OTHER = BlockId(b"q" * 32)
AT_ONCE = 4


def _block(n: int) -> BlockId:
    return BlockId(n.to_bytes(32, "big"))


def _changes(numbers: range, parent: BlockId = PARENT) -> Changes:
    entry = IndexEntry(Extent(1, 4096, 4096), 10, 1, 0, parent, LastUse(0))
    return Changes(added={_block(n): (entry, Tokens.of([n])) for n in numbers})


def _children(*numbers: int) -> list[tuple[bytes, BlockId]]:
    return sorted((Tokens.of([n]).data, _block(n)) for n in numbers)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    monkeypatch.setattr(index_module, "_AT_ONCE", AT_ONCE)
    opened = Index(tmp_path / "i", index_key=b"k" * 32, store_uuid=b"u" * 16, map_bytes=2**24, create=True)
    yield opened
    opened.close()


def _wait(index: Index) -> None:
    """Until the thread has read what it was given."""
    index._reader.submit(int).result()


def test_a_lookup_waits_for_few_children_and_finds_all_of_them_soon(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.apply(_changes(range(10)))
    here = threading.get_ident()
    opened: list[int] = []
    real = index._open_tokens

    def count(key: bytes, sealed: bytes) -> bytes | None:
        opened.append(threading.get_ident())
        return real(key, sealed)

    monkeypatch.setattr(index, "_open_tokens", count)
    assert set(index.children(PARENT)) <= set(_children(*range(10)))
    assert opened.count(here) == AT_ONCE
    _wait(index)
    assert index.children(PARENT) == _children(*range(10))
    assert len(opened) == 10, "each was decrypted once"
    index.apply(_changes(range(20, 21), OTHER))
    index.children(OTHER)
    assert index.children(PARENT) == _children(*range(10))
    assert len(opened) == 11, "another parent does not push it out"


def test_what_changes_between_two_parts_is_not_lost_and_does_not_come_back(index: Index) -> None:
    index.apply(_changes(range(12)))
    gate, read = threading.Event(), threading.Event()
    real = index._siblings.merge

    def merge(parent: BlockId, part: list[tuple[bytes, BlockId]], *, last: bool) -> bool:
        if threading.current_thread() is not threading.main_thread():
            read.set()
            assert gate.wait(10)
        return real(parent, part, last=last)

    index._siblings.merge = merge  # type: ignore[method-assign]
    index.children(PARENT)
    assert read.wait(10), "the second part, 4 to 7, was read and is not merged yet"
    index.apply(Changes(removed=[_block(n) for n in (1, 5, 6, 9)]))
    index.apply(_changes(range(6, 7)))
    index.apply(_changes(range(50, 52)))
    gate.set()
    _wait(index)
    assert index.children(PARENT) == _children(0, 2, 3, 4, 6, 7, 8, 10, 11, 50, 51)


def test_a_read_that_fails_is_begun_anew(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    index.apply(_changes(range(10)))
    real = index._open_tokens
    calls: list[bytes] = []

    def fail(key: bytes, sealed: bytes) -> bytes | None:
        calls.append(key)
        if len(calls) == AT_ONCE + 2:
            raise TierIO("injected")
        return real(key, sealed)

    monkeypatch.setattr(index, "_open_tokens", fail)
    index.children(PARENT)
    _wait(index)
    index.children(PARENT)
    _wait(index)
    assert index.children(PARENT) == _children(*range(10))


def test_a_large_family_is_bounded_and_stays_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(siblings_module, "FAMILY", 4)
    monkeypatch.setattr(siblings_module, "_CACHED_CHILDREN", 8)
    cache = SiblingCache()
    cache.begin(PARENT)
    assert not cache.merge(PARENT, _children(10, 20, 30, 40), last=False), "it is full"
    for n in (15, 50):
        cache.add(PARENT, Tokens.of([n]).data, _block(n))
    assert cache.get(PARENT) == _children(10, 15, 30, 50), "the nearest made room"
    for n in range(4):
        cache.begin(parent := _block(100 + n))
        cache.merge(parent, _children(n), last=True)
        assert cache.get(PARENT) is not None
    for n in range(8):
        cache.begin(parent := _block(200 + n))
        cache.merge(parent, _children(n), last=True)
    assert cache.get(PARENT) is None, "what nobody asks for goes"
