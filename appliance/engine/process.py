"""One engine process and the socket to it, as the control process holds them.

Invariant: when the process is gone, `closed` is set, every call and run that waited has got EngineDied, and the process
was reaped. Threading: event loop only; a process that must be waited for is waited for on a thread.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from appliance.engine import wire
from appliance.engine.client import Event
from appliance.engine.protocol import LENGTH, pack, unpack
from appliance.engine.request import Failed
from appliance.errors import EngineDied, EngineError, RequestError

ROOT = Path(__file__).resolve().parents[2]
PASSED_ENVIRONMENT = (
    "PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES",
)  # fmt: skip
OPENMP = {"GOMP_SPINCOUNT": "1000"}
"""Microseconds, not milliseconds: a compute thread that waits for one without a core must give up its own."""
RunQueue = asyncio.Queue[Event | Failed | EngineDied]


class EngineProcess:
    def __init__(self, pool_fd: int | None, on_progress: Callable[[float], None]) -> None:
        self._pool_fd = pool_fd
        self._on_progress = on_progress
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._runs: dict[str, RunQueue] = {}
        self._next_call = 0
        self.closed = asyncio.Event()

    async def spawn(self) -> None:
        """EngineError if there can be no other process now."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = _launch(theirs.fileno(), self._pool_fd)
            except OSError as error:
                ours.close()
                raise EngineError(f"no engine process: {error.strerror or error}") from None
        self._reader, self._writer = await asyncio.open_connection(sock=ours)
        self._reading = asyncio.create_task(self._read())

    @property
    def pid(self) -> int:
        return self._process.pid

    async def call(self, op: str, **fields: Any) -> Any:
        if self.closed.is_set():
            raise EngineDied("the engine process is gone")
        call = self.notify(op, **fields)
        self._calls[call] = answer = asyncio.get_running_loop().create_future()
        try:
            return await answer
        finally:
            del self._calls[call]

    def notify(self, op: str, **fields: Any) -> int:
        """Call without waiting for the answer; returns the call's number. RequestError for what no message can hold."""
        self._next_call += 1
        try:
            self._writer.write(pack({"op": op, "call": self._next_call, **fields}))
        except (*wire.MALFORMED, OverflowError):
            raise RequestError(
                "the request is too long, nested too deeply, or holds a number or text that cannot be sent"
            ) from None
        return self._next_call

    def subscribe(self, request: str) -> RunQueue:
        """Events of this request from now on, for one listener."""
        if request in self._runs:
            raise EngineError("the request runs already")
        events: RunQueue = asyncio.Queue()
        self._runs[request] = events
        return events

    def unsubscribe(self, request: str) -> None:
        self._runs.pop(request, None)

    async def close(self) -> None:
        """End the process. It holds nothing that would be lost."""
        self._writer.close()
        await self._reading

    async def _read(self) -> None:
        try:
            while True:
                head = await self._reader.readexactly(LENGTH.size)
                self._handle(unpack(await self._reader.readexactly(wire.message_bytes(head))))
        except (OSError, asyncio.IncompleteReadError, *wire.MALFORMED):
            pass  # it died, or it talks nonsense: either way it is of no more use
        finally:
            self._writer.close()
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
            self._mourn()

    def _mourn(self) -> None:
        self.closed.set()
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(EngineDied("the engine process died"))
        for events in self._runs.values():
            events.put_nowait(EngineDied("the engine process died"))

    def _handle(self, message: Mapping[str, Any]) -> None:
        if "re" in message:
            answer = self._calls.get(message["re"])
            if answer is None or answer.done():
                return  # its caller no longer waits
            if "err" in message:
                answer.set_exception(wire.error_from_map(message["err"]))
            else:
                answer.set_result(message["ok"])
        elif message["event"] == "progress":
            self._on_progress(message["fraction"])
        elif events := self._runs.get(message["request"]):
            events.put_nowait(wire.event_from_map(message))


def _launch(socket_fd: int, pool_fd: int | None) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "appliance.engine.worker", "--socket-fd", str(socket_fd)]
    if pool_fd is not None:
        command += ["--pool-fd", str(pool_fd)]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[socket_fd] if pool_fd is None else [socket_fd, pool_fd],
        cwd=ROOT,
        env={name: os.environ[name] for name in PASSED_ENVIRONMENT if name in os.environ} | OPENMP,
    )
