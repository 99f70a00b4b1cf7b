"""Errors as clients see them: OpenAI's shape or Anthropic's, an HTTP status, and a sentence that says what to change.

Invariant: only messages of our own exception tree leave the process; they carry no content. Anything else is
"internal error" to the client and an exception type with code locations in the log. Event loop only.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from appliance.errors import EngineDied, KvctlError, Overloaded, RequestError, StateError, UsageError, frames_of

log = logging.getLogger(__name__)


_ANTHROPIC_KINDS = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.REQUEST_TIMEOUT: "timeout_error",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "request_too_large",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    HTTPStatus.SERVICE_UNAVAILABLE: "overloaded_error",
}


@dataclass(frozen=True)
class ApiError:
    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        if self.status == HTTPStatus.TOO_MANY_REQUESTS:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    def to_json(self) -> bytes:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    def to_anthropic_json(self, request_id: str) -> bytes:
        kind = _ANTHROPIC_KINDS.get(
            HTTPStatus(self.status), "invalid_request_error" if self.status < 500 else "api_error"
        )
        error = {"type": kind, "message": self.message}
        return json.dumps({"type": "error", "error": error, "request_id": request_id}).encode()

    def response(self, request: Request) -> Response:
        """In the shape that its client knows."""
        anthropic = request.scope["path"].startswith("/v1/messages") or "anthropic-version" in request.headers
        body = self.to_anthropic_json(request.state.request_id) if anthropic else self.to_json()
        return Response(body, self.status, headers=dict(self.headers), media_type="application/json")


def describe(error: Exception, request_id: str) -> ApiError:
    """The API error of an exception. One that is not ours is logged without its message: that may hold content."""
    if isinstance(error, RequestError):
        headers = {"www-authenticate": "Bearer"} if error.status == HTTPStatus.UNAUTHORIZED else {}
        return ApiError(error.status, str(error), error.param, error.code, headers)
    if isinstance(error, Overloaded):
        return ApiError(error.status, str(error), code="overloaded", headers=_retry_after(error.retry_after_s))
    if isinstance(error, EngineDied):
        message = "the engine process died and is being restarted; send the request again"
        return ApiError(503, message, code="engine_restarting", headers=_retry_after(error.retry_after_s))
    if isinstance(error, UsageError):
        return ApiError(400, str(error))
    if isinstance(error, StateError):
        return ApiError(409, str(error))
    if isinstance(error, KvctlError):
        return ApiError(500, str(error))
    if isinstance(error, HTTPException):
        return _http(error)
    log.error("request %s: %s", request_id, frames_of(error))
    return ApiError(500, f"internal error; the log has more under request id {request_id}", code="internal_error")


def _retry_after(seconds: float) -> dict[str, str]:
    return {"retry-after": str(max(1, math.ceil(seconds)))}


def _http(error: HTTPException) -> ApiError:
    messages = {
        404: "there is nothing at this path; the OpenAI API is under /v1",
        405: "this path does not take that method",
    }
    return ApiError(error.status_code, messages.get(error.status_code, str(error.detail)), headers=error.headers or {})


async def _handle(request: Request, error: Exception) -> Response:
    return describe(error, request.state.request_id).response(request)


def install(app: FastAPI) -> None:
    app.add_exception_handler(KvctlError, _handle)
    app.add_exception_handler(HTTPException, _handle)
