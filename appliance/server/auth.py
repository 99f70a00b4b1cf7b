"""API key to tenant, as a dependency of every route that needs one.

Invariant: a key is never stored, logged or echoed. Event loop only.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request

from appliance.errors import RequestError

MAX_KEY_CHARS = 512


def require_key(authenticate: Callable[[str], str | None]) -> Callable[[Request], Awaitable[None]]:
    """A dependency that puts the tenant into `request.state.tenant` or answers 401."""

    async def check(request: Request) -> None:
        key = _key(request)
        if not key:
            raise RequestError(
                "no API key given; send it as `Authorization: Bearer KEY` or `x-api-key: KEY` (`kvctl init` and"
                " `kvctl tenant add` make one)",
                code="missing_api_key",
                status=401,
            )
        tenant = authenticate(key) if len(key) <= MAX_KEY_CHARS else None
        if tenant is None:
            raise RequestError("the API key is not known here", code="invalid_api_key", status=401)
        request.state.tenant = tenant

    return check


def _key(request: Request) -> str:
    """As OpenAI's clients send it, or else as Anthropic's do."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return (key if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")).strip()


def require_tenant(name: str) -> Callable[[Request], Awaitable[None]]:
    """A dependency, behind require_key, for what tells of all tenants: 403 for any other."""

    async def check(request: Request) -> None:
        if request.state.tenant != name:
            raise RequestError(f'this is for the operator: use a key of tenant "{name}"', code="forbidden", status=403)

    return check
