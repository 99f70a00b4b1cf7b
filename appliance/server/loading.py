"""What both apps answer until the model is loaded: 503 with Retry-After, and on the admin socket how far it is.

Invariant: nothing here waits for the engine. Event loop only.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from appliance.api.control import Loading
from appliance.errors import Overloaded
from appliance.server.edge import Edge
from appliance.server.errors import describe
from appliance.server.llama_routes import RETRY_AFTER_S, not_ready


def public_app(now: Callable[[], Loading]) -> ASGIApp:
    return _app(lambda path: not_ready(now().state) if path == "/health" else None, now)


def admin_app(now: Callable[[], Loading]) -> ASGIApp:
    def known(path: str) -> Response | None:
        if path == "/v1/admin/status":
            return Response(now().model_dump_json(), media_type="application/json")
        return not_ready(now().state) if path == "/health" else None

    return _app(known, now)


def _app(known: Callable[[str], Response | None], now: Callable[[], Loading]) -> ASGIApp:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        response = known(scope["path"])
        if response is None:
            error = Overloaded(f"the appliance is {now().progress}", retry_after_s=RETRY_AFTER_S, status=503)
            response = describe(error, scope["state"]["request_id"]).response(Request(scope))
        await response(scope, receive, send)

    return Edge(answer, responded=lambda status: None)
