"""kvctl tenant: who may call, and whose cache is whose."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from appliance.errors import NotRunning, UsageError
from kvctl import output
from kvctl.options import Home, Json, ProfileName, locate

if TYPE_CHECKING:
    from appliance.api.control import TenantAdded, TenantInfo, TenantList, TenantQuota

app = typer.Typer(help="Tenants and their API keys. Tenants never see each other's cache.", no_args_is_help=True)


@app.command()
def add(
    ctx: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Lower-case letters, digits, and . _ - inside.", show_default=False)
    ],
    profile: ProfileName = "default",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Add a tenant and print its API key, which is shown this once."""
    from pydantic import ValidationError

    from appliance.api.control import TenantAdd

    try:
        request = TenantAdd(name=name)
    except ValidationError:
        raise UsageError(
            f'"{name}" cannot name a tenant: use lower-case letters, digits, and . _ - after the first, at most 63 in all'
        ) from None
    added = _add(locate(ctx, home), request.name, profile)
    if as_json:
        output.print_json(added)
    else:
        output.stderr().print(f"The API key of {added.tenant}, shown this once:")
        typer.echo(added.api_key)


@app.command("list")
def list_(ctx: typer.Context, profile: ProfileName = "default", home: Home = None, as_json: Json = False) -> None:
    """List the tenants."""
    tenants = _list(locate(ctx, home), profile)
    if as_json:
        output.print_json(tenants)
    else:
        rows = (
            (t.tenant, str(t.api_keys), t.created, _bound(t.dram_quota_bytes), _bound(t.nvme_quota_bytes))
            for t in tenants.tenants
        )
        output.stdout().print(output.table(["tenant", ">API keys", "created", ">dram quota", ">nvme quota"], rows))


@app.command()
def quota(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False)],
    dram: Annotated[
        str | None,
        typer.Option("--dram", metavar="SIZE", help='Most DRAM, like "4GiB"; 0 lifts it.', show_default=False),
    ] = None,
    nvme: Annotated[
        str | None,
        typer.Option("--nvme", metavar="SIZE", help='Most of the disk, like "64GiB"; 0 lifts it.', show_default=False),
    ] = None,
    profile: ProfileName = "default",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Bound what a tenant's blocks take of DRAM and disk, at once, and from the next start on if it is stopped.

    Less than a block of disk: what it stores stays in memory. Without a size: show the quotas.
    """
    from appliance.api.control import TenantQuota
    from appliance.config import parse_size

    try:
        sizes = [None if size is None else parse_size(size) for size in (dram, nvme)]
    except ValueError as error:
        raise UsageError(str(error)) from None
    done = _set_quota(locate(ctx, home), TenantQuota(tenant=name, dram_bytes=sizes[0], nvme_bytes=sizes[1]), profile)
    if as_json:
        output.print_json(done)
    else:
        output.stdout().print(
            f"{output.plain(done.tenant)}: dram {_bound(done.dram_quota_bytes)}, nvme {_bound(done.nvme_quota_bytes)}"
        )


def _bound(nbytes: int | None) -> str:
    return "-" if nbytes is None else output.size(nbytes)


def _set_quota(home: Path, asked: TenantQuota, profile: str) -> TenantInfo:
    from appliance.config import load_profile
    from appliance.ops import init, tenants
    from kvctl.client import AdminClient

    try:
        with AdminClient(home) as admin:
            return admin.set_quota(asked)
    except NotRunning:
        return tenants.set_quota(home, init.key_file(home, load_profile(profile)), asked)


def _add(home: Path, name: str, profile: str) -> TenantAdded:
    from appliance.api.control import TenantAdd
    from appliance.config import load_profile
    from appliance.ops import init, tenants
    from kvctl.client import AdminClient

    try:
        with AdminClient(home) as admin:
            return admin.add_tenant(TenantAdd(name=name))
    except NotRunning:
        return tenants.add_tenant(home, init.key_file(home, load_profile(profile)), name)


def _list(home: Path, profile: str) -> TenantList:
    from appliance.config import load_profile
    from appliance.ops import init, tenants
    from kvctl.client import AdminClient

    try:
        with AdminClient(home) as admin:
            return admin.tenants()
    except NotRunning:
        return tenants.list_tenants(home, init.key_file(home, load_profile(profile)))
