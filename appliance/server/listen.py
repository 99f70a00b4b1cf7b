"""Sockets and web servers: the public app on TCP, the admin app on a unix socket of mode 0600, one event loop.

Invariant: a socket file is removed only when nobody answers on it. What a connection may do is `connection.py`'s. Event
loop only.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from appliance.config import local_url
from appliance.errors import AlreadyRunning, StateError
from appliance.server.connection import KEEP_ALIVE_S, AdminProtocol, PublicProtocol, peer

BACKLOG = 512
UNIX_PATH_BYTES = 107


@dataclass(frozen=True)
class Bound:
    public: socket.socket
    admin: socket.socket
    admin_path: Path
    base_url: str
    """What clients are configured with, /v1 included."""

    def close(self) -> None:
        self.public.close()
        self.admin.close()
        self.admin_path.unlink(missing_ok=True)


def bind(host: str, port: int, admin_path: Path) -> Bound:
    """Both sockets; who connects waits until a Listener starts. StateError names what is in the way; AlreadyRunning names the pid."""
    admin = _bind_unix(admin_path)
    try:
        public = _bind_tcp(host, port)
    except BaseException:
        admin.close()
        admin_path.unlink()
        raise
    return Bound(public, admin, admin_path, local_url(host, public.getsockname()[1]))


def _bind_tcp(host: str, port: int) -> socket.socket:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        raise StateError(
            f'"{host}" is not an address of this machine; set server.host to one, e.g. 127.0.0.1'
        ) from None
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise StateError(f"port {port} on {host} is in use; choose another with --port") from None
        raise StateError(f"cannot listen on {host} port {port}: {os.strerror(error.errno or 0)}") from None
    return sock


def _bind_unix(path: Path) -> socket.socket:
    if len(os.fsencode(path)) > UNIX_PATH_BYTES:
        raise StateError(
            f"{path} is too long for a unix socket ({UNIX_PATH_BYTES} bytes at most); use a shorter --home"
        )
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        sock.bind(os.fspath(path))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise StateError(f"cannot make the admin socket {path}: {os.strerror(error.errno or 0)}") from None
    finally:
        os.umask(mask)
    return sock


def _remove_stale(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise StateError(f"{path} is in the way of the admin socket; move it")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as error:
            raise StateError(f"{path} does not answer: {os.strerror(error.errno or 0)}") from None
        pid, _ = peer(probe)
    raise AlreadyRunning(f"another appliance (pid {pid}) answers on {path}", pid=pid)


class _Server(uvicorn.Server):
    """Signals are the appliance's business; `ready` is set once it accepts connections."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()


class _Door:
    """Leads to the app of the moment, kept connections too."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


class Listener:
    """Serves two apps on bound sockets from start() to stop()."""

    def __init__(self, bound: Bound, public: ASGIApp, admin: ASGIApp) -> None:
        self._bound = bound
        self._public_door, self._admin_door = _Door(public), _Door(admin)
        self._public = _server(self._public_door, PublicProtocol)
        self._admin = _server(self._admin_door, AdminProtocol)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Returns when both accept connections."""
        for server, sock in ((self._public, self._bound.public), (self._admin, self._bound.admin)):
            self._tasks.append(asyncio.create_task(server.serve([sock])))
            await server.ready.wait()

    def switch(self, public: ASGIApp, admin: ASGIApp) -> None:
        """Requests from now on go to these."""
        self._public_door.app, self._admin_door.app = public, admin

    async def stop(self, grace_s: float) -> None:
        """Stop accepting, let responses finish for up to grace_s, cancel the rest. The admin socket goes last."""
        for server, task in zip((self._public, self._admin), self._tasks, strict=True):
            server.config.timeout_graceful_shutdown = grace_s  # type: ignore[assignment]  # seconds, whole or not
            server.should_exit = True
            await asyncio.shield(task)
        self._bound.close()


def _server(app: ASGIApp, protocol: type[AdminProtocol | PublicProtocol]) -> _Server:
    return _Server(
        uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
    )
