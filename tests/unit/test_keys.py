"""Names of blocks: what they depend on, and what they do not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.kv.keys import block_id, chain, chain_root, length_prefixed
from appliance.types import Fingerprint, Namespace, Tokens

HASH_KEY = b"h" * 32
NS = Namespace("acme", "default", b"salt")
FINGERPRINT = Fingerprint(b"m" * 32, b"l" * 32)
ROOT = chain_root(HASH_KEY, NS, FINGERPRINT, 256)

token_lists = st.lists(st.integers(0, 2**31 - 1), max_size=40).map(Tokens.of)


@pytest.mark.parametrize(
    "other",
    [
        chain_root(b"H" * 32, NS, FINGERPRINT, 256),
        chain_root(HASH_KEY, replace(NS, tenant="other"), FINGERPRINT, 256),
        chain_root(HASH_KEY, replace(NS, name="other"), FINGERPRINT, 256),
        chain_root(HASH_KEY, replace(NS, salt=b""), FINGERPRINT, 256),
        chain_root(HASH_KEY, NS, replace(FINGERPRINT, model=b"M" * 32), 256),
        chain_root(HASH_KEY, NS, replace(FINGERPRINT, layout=b"L" * 32), 256),
        chain_root(HASH_KEY, NS, FINGERPRINT, 128),
        chain_root(HASH_KEY, Namespace("acmed", "efault", b"salt"), FINGERPRINT, 256),
    ],
)
def test_everything_that_separates_kv_separates_roots(other: bytes) -> None:
    assert len(other) == 32
    assert other != ROOT


@given(token_lists, st.integers(1, 12))
def test_chain_names_full_blocks_one_under_the_other(tokens: Tokens, block_tokens: int) -> None:
    ids = chain(HASH_KEY, ROOT, tokens, block_tokens)
    assert len(ids) == len(tokens) // block_tokens
    parent = ROOT
    for i, name in enumerate(ids):
        assert name == block_id(HASH_KEY, parent, tokens[i * block_tokens : (i + 1) * block_tokens])
        parent = name


@given(token_lists, token_lists, st.integers(1, 8))
def test_names_agree_exactly_as_far_as_the_prefix_does(a: Tokens, b: Tokens, block_tokens: int) -> None:
    left, right = (chain(HASH_KEY, ROOT, a + part, block_tokens) for part in (Tokens(), b))
    assert right[: len(left)] == left
    shared = a.common_prefix(b) // block_tokens
    one, two = chain(HASH_KEY, ROOT, a, block_tokens), chain(HASH_KEY, ROOT, b, block_tokens)
    assert one[:shared] == two[:shared]
    assert not set(one[shared:]) & set(two[shared:])


def test_a_tail_is_not_the_block_it_begins() -> None:
    tokens = Tokens.of(range(16))
    assert block_id(HASH_KEY, ROOT, tokens[:15]) != block_id(HASH_KEY, ROOT, tokens)


@given(st.lists(st.binary(max_size=6), max_size=5), st.lists(st.binary(max_size=6), max_size=5))
def test_length_prefixed_lists_never_collide(a: list[bytes], b: list[bytes]) -> None:
    assert (length_prefixed(*a) == length_prefixed(*b)) == (a == b)
