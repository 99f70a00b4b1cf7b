"""Tenants of a home whose appliance is stopped; a running one is asked over its admin socket instead.

Invariant: an API key is returned once and stored nowhere in clear.
"""

from __future__ import annotations

from pathlib import Path

from appliance.api.control import TenantAdded, TenantInfo, TenantList, TenantQuota
from appliance.security.keyring import Keyring


def add_tenant(home: Path, key_file: Path, name: str) -> TenantAdded:
    return TenantAdded(tenant=name, api_key=Keyring.open(home, key_file).add_tenant(name))


def list_tenants(home: Path, key_file: Path) -> TenantList:
    return tenants_of(Keyring.open(home, key_file))


def set_quota(home: Path, key_file: Path, asked: TenantQuota) -> TenantInfo:
    """It holds from the next start on."""
    keyring = Keyring.open(home, key_file)
    keyring.set_quota(asked.tenant, asked.dram_bytes, asked.nvme_bytes)
    return info_of(keyring, asked.tenant)


def tenants_of(keyring: Keyring) -> TenantList:
    return TenantList(tenants=[info_of(keyring, tenant.name) for tenant in keyring.tenants()])


def info_of(keyring: Keyring, name: str) -> TenantInfo:
    tenant = next(tenant for tenant in keyring.tenants() if tenant.name == name)
    return TenantInfo(
        tenant=name,
        api_keys=len(tenant.api_keys),
        created=tenant.created,
        dram_quota_bytes=tenant.quota.dram,
        nvme_quota_bytes=tenant.quota.nvme,
    )
