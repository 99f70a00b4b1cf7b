"""The outermost layer of both apps: request ids, the last resort for unexpected exceptions, response counts.

Invariant: every response carries `x-request-id` (Anthropic's clients: `request-id`), and no exception passes to the web server, which would log its message.
Event loop only.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from appliance.errors import Overloaded
from appliance.server.errors import describe


class Edge:
    def __init__(self, app: ASGIApp, responded: Callable[[int], None]) -> None:
        self._app = app
        self._responded = responded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request_id = os.urandom(12).hex()
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def tagged(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = headers["request-id"] = request_id
                self._responded(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, tagged)
        except ClientDisconnect:
            return
        except asyncio.CancelledError:  # the drain is over: the task ends here, with an answer if there was none
            if not started:
                stopped = Overloaded(
                    "the appliance is stopping: this request was not finished", retry_after_s=10, status=503
                )
                await describe(stopped, request_id).response(Request(scope))(scope, receive, tagged)
        except Exception as error:  # noqa: BLE001  the last resort: describe() logs it without content
            problem = describe(error, request_id)
            if not started:
                await problem.response(Request(scope))(scope, receive, tagged)
