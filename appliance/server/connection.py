"""Connections: who may open one, how many there are, and how long each may be without a request.

Invariant: a connection that sends no whole request head in time is closed, however its bytes trickle in, and so is one
that does not read its answer; one more than MAX_CONNECTIONS, or one that is no HTTP, gets an answer and is closed. What a
request's body may take is `body.py`'s. Event loop only.
"""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import struct
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from appliance.server.errors import ApiError

HEAD_TIMEOUT_S = 20.0
KEEP_ALIVE_S = 60
"""Between an answer and the next request's first byte."""
STALLED_S = 60.0
"""An answer that its client does not read waits so long."""
MAX_CONNECTIONS = max(16, min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))
"""Of clients. The other half of the descriptors is for segments, index and engine."""
_PEER = struct.Struct("3i")
"""struct ucred: pid, uid, gid."""


def peer(sock: Any) -> tuple[int, int]:
    """(pid, uid) of the process at the other end of a unix socket."""
    pid, uid, _ = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return pid, uid


class _Protocol(H11Protocol):
    """HTTP, whose refusals have the shape of every other error."""

    def refuse(self, error: ApiError) -> None:
        """Answer without a request, and hang up."""
        body = error.to_json()
        head = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}", "content-type: application/json"]
        head += [f"content-length: {len(body)}", *(f"{name}: {value}" for name, value in error.headers.items())]
        self.transport.write("\r\n".join([*head, "connection: close", "", ""]).encode() + body)
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self.refuse(ApiError(400, "this is not a valid HTTP request"))


class AdminProtocol(_Protocol):
    """For this user and root only."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        _, uid = peer(transport.get_extra_info("socket"))
        if uid not in (0, os.geteuid()):
            self.refuse(ApiError(403, "the admin socket is for the user that runs the appliance, and root"))


class PublicProtocol(_Protocol):
    """For everybody, within bounds."""

    _head_due: asyncio.TimerHandle | None = None
    _stalled_at: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            full = f"there are {MAX_CONNECTIONS} connections already, the most this appliance accepts"
            self.refuse(ApiError(503, full, code="overloaded", headers={"retry-after": "1"}))
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self.resume_writing()
        super().connection_lost(exc)
        self._unwatch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled_at = self.loop.call_later(STALLED_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled_at is not None:
            self._stalled_at.cancel()
            self._stalled_at = None

    def _watch(self) -> None:
        """A head is awaited as long as its request has not begun; bytes of it give no more time."""
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._unwatch()
        elif self._head_due is None:
            self._head_due = self.loop.call_later(HEAD_TIMEOUT_S, self._overdue)

    def _unwatch(self) -> None:
        if self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None

    def _overdue(self) -> None:
        if not self.transport.is_closing():
            self.refuse(ApiError(408, "the head of the request did not arrive in time", code="request_timeout"))
