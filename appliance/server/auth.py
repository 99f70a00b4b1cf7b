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
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key:
            raise RequestError(
                "no API key given; send it as `Authorization: Bearer KEY` (`kvctl init` and `kvctl tenant add` make one)",
                code="missing_api_key",
                status=401,
            )
        tenant = authenticate(key) if len(key) <= MAX_KEY_CHARS else None
        if tenant is None:
            raise RequestError("the API key is not known here", code="invalid_api_key", status=401)
        request.state.tenant = tenant

    return check
