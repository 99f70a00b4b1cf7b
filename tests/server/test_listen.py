"""Sockets: modes, stale files, ports in use, peer credentials, drain."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from appliance.errors import AlreadyRunning, StateError
from appliance.server import connection, listen, loading
from appliance.server.app import admin_app, public_app
from tests.support.fake_runtime import LOADING, FakeAdmin, FakeRuntime, service

ALICE = {"authorization": "Bearer key-of-alice"}
HELLO = [{"role": "user", "content": "hi"}]


@asynccontextmanager
async def listening(path: Path, runtime: FakeRuntime, drain_s: float = 5.0) -> AsyncIterator[listen.Bound]:
    bound = listen.bind("127.0.0.1", 0, path)
    served = service(runtime)
    listener = listen.Listener(bound, public_app(served), admin_app(served, FakeAdmin()))
    await listener.start()
    try:
        yield bound
    finally:
        await listener.stop(drain_s)


def admin_client(path: Path) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(path)), base_url="http://admin")


async def test_both_apps_answer_and_the_socket_file_is_private(tmp_path: Path, runtime: FakeRuntime) -> None:
    path = tmp_path / "kvctl.sock"
    async with listening(path, runtime) as bound:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        async with httpx.AsyncClient(base_url=bound.base_url, headers=ALICE) as client:
            response = await client.get("/models")
            assert response.status_code == 200
            assert "server" not in response.headers
            assert (await client.get("/admin/status")).status_code == 404
        async with admin_client(path) as client:
            assert (await client.get("/v1/admin/status")).json()["state"] == "ready"
    assert not path.exists()


async def test_another_user_is_refused_at_the_admin_socket(
    tmp_path: Path, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kvctl.sock"
    monkeypatch.setattr(connection, "peer", lambda sock: (1, os.geteuid() + 1))
    async with listening(path, runtime), admin_client(path) as client:
        response = await client.get("/v1/admin/status")
        assert response.status_code == 403
        assert "admin socket" in response.json()["error"]["message"]


def test_peer_credentials_are_those_of_the_other_end() -> None:
    here, there = socket.socketpair(socket.AF_UNIX)
    with here, there:
        assert connection.peer(here) == (os.getpid(), os.geteuid())


def test_a_port_in_use_is_one_clear_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StateError, match=f"port {port} .* in use"):
            listen.bind("127.0.0.1", port, tmp_path / "kvctl.sock")
    assert not (tmp_path / "kvctl.sock").exists()


def test_a_live_admin_socket_is_kept_and_its_pid_named(tmp_path: Path) -> None:
    path = tmp_path / "kvctl.sock"
    bound = listen.bind("127.0.0.1", 0, path)
    with bound.public, bound.admin:
        with pytest.raises(AlreadyRunning) as caught:
            listen.bind("127.0.0.1", 0, path)
        assert caught.value.pid == os.getpid()
        assert path.exists()


def test_a_stale_admin_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "kvctl.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    bound = listen.bind("127.0.0.1", 0, path)
    with bound.public, bound.admin:
        assert stat.S_ISSOCK(path.stat().st_mode)


def test_a_file_in_the_way_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "kvctl.sock"
    path.write_text("precious")
    with pytest.raises(StateError, match="in the way"):
        listen.bind("127.0.0.1", 0, path)
    assert path.read_text() == "precious"


def test_a_long_socket_path_says_what_to_change(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="--home"):
        listen.bind("127.0.0.1", 0, tmp_path / ("d" * 100) / "kvctl.sock")


async def test_a_kept_connection_meets_the_app_of_the_moment(tmp_path: Path, runtime: FakeRuntime) -> None:
    bound = listen.bind("127.0.0.1", 0, tmp_path / "kvctl.sock")
    served = service(runtime)
    listener = listen.Listener(bound, loading.public_app(lambda: LOADING), loading.admin_app(lambda: LOADING))
    await listener.start()
    async with (
        httpx.AsyncClient(base_url=bound.base_url, headers=ALICE) as client,
        admin_client(bound.admin_path) as admin,
    ):
        assert (await client.get("/models")).status_code == 503
        assert (await admin.get("/v1/admin/status")).json()["state"] == "loading"
        listener.switch(public_app(served), admin_app(served, FakeAdmin()))
        assert (await client.get("/models")).status_code == 200
        assert (await admin.get("/v1/admin/status")).json()["state"] == "ready"
    await listener.stop(5.0)


async def test_stop_lets_a_running_answer_finish(tmp_path: Path, runtime: FakeRuntime) -> None:
    bound = listen.bind("127.0.0.1", 0, tmp_path / "kvctl.sock")
    served = service(runtime)
    listener = listen.Listener(bound, public_app(served), admin_app(served, FakeAdmin()))
    await listener.start()
    gate = asyncio.Event()
    runtime.interfere = gate.wait
    async with httpx.AsyncClient(base_url=bound.base_url, headers=ALICE) as client:
        asking = asyncio.ensure_future(client.post("/chat/completions", json={"messages": HELLO}))
        await runtime.begun.wait()
        stopping = asyncio.ensure_future(listener.stop(5.0))
        await asyncio.sleep(0)
        gate.set()
        assert (await asking).status_code == 200
    await stopping


async def test_stop_cancels_what_outlasts_the_drain(tmp_path: Path, runtime: FakeRuntime) -> None:
    runtime.hold_after = 2
    async with httpx.AsyncClient(headers=ALICE) as client:
        async with listening(tmp_path / "kvctl.sock", runtime, drain_s=0.1) as bound:
            url = f"{bound.base_url}/chat/completions"
            asking = asyncio.ensure_future(client.post(url, json={"messages": HELLO}))
            await runtime.begun.wait()
        response = await asking
        assert response.status_code == 503
        assert "stopping" in response.json()["error"]["message"]
    assert runtime.closed == [runtime.requests[0].request_id]


async def test_a_client_that_hangs_up_cancels_over_a_real_socket(tmp_path: Path, runtime: FakeRuntime) -> None:
    runtime.hold_after = 2
    async with listening(tmp_path / "kvctl.sock", runtime) as bound:
        async with httpx.AsyncClient(base_url=bound.base_url, headers=ALICE) as client:
            body = {"messages": HELLO, "stream": True}
            async with client.stream("POST", "/chat/completions", json=body) as response:
                assert response.status_code == 200
                await anext(response.aiter_lines())
        await asyncio.wait_for(runtime.ended.wait(), 5)
    assert runtime.closed == [runtime.requests[0].request_id]


async def test_a_50_mb_body_gets_its_413_over_a_real_socket(tmp_path: Path, runtime: FakeRuntime) -> None:
    async with (
        listening(tmp_path / "kvctl.sock", runtime) as bound,
        httpx.AsyncClient(base_url=bound.base_url, headers=ALICE) as client,
    ):
        response = await client.post("/chat/completions", content=b" " * 50_000_000)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"
        assert (await client.get("/models")).status_code == 200
