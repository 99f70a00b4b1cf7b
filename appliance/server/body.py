"""Request bodies: bounded while they are read, strict JSON, then the fields.

Invariant: never more than the limit is held in memory, whatever the client declares. Messages name fields and limits,
never values. Event loop only.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from appliance.errors import RequestError

READ_TIMEOUT_S = 60.0
DISCARD_BYTES = 64 * 2**20
"""A client that only reads its answer after it has sent its body is listened to for so many bytes."""
DISCARD_TIMEOUT_S = 5.0

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""An escape that may be half of a pair."""

ModelT = TypeVar("ModelT", bound=BaseModel)


async def read_request(request: Request, model: type[ModelT], limit_bytes: int) -> ModelT:
    try:
        body = await asyncio.wait_for(_read(request, limit_bytes), READ_TIMEOUT_S)
    except asyncio.TimeoutError:
        raise RequestError("the body did not arrive in time", code="request_timeout", status=408) from None
    return parse(model, body)


async def _read(request: Request, limit_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "")
    stream = request.stream()
    if not (declared.isdigit() and int(declared) > limit_bytes):
        total = 0
        pieces: list[bytes] = []
        async for piece in stream:
            total += len(piece)
            if total > limit_bytes:
                pieces.clear()
                break
            pieces.append(piece)
        else:
            return b"".join(pieces)
    if request.headers.get("expect", "").lower() != "100-continue":
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_discard(stream), DISCARD_TIMEOUT_S)
    raise RequestError(
        f"the body is larger than {limit_bytes} bytes, the most this appliance accepts: server.max_body, or less where its"
        " context is small",
        code="request_too_large",
        status=413,
    )


async def _discard(stream: AsyncIterator[bytes]) -> None:
    left = DISCARD_BYTES
    async for piece in stream:
        left -= len(piece)
        if left <= 0:
            return


def parse(model: type[ModelT], body: bytes) -> ModelT:
    """`model` from strict JSON: UTF-8, no duplicate keys, no NaN or Infinity, no half of a surrogate pair."""
    try:
        text = body.decode()
        tree = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
        if _SURROGATE.search(text):
            json.dumps(tree, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        raise RequestError("the body is not UTF-8", code="invalid_json") from None
    except UnicodeEncodeError:
        raise RequestError(
            "a string holds half of a surrogate pair; send whole characters", code="invalid_json"
        ) from None
    except RecursionError:
        raise RequestError("the body is nested too deeply", code="invalid_json") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise RequestError(f"the body is not valid JSON: {error.msg} at {where}", code="invalid_json") from None
    except ValueError:  # an integer of thousands of digits
        raise RequestError("the body holds a number that is too long", code="invalid_json") from None
    if not isinstance(tree, dict):
        raise RequestError("the body should be a JSON object", code="invalid_json")
    return validate(model, tree)


def validate(model: type[ModelT], tree: dict[str, Any]) -> ModelT:
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise _first(error) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise RequestError("the body holds the same key twice in one object", code="invalid_json")
    return table


def _refuse_constant(name: str) -> None:
    raise RequestError(f"the body is not valid JSON: {name} is not a JSON number", code="invalid_json")


def _first(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = _path(first["loc"])
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return RequestError(
        f"{param}: {message}", param=param, code="missing_field" if first["type"] == "missing" else None
    )


def _path(loc: Sequence[str | int]) -> str:
    """("messages", 0, "role") -> messages[0].role; which of several types it might have been is left out."""
    named = [part for part in loc if isinstance(part, int) or part.replace("_", "").isalnum()]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in named).lstrip(".")
