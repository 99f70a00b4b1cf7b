"""The keyring's body: tenants, their random keys, and the digests of their API keys.

Invariant: immutable values; a change makes a new Body. API keys are never kept, only their HMAC under the pepper.
Random, not derived, tenant keys are what makes forgetting a tenant final.
"""

from __future__ import annotations

import hmac
import json
import os
import re
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone

from appliance.errors import StateError, UsageError

API_KEY_PREFIX = "kvctl-"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(frozen=True)
class DataKey:
    """One generation of a tenant's sealing key."""

    id: bytes
    key: bytes = field(repr=False)


@dataclass(frozen=True)
class ApiKey:
    name: str
    mac: bytes = field(repr=False)
    created: str


@dataclass(frozen=True)
class Quota:
    """Most bytes of a tenant's blocks in a tier; None: what fairness leaves to it."""

    dram: int | None = None
    nvme: int | None = None


NO_QUOTA = Quota()


@dataclass(frozen=True)
class Tenant:
    name: str
    created: str
    """UTC, ISO 8601."""
    hash_key: bytes = field(repr=False)
    locate_key: bytes = field(repr=False)
    data_keys: tuple[DataKey, ...] = field(repr=False)
    """Oldest first; the last one seals, the others only open."""
    api_keys: tuple[ApiKey, ...]
    quota: Quota = NO_QUOTA


@dataclass(frozen=True)
class Body:
    index_key: bytes = field(repr=False)
    tenants: tuple[Tenant, ...] = ()

    @classmethod
    def new(cls) -> Body:
        return cls(index_key=os.urandom(32))

    def find(self, name: str) -> Tenant | None:
        return next((tenant for tenant in self.tenants if tenant.name == name), None)

    def owner(self, pepper: bytes, api_key: str) -> str | None:
        """Tenant of an API key. Compares with every stored digest, so timing tells neither which nor how near."""
        mac = _api_mac(pepper, api_key)
        found: str | None = None
        for tenant in self.tenants:
            for known in tenant.api_keys:
                if hmac.compare_digest(mac, known.mac):
                    found = tenant.name
        return found

    def with_tenant(self, name: str) -> Body:
        """A new tenant without API keys."""
        if not _NAME.fullmatch(name):
            raise UsageError(
                f'"{name[:80]}" is no tenant name: use 1 to 63 of a-z 0-9 . _ - and begin with a letter or digit'
            )
        if self.find(name):
            raise StateError(f'tenant "{name}" exists already')
        tenant = Tenant(name, _now(), os.urandom(32), os.urandom(32), (DataKey(os.urandom(16), os.urandom(32)),), ())
        return replace(self, tenants=(*self.tenants, tenant))

    def with_api_key(self, pepper: bytes, name: str, api_key: str) -> Body:
        tenant = self.find(name)
        if tenant is None:
            raise StateError(f'there is no tenant "{name}"')
        added = ApiKey(f"key-{len(tenant.api_keys) + 1}", _api_mac(pepper, api_key), _now())
        changed = replace(tenant, api_keys=(*tenant.api_keys, added))
        return replace(self, tenants=tuple(changed if t is tenant else t for t in self.tenants))

    def with_quota(self, name: str, quota: Quota) -> Body:
        tenant = self.find(name)
        if tenant is None:
            raise StateError(f'there is no tenant "{name}"')
        changed = replace(tenant, quota=quota)
        return replace(self, tenants=tuple(changed if t is tenant else t for t in self.tenants))

    def encode(self) -> bytes:
        """FORMAT.md, "Keyring": JSON with sorted keys, byte strings in hex."""
        return json.dumps(
            {
                "index_key": self.index_key.hex(),
                "tenants": [
                    {
                        "name": t.name,
                        "created": t.created,
                        "hash_key": t.hash_key.hex(),
                        "locate_key": t.locate_key.hex(),
                        "data_keys": [{"id": k.id.hex(), "key": k.key.hex()} for k in t.data_keys],
                        "api_keys": [{"name": a.name, "mac": a.mac.hex(), "created": a.created} for a in t.api_keys],
                        **({} if t.quota == NO_QUOTA else {"quota": {"dram": t.quota.dram, "nvme": t.quota.nvme}}),
                    }
                    for t in self.tenants
                ],
            },
            sort_keys=True,
            separators=(",", ":"),
        ).encode()

    @classmethod
    def decode(cls, data: bytes) -> Body:
        """Reverse of encode(); only ever called on bytes that verified."""
        tree = json.loads(data)
        return cls(
            bytes.fromhex(tree["index_key"]),
            tuple(
                Tenant(
                    t["name"],
                    t["created"],
                    bytes.fromhex(t["hash_key"]),
                    bytes.fromhex(t["locate_key"]),
                    tuple(DataKey(bytes.fromhex(k["id"]), bytes.fromhex(k["key"])) for k in t["data_keys"]),
                    tuple(ApiKey(a["name"], bytes.fromhex(a["mac"]), a["created"]) for a in t["api_keys"]),
                    Quota(**t["quota"]) if "quota" in t else NO_QUOTA,
                )
                for t in tree["tenants"]
            ),
        )


def _api_mac(pepper: bytes, api_key: str) -> bytes:
    return hmac.digest(pepper, api_key.encode("utf-8", "surrogatepass"), "sha256")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
