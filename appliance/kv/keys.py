"""Names of blocks: a keyed hash chained over the prefix (FORMAT.md, "Names").

Invariant: a name depends on the tenant's hash key, the namespace, the fingerprint, the block size and every token
from position 0, and on nothing of this process. Pure functions; any thread.
"""

from __future__ import annotations

import hmac
from struct import Struct

from appliance.types import TOKEN_BYTES, BlockId, Fingerprint, Namespace, Tokens

_LABEL = b"kva/px/v1"
_U32 = Struct("<I")


def length_prefixed(*fields: bytes) -> bytes:
    """Fields joined so that no two different lists give the same bytes: u32le length before each."""
    return b"".join(part for field in fields for part in (_U32.pack(len(field)), field))


def chain_root(hash_key: bytes, ns: Namespace, fingerprint: Fingerprint, block_tokens: int) -> bytes:
    """h0: the parent of the block at position 0, and the opaque id of the namespace for one model."""
    message = length_prefixed(
        _LABEL,
        ns.tenant.encode(),
        ns.name.encode(),
        fingerprint.model,
        fingerprint.layout,
        _U32.pack(block_tokens),
        ns.salt,
    )
    return hmac.digest(hash_key, message, "sha256")


def block_id(hash_key: bytes, parent: bytes, tokens: Tokens) -> BlockId:
    """Name of the block of `tokens` under `parent`; a tail is named the same way with fewer tokens."""
    return BlockId(hmac.digest(hash_key, parent + tokens.data, "sha256"))


def chain(hash_key: bytes, root: bytes, tokens: Tokens, block_tokens: int) -> list[BlockId]:
    """Names of the full blocks of `tokens`; what is left after the last of them is not named."""
    data, step = tokens.data, block_tokens * TOKEN_BYTES
    ids: list[BlockId] = []
    parent = root
    for start in range(0, len(data) - step + 1, step):
        parent = BlockId(hmac.digest(hash_key, parent + data[start : start + step], "sha256"))
        ids.append(parent)
    return ids
