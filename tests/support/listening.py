"""Both apps on real sockets, in a thread of their own, for clients that know only HTTP."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from appliance.server import listen
from appliance.server.app import admin_app, public_app
from tests.support.fake_runtime import FakeAdmin, FakeRuntime, service


@contextmanager
def listening(path: Path, runtime: FakeRuntime) -> Iterator[str]:
    """The base URL, /v1 included; `path` is the admin socket's."""
    started = threading.Event()
    urls: list[str] = []
    stops: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        served = service(runtime)
        bound = listen.bind("127.0.0.1", 0, path)
        listener = listen.Listener(bound, public_app(served), admin_app(served, FakeAdmin()))
        await listener.start()
        stop = asyncio.Event()
        stops.append((asyncio.get_running_loop(), stop))
        urls.append(bound.base_url)
        started.set()
        await stop.wait()
        await listener.stop(5)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert started.wait(20)
    try:
        yield urls[0]
    finally:
        loop, stop = stops[0]
        loop.call_soon_threadsafe(stop.set)
        thread.join()
