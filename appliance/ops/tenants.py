"""Tenants of a home whose appliance is stopped; a running one is asked over its admin socket instead.

Invariant: an API key is returned once and stored nowhere in clear.
"""

from __future__ import annotations

from pathlib import Path

from appliance.api.control import TenantAdded, TenantInfo, TenantList
from appliance.security.keyring import Keyring


def add_tenant(home: Path, key_file: Path, name: str) -> TenantAdded:
    return TenantAdded(tenant=name, api_key=Keyring.open(home, key_file).add_tenant(name))


def list_tenants(home: Path, key_file: Path) -> TenantList:
    return tenants_of(Keyring.open(home, key_file))


def tenants_of(keyring: Keyring) -> TenantList:
    return TenantList(
        tenants=[
            TenantInfo(tenant=tenant.name, api_keys=len(tenant.api_keys), created=tenant.created)
            for tenant in keyring.tenants()
        ]
    )
