"""Values of protocol.py as msgpack maps, both ways, and frames from a blocking socket.

Invariant: decoding accepts exactly what encoding makes; anything else raises ValueError, TypeError or KeyError, which
ends the connection. Nothing here builds an object of a type the peer names freely. Threading: pure functions.
"""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Mapping
from typing import Any

from appliance.chat.tools import ToolFormat
from appliance.engine.base import EngineConfig, EngineInfo, KVMode, Pooling
from appliance.engine.client import Computed, Done, Event, NewTokens, Preempted, Prefilled
from appliance.engine.protocol import LENGTH, MAX_MESSAGE_BYTES, unpack
from appliance.engine.request import Failed
from appliance.errors import EngineError, KvctlError, ModelError, RequestError, RestoreError
from appliance.types import BlockLayout, Fingerprint, FinishReason, SamplingParams, TokenLogprob, Tokens

MALFORMED = (ValueError, TypeError, KeyError)
"""What decoding a message of a broken peer may raise."""

_ERRORS: dict[str, type[KvctlError]] = {kind.__name__: kind for kind in (EngineError, ModelError, RestoreError)}

_EVENTS: dict[str, type[Event | Failed]] = {
    "computed": Computed,
    "prefilled": Prefilled,
    "preempted": Preempted,
    "done": Done,
    "failed": Failed,
}
"""All but tokens, which have a form of their own."""


def receive(connection: socket.socket) -> dict[str, Any] | None:
    """The next message; None when the peer has closed, also in the middle of one."""
    head = _receive_exactly(connection, LENGTH.size)
    if head is None:
        return None
    body = _receive_exactly(connection, message_bytes(head))
    return None if body is None else unpack(memoryview(body))


def message_bytes(head: bytes | bytearray) -> int:
    (size,) = LENGTH.unpack(head)
    if size > MAX_MESSAGE_BYTES:
        raise ValueError("a message is too long")
    return int(size)


def _receive_exactly(connection: socket.socket, size: int) -> bytearray | None:
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        n = connection.recv_into(view[done:])
        if not n:
            return None
        done += n
    return data


def config_to_map(config: EngineConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)


def config_from_map(fields: Mapping[str, Any]) -> EngineConfig:
    return EngineConfig(**fields)


def info_to_map(info: EngineInfo) -> dict[str, Any]:
    return dataclasses.asdict(info) | {
        "kv_mode": info.kv_mode.value,
        "tool_format": info.tool_format.value,
        "pooling": info.pooling.value,
    }


def info_from_map(fields: Mapping[str, Any]) -> EngineInfo:
    layout = fields["layout"]
    known = {
        "kv_mode": KVMode(fields["kv_mode"]),
        "layout": BlockLayout(
            layout["block_tokens"], tuple(layout["token_bytes"]), tuple(layout["fixed_bytes"]), layout["divisible"]
        ),
        "fingerprint": Fingerprint(**fields["fingerprint"]),
        "tool_format": ToolFormat(fields["tool_format"]),
        "pooling": Pooling(fields["pooling"]),
        "notes": tuple(fields["notes"]),
    }
    return EngineInfo(**{**fields, **known})


def sampling_to_map(sampling: SamplingParams) -> dict[str, Any]:
    return dataclasses.asdict(sampling)


def sampling_from_map(fields: Mapping[str, Any]) -> SamplingParams:
    bias = tuple((int(token), float(value)) for token, value in fields["logit_bias"])
    return SamplingParams(**{**fields, "stop": tuple(fields["stop"]), "logit_bias": bias})


def error_to_map(error: KvctlError) -> dict[str, Any]:
    if isinstance(error, RequestError):
        extra = {"param": error.param, "code": error.code, "status": error.status}
        return {"type": "RequestError", "message": str(error), **extra}
    kind = type(error).__name__
    return {"type": kind if kind in _ERRORS else "EngineError", "message": str(error)}


def error_from_map(fields: Mapping[str, Any]) -> KvctlError:
    if fields["type"] == "RequestError":
        return RequestError(fields["message"], param=fields["param"], code=fields["code"], status=fields["status"])
    return _ERRORS[fields["type"]](fields["message"])


def event_to_map(request: str, event: Event | Failed) -> dict[str, Any]:
    if isinstance(event, NewTokens):
        logprobs = [[each.token, each.logprob, each.top] for each in event.logprobs]
        return {
            "event": "tokens", "request": request, "ids": event.tokens.data, "text": event.text, "logprobs": logprobs or None
        }  # fmt: skip
    kind = next(name for name, of in _EVENTS.items() if of is type(event))
    fields = dataclasses.asdict(event)
    if isinstance(event, Done):
        fields["reason"] = event.reason.value
    return {"event": kind, "request": request, **fields}


def event_from_map(message: Mapping[str, Any]) -> Event | Failed:
    fields = {key: value for key, value in message.items() if key not in ("event", "request")}
    kind = message["event"]
    if kind == "tokens":
        logprobs = tuple(
            TokenLogprob(token, logprob, tuple((t, p) for t, p in top))
            for token, logprob, top in fields["logprobs"] or ()
        )
        return NewTokens(Tokens(fields["ids"]), fields["text"], logprobs)
    if kind == "done":
        fields["reason"] = FinishReason(fields["reason"])
    return _EVENTS[kind](**fields)
